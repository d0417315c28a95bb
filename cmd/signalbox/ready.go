// SPDX-License-Identifier: Apache-2.0

package main

import (
	"github.com/spf13/cobra"

	"signalbox/config"
	"signalbox/daemon/nodelock"
)

func readyCommand() *cobra.Command {
	var runDir string
	cmd := &cobra.Command{
		Use:   "ready",
		Short: "Check whether the signalbox of this container serves the node",
		Long: `Exits with 0 if a signalbox of this container (PID namespace) has written all
Services into the kernel and no earlier signalbox writes there any more.
Otherwise it prints the reason and exits with 1. Use it as a startupProbe: while
two run on a node, the earlier one answers /healthz. It needs no privileges, and
only --run-dir if the process has another than the default.

It prints one line for each thing that is missing: a manifest of --source that
cannot be used, or the Node object. These do not change the exit code, because
the node serves everything else.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			conditions, err := nodelock.Ready(runDir)
			for _, line := range conditions {
				cmd.Print("ready, but ", line)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&runDir, "run-dir", config.DefaultRunDir, "directory of the node lock")
	return cmd
}
