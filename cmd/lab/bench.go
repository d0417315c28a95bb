// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"signalbox/cmd/lab/internal/bench"
	"signalbox/internal/cluster"
	"signalbox/internal/testbed"
)

// benchFlags are what `lab bench` is told.
type benchFlags struct {
	signalbox, out, document string
	source, maxCPU           string
	modes, kubeProxyModes    []string
	families, sizes          []string
	against                  []string
	kubeProxy, haproxy       bool
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

With --source=directory the objects are manifests in a directory. This is quick, needs no
Kubernetes, and measures signalbox alone.

Another proxy is a command line for --against. {kubeconfig}, {source} (the directory),
{node} and {cluster-cidr} stand for what the lab provides:

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
			cfg.Directory = flags.source == sourceDirectory
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
	fs.StringSliceVar(&flags.modes, "mode", []string{"nftables"}, "signalbox's modes: "+strings.Join(testbed.Modes, ", "))
	fs.BoolVar(&flags.kubeProxy, "kube-proxy", false, "also measure kube-proxy, which is built when it is missing")
	fs.StringSliceVar(&flags.kubeProxyModes, "kube-proxy-mode", []string{"nftables"}, "kube-proxy's modes: "+strings.Join(testbed.KubeProxyModes, ", "))
	fs.StringVar(&flags.maxCPU, "max-cpu", "", "also measure the first of signalbox's modes with this --max-cpu, for example 2%: what the limit costs in a storm")
	fs.BoolVar(&flags.haproxy, "haproxy", false, "also measure connections through haproxy in tcp mode, to compare --mode=userspace with; haproxy is installed when it is missing")
	fs.StringArrayVar(&flags.against, "against", nil, "also measure the proxy with this command line; can be given several times")
	fs.StringVar(&flags.source, "source", sourceAPIServer, "where the proxies have the objects from: apiserver, or directory")
	fs.StringSliceVar(&flags.families, "family", nil, "only IPv4 or IPv6 (default: both)")
	fs.StringSliceVar(&flags.sizes, "services", []string{"1000", "10000"}, "numbers of Services; 5000x50 has 50 endpoints for each instead of --endpoints")
	fs.IntVar(&flags.endpoints, "endpoints", 10, "endpoints of each Service")
	fs.IntVar(&cfg.Rounds, "rounds", 3, "how often each proxy is measured at each size, at most")
	fs.DurationVar(&cfg.Time, "time", 15*time.Minute, "begin no further round that would make the run longer, without building; each size has one round at least")
	fs.IntVar(&cfg.Moves, "moves", 20, "how often an endpoint moves in one round, at most; a slow proxy gets fewer moves")
	fs.BoolVar(&cfg.Short, "short", false, "make every part short: it shows that everything works, but the figures say little")
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

// The values of --source.
const (
	sourceAPIServer = "apiserver"
	sourceDirectory = "directory"
)

// benchSource is signalbox's argument for the source.
func benchSource(flags *benchFlags) (string, error) {
	switch {
	case flags.source == sourceAPIServer:
		return testbed.FromAPIServer, nil
	case flags.source != sourceDirectory:
		return "", fmt.Errorf("--source=%s: neither %s nor %s", flags.source, sourceAPIServer, sourceDirectory)
	case flags.kubeProxy:
		return "", errors.New("--source=directory: kube-proxy reads from an API server only; leave out --kube-proxy, or measure with --source=apiserver")
	}
	for _, line := range flags.against {
		if strings.Contains(line, "{kubeconfig}") {
			return "", fmt.Errorf("--source=directory: there is no kubeconfig for --against '%s'; {source} is the directory", line)
		}
	}
	return testbed.FromDirectory, nil
}

func benchProxies(cmd *cobra.Command, flags *benchFlags, log func(string, ...any)) ([]testbed.Proxy, error) {
	binary, err := findSignalbox(flags.signalbox)
	if err != nil {
		return nil, err
	}
	if err := checkModes(flags.modes, flags.kubeProxyModes); err != nil {
		return nil, err
	}
	from, err := benchSource(flags)
	if err != nil {
		return nil, err
	}
	var proxies []testbed.Proxy
	for _, mode := range flags.modes {
		proxies = append(proxies, testbed.Signalbox(binary, mode, from))
	}
	if flags.maxCPU != "" && len(proxies) > 0 {
		proxies = append(proxies, proxies[0].With("--max-cpu="+flags.maxCPU))
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
	if flags.haproxy {
		path, err := findHAProxy(cmd.Context())
		if err != nil {
			return nil, err
		}
		proxies = append(proxies, bench.HAProxy(path))
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

// findHAProxy installs haproxy where it is missing.
func findHAProxy(ctx context.Context) (string, error) {
	if path, err := exec.LookPath("haproxy"); err == nil {
		return path, nil
	}
	root, err := cluster.RootDir(ctx)
	if err != nil {
		return "", err
	}
	install := exec.CommandContext(ctx, filepath.Join(root, "hack", "deps.sh"), "haproxy")
	install.Stderr = os.Stderr
	if err := install.Run(); err != nil {
		return "", fmt.Errorf("--haproxy: install it: %w", err)
	}
	return exec.LookPath("haproxy")
}
