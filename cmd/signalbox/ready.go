package main

import (
	"github.com/spf13/cobra"

	"signalbox/daemon"
)

func readyCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ready",
		Short: "Say whether the signalbox of this container serves the node",
		Long: `Ends with 0 when a signalbox of this container (PID namespace) has put all
Services into the kernel and no earlier signalbox writes there any more, else
with 1 and the reason. For a startupProbe: while two run on a node, /healthz is
answered by the earlier one. It needs no privileges and no configuration.`,
		Args: noArguments,
		RunE: func(*cobra.Command, []string) error { return daemon.Ready() },
	}
}
