// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"

	"signalbox/config"
	"signalbox/daemon"
)

func runCommand() *cobra.Command {
	var flags config.Flags
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Serve Services until SIGTERM or SIGINT (the default command)",
		Long: `Watches Services and EndpointSlices, and makes the Services' virtual IPs work on
this node. It stays in the foreground and exits on SIGTERM or SIGINT. The rules
stay in the kernel, so connections go on without it.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := flags.Config()
			if err != nil {
				return err
			}
			return run(cmd.Context(), cfg, &flags)
		},
	}
	addFlags(cmd, &flags)
	return cmd
}

func run(ctx context.Context, cfg *config.Config, flags *config.Flags) error {
	logger := func(cfg *config.Config) *slog.Logger {
		cfg.Flags, cfg.Logging = flags.Values(), cfg.Logging.Adjustable()
		return installLog(cfg)
	}
	log := logger(cfg)
	if do, left := chosenAction(cfg, log); do != nil {
		if len(left) > 0 {
			log.Warn("only the first of several actions is done, as in kube-proxy; run signalbox again for the others", "left", strings.Join(left, " "))
		}
		return do()
	}
	changes := make(chan daemon.Change)
	go flags.Watch(ctx, log, func(changed *config.Config, err error) {
		select {
		case changes <- daemon.Change{Config: changed, Err: err}:
		case <-ctx.Done():
		}
	})
	return daemon.RunChanging(ctx, cfg, changes, logger)
}

// chosenAction is what a configuration asks for instead of serving, nil for
// nothing; left are the flags of others that it asks for, too. The order is
// kube-proxy's.
func chosenAction(cfg *config.Config, log *slog.Logger) (do func() error, left []string) {
	for _, a := range []struct {
		flag  string
		asked bool
		do    func() error
	}{
		{"--write-config-to", cfg.WriteTo != "", func() error { return writeConfig(cfg, log) }},
		{"--cleanup", cfg.Cleanup, func() error { return cleanup(false, func(text string) { log.Info(text) }) }},
		{"--init-only", cfg.InitOnly, func() error { return initOnly(cfg, log) }},
	} {
		switch {
		case !a.asked:
		case do == nil:
			do = a.do
		default:
			left = append(left, a.flag)
		}
	}
	return do, left
}

func writeConfig(cfg *config.Config, log *slog.Logger) error {
	if err := config.Write(cfg.WriteTo, cfg.KubeProxy); err != nil {
		return err
	}
	log.Info("wrote the configuration", "file", cfg.WriteTo)
	return nil
}

func initOnly(cfg *config.Config, log *slog.Logger) error {
	if err := daemon.Init(cfg, log); err != nil {
		return fmt.Errorf("--init-only: %w", err)
	}
	log.Info("the kernel settings are written")
	return nil
}
