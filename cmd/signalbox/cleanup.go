// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"signalbox/daemon"
)

func cleanupCommand() *cobra.Command {
	var kubeProxy bool
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove what signalbox wrote into the kernel, and on request what kube-proxy wrote",
		Long: `Removes the rules, sets, addresses and virtual servers of every mode of
signalbox, for IPv4 and IPv6. It does not touch rules of other software, nor
rules that kube-proxy has written since. With --kube-proxy, it also removes what
kube-proxy wrote in any of its modes.

It needs root and no API server. Stop signalbox on this node first, because a
running one writes its rules again. Kernel settings and tracked connections stay.
The iptables chains that the kubelet shares stay too: KUBE-FIREWALL,
KUBE-IPTABLES-HINT and KUBE-KUBELET-CANARY. One line for each removed thing
names the mode that wrote it and the IP family. The exit code is 1 if something
is left, and the messages name it.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cleanup(kubeProxy, func(text string) { fmt.Fprintln(cmd.OutOrStdout(), text) })
		},
	}
	cmd.Flags().BoolVar(&kubeProxy, "kube-proxy", false, "also remove what kube-proxy wrote")
	return cmd
}

// cleanup reports what was removed, or that there was nothing.
func cleanup(kubeProxy bool, tell func(string)) error {
	removed, err := daemon.Cleanup(kubeProxy)
	for _, what := range removed {
		tell("removed " + what)
	}
	switch {
	case err != nil:
		return fmt.Errorf("cleanup is not complete:\n%w", err)
	case len(removed) == 0 && kubeProxy:
		tell("nothing of signalbox or kube-proxy was there")
	case len(removed) == 0:
		tell("nothing of signalbox was there")
	}
	return nil
}
