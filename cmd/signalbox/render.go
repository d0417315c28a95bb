// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/spf13/cobra"

	"signalbox/config"
	"signalbox/daemon"
	"signalbox/modes"
)

func renderCommand() *cobra.Command {
	var flags config.Flags
	var nodeAddresses []string
	cmd := &cobra.Command{
		Use:   "render --source DIR --mode MODE",
		Short: "Print the rules that a mode would write for the manifests of a directory",
		Long: `Prints what "run" would write into the kernel for the manifests of a directory.
It writes nothing and needs no privileges. The same manifests give the same text
on every machine. IPv4 comes first, then IPv6, each below a line with its name.
Text for nf_tables is for reading only: nft cannot load all of it, because the
daemon talks to the kernel directly.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := flags.Config()
			if err != nil {
				return err
			}
			installLog(cfg)
			addrs, err := parseAddrs(nodeAddresses)
			if err != nil {
				return err
			}
			if cfg.SourceDir == "" || cfg.Mode == modes.Auto {
				return errors.New("render needs --source and a --mode other than auto: it does not look at this machine")
			}
			mode, err := modes.Named(cfg.Mode)
			if err != nil {
				return err
			}
			plans, err := daemon.Plans(cmd.Context(), cfg, mode, addrs)
			if err != nil {
				return err
			}
			for _, plan := range plans {
				text, err := mode.Render(cfg.Options(mode, plan.Family), plan)
				if err != nil {
					return fmt.Errorf("rendering %s for %s: %w", mode.Name(), plan.Family, err)
				}
				fmt.Fprintf(cmd.OutOrStdout(), "# %s\n%s\n", plan.Family, text)
			}
			return nil
		},
	}
	addFlags(cmd, &flags)
	cmd.Flags().StringSliceVar(&nodeAddresses, "node-addresses", nil, "addresses of the node's interfaces, from which --nodeport-addresses selects")
	return cmd
}

func parseAddrs(texts []string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, fmt.Errorf("--node-addresses: %w", err)
		}
		out = append(out, a)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out, nil
}
