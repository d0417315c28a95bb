package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"
)

// logging is what the flags say about the log, which goes to standard error.
type logging struct {
	verbosity int
	format    string
}

func rootCommand() *cobra.Command {
	var l logging
	root := runCommand()
	root.Use = "signalbox"
	root.Short = "Make Kubernetes Services work on this node, in the place of kube-proxy"
	root.SilenceUsage = true
	root.SilenceErrors = true
	root.PersistentFlags().IntVarP(&l.verbosity, "v", "v", 0, "how much is logged: 0 for what an operator acts on, 2 and above for every sync too")
	root.PersistentFlags().StringVar(&l.format, "logging-format", "text", "text or json")
	root.PersistentPreRunE = func(*cobra.Command, []string) error { return l.install() }
	root.CompletionOptions.HiddenDefaultCmd = true
	run := runCommand()
	root.AddCommand(run, renderCommand(), cleanupCommand(), demoCommand(), versionCommand())
	return root
}

// install makes the log what the flags ask for. slog has one level below Info;
// kube-proxy's numbers are folded onto the two.
func (l *logging) install() error {
	opts := &slog.HandlerOptions{Level: slog.LevelInfo}
	if l.verbosity >= 2 {
		opts.Level = slog.LevelDebug
	}
	switch l.format {
	case "text":
		slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, opts)))
	case "json":
		slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, opts)))
	default:
		return fmt.Errorf("--logging-format=%s: neither text nor json", l.format)
	}
	return nil
}
