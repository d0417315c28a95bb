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
		Short: "Remove from the kernel what signalbox, or kube-proxy too, has put there",
		Long: `Removes the rules, sets, addresses and virtual servers of every mode of
signalbox, for IPv4 and IPv6, and nothing else: rules of other software stay byte
for byte, and rules that kube-proxy has written since stay too. With
--kube-proxy, what kube-proxy has written in any of its modes goes as well.

It needs root and no API server. A signalbox that runs on the node would write
its rules again, so end it first. Kernel settings and tracked connections stay,
and so does what the kubelet shares: the iptables chains KUBE-FIREWALL,
KUBE-IPTABLES-HINT and KUBE-KUBELET-CANARY. A line for each thing that went says
which mode had written it, and for which IP family. The exit code is 1 if
something is left, and the messages name it.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cleanup(kubeProxy, func(text string) { fmt.Fprintln(cmd.OutOrStdout(), text) })
		},
	}
	cmd.Flags().BoolVar(&kubeProxy, "kube-proxy", false, "remove what kube-proxy has written, too")
	return cmd
}

// cleanup tells what went, or that there was nothing.
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
