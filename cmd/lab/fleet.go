// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"signalbox/cmd/lab/internal/bench"
	"signalbox/internal/testbed"
)

func fleetCommand() *cobra.Command {
	var cfg bench.FleetConfig
	flags := benchFlags{source: sourceAPIServer}
	var size string
	cmd := &cobra.Command{
		Use:   "fleet",
		Short: "Measure what many daemons cost one API server",
		Long: `Starts a real kube-apiserver with Services. At first one node runs signalbox, and with
--kube-proxy also kube-proxy, one after the other. Then fleets of signalbox daemons follow
the API server. These daemons live in this process and have a connection each. They keep
the plan of a node, and write nothing to the kernel.

It measures the API server's processor time, the requests and the bytes of a start and of a
change, and the time until the last daemon has a change. The daemons share the machine with
the API server, so times grow sooner than in a cluster. The first run builds Kubernetes,
which takes up to half an hour; run it inside the repository, as root.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			cfg.Log = func(format string, args ...any) { fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", args...) }
			if cfg.Families, err = familiesNamed(flags.families); err != nil {
				return err
			}
			sizes, err := benchSizes([]string{size}, flags.endpoints)
			if err != nil {
				return err
			}
			cfg.Size = sizes[0]
			for _, n := range cfg.Fleets {
				if n < 1 {
					return fmt.Errorf("--daemons=%d: want at least one", n)
				}
			}
			if cfg.Rate < 1 || cfg.Time <= 0 {
				return errors.New("--rate and --time must be above zero")
			}
			if cfg.Proxies, err = benchProxies(cmd, &flags, cfg.Log); err != nil {
				return err
			}
			report, err := bench.RunFleet(cmd.Context(), cfg)
			if report == nil || len(report.Fleets) == 0 {
				return err
			}
			fmt.Fprint(cmd.OutOrStdout(), report.Markdown())
			if err := errors.Join(err, report.Write(flags.out)); err != nil || flags.document == "" {
				return err
			}
			return report.Embed(flags.document)
		},
	}
	fs := cmd.Flags()
	addSignalboxFlag(fs, &flags.signalbox)
	fs.StringSliceVar(&flags.modes, "mode", []string{"nftables"}, "signalbox's mode on the one node: "+strings.Join(testbed.Modes, ", "))
	fs.BoolVar(&flags.kubeProxy, "kube-proxy", false, "also measure kube-proxy on one node; it is built when it is missing")
	fs.StringSliceVar(&flags.kubeProxyModes, "kube-proxy-mode", []string{"nftables"}, "kube-proxy's modes, with the same names")
	fs.IntSliceVar(&cfg.Fleets, "daemons", []int{1, 50, 100, 200}, "numbers of daemons, one fleet after another")
	fs.StringVar(&size, "services", "1000", "the number of Services; 5000x50 has 50 endpoints for each instead of --endpoints")
	fs.IntVar(&flags.endpoints, "endpoints", 10, "endpoints of each Service")
	fs.StringSliceVar(&flags.families, "family", []string{"IPv4"}, "IPv4, IPv6 or both")
	fs.IntVar(&cfg.Rate, "rate", 10, "changed EndpointSlices in a second")
	fs.DurationVar(&cfg.Time, "time", 20*time.Second, "how long EndpointSlices change")
	fs.StringVar(&flags.out, "out", "bench", "the directory for fleet.json")
	fs.StringVar(&flags.document, "document", "", "also write the report into this Markdown file, between its two marks")
	return cmd
}
