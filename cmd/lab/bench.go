package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"signalbox/cmd/lab/internal/bench"
	"signalbox/internal/cluster"
	"signalbox/internal/testbed"
)

// benchFlags are what `lab bench` is told.
type benchFlags struct {
	signalbox, out, document string
	modes, kubeProxyModes    []string
	families, sizes          []string
	against                  []string
	kubeProxy                bool
	endpoints                int
}

func benchCommand() *cobra.Command {
	var flags benchFlags
	var cfg bench.Config
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure signalbox beside kube-proxy, or beside any other service proxy",
		Long: `Builds a lab of network namespaces for each proxy and runs the proxy on its node. The
proxies follow one real kube-apiserver and take turns. The first run builds Kubernetes,
which takes up to half an hour; run it inside the repository, as root.

It measures starts, restarts, single changes, a storm of changes, processor time, memory
and connections. The report has a table, the ratio to kube-proxy and to what no proxy can
avoid, and charts.

Another proxy is a command line for --against. {kubeconfig}, {node} and {cluster-cidr}
stand for what the lab provides:

  lab bench --against 'my-proxy --kubeconfig={kubeconfig} --hostname-override={node}'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			cfg.Log = func(format string, args ...any) { fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", args...) }
			if cfg.Families, err = familiesNamed(flags.families); err != nil {
				return err
			}
			if cfg.Sizes, err = benchSizes(flags.sizes, flags.endpoints); err != nil {
				return err
			}
			if cfg.Proxies, err = benchProxies(cmd, &flags, cfg.Log); err != nil {
				return err
			}
			report, err := bench.Run(cmd.Context(), cfg)
			if len(report.Sizes) == 0 {
				return err
			}
			if err := errors.Join(err, report.Write(flags.out)); err != nil || flags.document == "" {
				return err
			}
			charts, err := filepath.Rel(filepath.Dir(flags.document), flags.out)
			if err != nil {
				return err
			}
			return report.Embed(flags.document, filepath.ToSlash(charts))
		},
	}
	fs := cmd.Flags()
	addSignalboxFlag(fs, &flags.signalbox)
	fs.StringSliceVar(&flags.modes, "mode", []string{"nftables", "iptables-nft", "iptables-legacy"}, "signalbox's modes: "+strings.Join(testbed.Modes, ", "))
	fs.BoolVar(&flags.kubeProxy, "kube-proxy", false, "also measure kube-proxy, which is built when it is missing")
	fs.StringSliceVar(&flags.kubeProxyModes, "kube-proxy-mode", []string{"nftables", "iptables-legacy"}, "kube-proxy's modes, with the same names")
	fs.StringArrayVar(&flags.against, "against", nil, "also measure the proxy with this command line; can be given several times")
	fs.StringSliceVar(&flags.families, "family", []string{"IPv4"}, "IPv4, IPv6 or both")
	fs.StringSliceVar(&flags.sizes, "services", []string{"1000", "10000"}, "numbers of Services; 5000x50 has 50 endpoints for each instead of --endpoints")
	fs.IntVar(&flags.endpoints, "endpoints", 10, "endpoints of each Service")
	fs.IntVar(&cfg.Rounds, "rounds", 3, "how often each proxy is measured at each size")
	fs.IntVar(&cfg.Moves, "moves", 20, "how often an endpoint moves in one round")
	fs.StringVar(&flags.out, "out", "bench", "the directory for report.md, report.json and the charts")
	fs.StringVar(&flags.document, "document", "", "also write the report into this Markdown file, between its two marks")
	return cmd
}

// benchSizes reads sizes such as 1000 and 5000x50.
func benchSizes(texts []string, endpoints int) (sizes []bench.Size, err error) {
	for _, text := range texts {
		size := bench.Size{Endpoints: endpoints}
		services, perService, both := strings.Cut(text, "x")
		if size.Services, err = strconv.Atoi(services); err == nil && both {
			size.Endpoints, err = strconv.Atoi(perService)
		}
		if err != nil || size.Services < 1 || size.Services > bench.MaxServices || size.Endpoints < 1 {
			return nil, fmt.Errorf("--services=%s: want a number of Services from 1 to %d, or such a number, x, and the endpoints of each", text, bench.MaxServices)
		}
		sizes = append(sizes, size)
	}
	return sizes, nil
}

func benchProxies(cmd *cobra.Command, flags *benchFlags, log func(string, ...any)) ([]testbed.Proxy, error) {
	binary, err := findSignalbox(flags.signalbox)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(testbed.CheckModes("--mode", flags.modes), testbed.CheckModes("--kube-proxy-mode", flags.kubeProxyModes)); err != nil {
		return nil, err
	}
	var proxies []testbed.Proxy
	for _, mode := range flags.modes {
		proxies = append(proxies, testbed.Signalbox(binary, mode))
	}
	if flags.kubeProxy {
		programs, err := cluster.Build(cmd.Context(), log)
		if err != nil {
			return nil, err
		}
		for _, mode := range flags.kubeProxyModes {
			proxies = append(proxies, testbed.KubeProxy(programs.KubeProxy, mode))
		}
	}
	for i, line := range flags.against {
		words := strings.Fields(line)
		if len(words) == 0 {
			return nil, errors.New("--against names no program")
		}
		proxies = append(proxies, testbed.Proxy{Program: filepath.Base(words[0]), Mode: fmt.Sprintf("other-%d", i+1), Command: words})
	}
	return proxies, nil
}
