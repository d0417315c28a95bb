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
answered by the earlier one. It needs no privileges and no configuration.

Prints what the signalbox serves without, one line each: manifests of --source
that cannot be used, and a missing Node object. The exit code does not depend on
these: the node serves everything else.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			conditions, err := daemon.Ready()
			for _, line := range conditions {
				cmd.Print("ready, but ", line)
			}
			return err
		},
	}
}
