package main

import (
	"log/slog"

	"github.com/spf13/cobra"

	"signalbox/config"
	"signalbox/daemon"
)

func runCommand() *cobra.Command {
	var flags config.Flags
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Serve Services until told to stop (the default command)",
		Long: `Watches Services and EndpointSlices and makes the Services' virtual IPs work on
this node. It stays in the foreground and ends on SIGTERM or SIGINT, leaving
the rules in the kernel: connections go on, also while it is away.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := flags.Config()
			if err != nil {
				return err
			}
			cfg.Flags, cfg.Logging = flags.Values(), cfg.Logging.Adjustable()
			installLog(cfg.Logging)
			if cfg.WriteTo != "" {
				return config.Write(cfg.WriteTo, cfg.KubeProxy)
			}
			if cfg.Cleanup {
				return cleanup(false)
			}
			return daemon.Run(cmd.Context(), cfg, slog.Default())
		},
	}
	addFlags(cmd, &flags)
	return cmd
}
