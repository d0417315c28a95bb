// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	cliflag "k8s.io/component-base/cli/flag"

	"signalbox/config"
)

func rootCommand() *cobra.Command {
	root := runCommand()
	root.Use = "signalbox"
	root.Short = "Make Kubernetes Services work on this node, in place of kube-proxy"
	root.Args = knownCommand
	root.SilenceUsage = true
	root.SilenceErrors = true
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(runCommand(), renderCommand(), explainCommand(), statusCommand(), diffCommand(), traceCommand(), cleanupCommand(), readyCommand(), versionCommand(), licencesCommand())
	return root
}

// noArguments is for commands that have flags alone.
func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return fmt.Errorf("%s takes flags and no arguments, and %q is one: leave it out, or write it as --flag=value (%[1]s --help lists the flags)", cmd.CommandPath(), args[0])
}

// knownCommand is for the root, where an argument was meant to be a command.
func knownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return fmt.Errorf("there is no command %q: %s --help lists them", args[0], cmd.CommandPath())
}

// addFlags gives a command the flags of a configuration, --version among them. They
// are shown in their groups, and after them what else the command has.
func addFlags(cmd *cobra.Command, flags *config.Flags) {
	groups := flags.Groups()
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if asked := flags.Asked(); asked != "" {
			fmt.Fprintln(cmd.OutOrStdout(), versionFor(asked, calledAs(os.Args[0])))
			return nil
		}
		return run(cmd, args)
	}
	cmd.Flags().SetNormalizeFunc(cliflag.WordSepNormalizeFunc)
	flags.Add(cmd.Flags())
	cmd.SetUsageFunc(func(cmd *cobra.Command) error {
		out := cmd.OutOrStderr()
		fmt.Fprintf(out, "Usage:\n  %s\n", cmd.UseLine())
		if cmd.HasAvailableSubCommands() {
			fmt.Fprintf(out, "  %s [command]\n\nCommands:\n", cmd.CommandPath())
		}
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() {
				fmt.Fprintf(out, "  %-10s %s\n", sub.Name(), sub.Short)
			}
		}
		cliflag.PrintSections(out, groups, 0)
		cliflag.PrintSections(out, otherFlags(cmd, groups), 0)
		return nil
	})
}

func otherFlags(cmd *cobra.Command, groups cliflag.NamedFlagSets) (other cliflag.NamedFlagSets) {
	fs := other.FlagSet("other")
	cmd.LocalFlags().VisitAll(func(flag *pflag.Flag) {
		for _, group := range groups.FlagSets {
			if group.Lookup(flag.Name) != nil {
				return
			}
		}
		fs.AddFlag(flag)
	})
	return other
}

// installLog makes the process's log what the configuration asks for.
func installLog(cfg *config.Config) *slog.Logger {
	log := slog.New(cfg.Logging.Handler(os.Stderr))
	slog.SetDefault(log)
	return log
}
