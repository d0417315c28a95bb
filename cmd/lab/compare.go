// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"signalbox/cmd/lab/internal/compare"
	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
)

func compareCommand() *cobra.Command {
	var cfg compare.Config
	var signalbox, replay, objects, node string
	var random int
	var seed uint64
	cmd := &cobra.Command{
		Use:   "compare",
		Short: "Run kube-proxy and signalbox side by side, and list the connections that differ",
		Long: `Builds two equal labs of network namespaces, kube-proxy in one and signalbox in the
other. Both follow one kube-apiserver. Every client of a lab (Pods, nodes, outside
hosts) connects to every address, port and protocol of each Service, also to those
that must not answer, and to its health check node port. The report lists the
connections with different outcomes: the deliberate ones with their reasons, all
others with their objects. It fails if there are others, and writes each of their
cases to a file for --replay.

It needs root and Go. The first run builds etcd, kube-apiserver and kube-proxy, which
takes minutes. With --kubernetes it needs no Go.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if cfg.Signalbox, err = findSignalbox(signalbox); err != nil {
				return err
			}
			if err := compareModes(&cfg); err != nil {
				return err
			}
			began := time.Now()
			cfg.Progress = func(format string, args ...any) {
				fmt.Fprintf(cmd.ErrOrStderr(), "%6.1fs %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
			}
			switch {
			case replay != "":
				cfg.Cases, err = replayed(replay)
			case objects != "":
				cfg.Cases, err = dumped(objects, node, cfg.Progress)
			default:
				cfg.Cases, err = compare.Generate(seed, random, netlab.SCTP() == nil)
			}
			if err != nil {
				return err
			}
			return compare.Run(cmd.Context(), cfg, cmd.OutOrStdout())
		},
	}
	fs := cmd.Flags()
	addSignalboxFlag(fs, &signalbox)
	fs.StringVar(&cfg.Mode, "mode", "nftables", "signalbox's mode: "+strings.Join(testbed.Modes, ", "))
	fs.StringVar(&cfg.KubeProxyMode, "kube-proxy-mode", "", "kube-proxy's mode (default: the same, or iptables-nft where kube-proxy has no such mode)")
	fs.IntVar(&random, "random", 100, "number of random Services")
	fs.Uint64Var(&seed, "seed", 1, "seed of the random Services: the same seed makes the same Services")
	fs.StringVar(&objects, "objects", "", "Services of a cluster instead of random ones, as written by: kubectl get services,endpointslices,nodes -A -o yaml")
	fs.StringVar(&node, "node", "", "the Node of --objects whose proxy is compared (default: the first)")
	fs.StringVar(&replay, "replay", "", "a case that an earlier run has written")
	fs.StringVar(&cfg.Kubernetes, "kubernetes", "", "directory with etcd, kube-apiserver and kube-proxy (default: they are built)")
	fs.StringVar(&cfg.OutDir, "out", ".", "directory for failing cases")
	fs.BoolVar(&cfg.Verbose, "verbose", false, "also show each step, and differences that a repetition does not show")
	return cmd
}

func compareModes(cfg *compare.Config) error {
	if cfg.KubeProxyMode == "" {
		cfg.KubeProxyMode = cfg.Mode
		if !slices.Contains(testbed.KubeProxyModes, cfg.Mode) {
			cfg.KubeProxyMode = "iptables-nft"
		}
	}
	return checkModes([]string{cfg.Mode}, []string{cfg.KubeProxyMode})
}

func dumped(path, node string, note func(string, ...any)) ([]compare.Case, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cases, notes, err := compare.Dump(f, node)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, n := range notes {
		note("%s", n)
	}
	return cases, nil
}

func replayed(path string) ([]compare.Case, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c, err := compare.ReadCase(f, "replayed")
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return []compare.Case{c}, nil
}
