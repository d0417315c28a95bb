// SPDX-License-Identifier: Apache-2.0

package main

import "github.com/spf13/cobra"

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "lab",
		Short:         "Run signalbox in a lab of network namespaces on this machine",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(demoCommand(), compareCommand(), benchCommand(), fleetCommand())
	return root
}
