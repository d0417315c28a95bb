// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"fmt"
	"slices"
	"strings"

	"signalbox/internal/netlab"
	"signalbox/modes"
)

// Proxy is a service proxy as a command line. In its arguments, {kubeconfig}, {source},
// {node} and {cluster-cidr} stand for what the lab provides.
type Proxy struct {
	// Program is what the proxy is called in reports, and Mode its mode. Variant is a flag
	// that it has besides, if any.
	Program, Mode, Variant string
	Command                []string
	// Tools is the variant of the iptables tools that the plain names are: nft, legacy,
	// or nothing for the system's.
	Tools string
}

// Name is the program and its mode in one word.
func (p Proxy) Name() string {
	if p.Mode == "" {
		return p.Program
	}
	return p.Program + "-" + p.Mode
}

// With is the proxy with one more flag.
func (p Proxy) With(flag string) Proxy {
	p.Variant, p.Command = flag, append(slices.Clone(p.Command), flag)
	return p
}

// Args is the command line with what stands for the lab filled in. source is the directory
// of manifests.
func (p Proxy) Args(kubeconfig, source string) []string {
	replace := strings.NewReplacer("{kubeconfig}", kubeconfig, "{source}", source, "{node}", "node1",
		"{cluster-cidr}", netlab.PodNetwork.V4.String()+","+netlab.PodNetwork.V6.String())
	args := make([]string, len(p.Command))
	for i, a := range p.Command {
		args[i] = replace.Replace(a)
	}
	return args
}

// KubeProxyModes are the names that KubeProxy accepts. Those of iptables also name the
// variant of the tools.
var KubeProxyModes = []string{"nftables", "iptables-nft", "iptables-legacy", "ipvs"}

// Modes are the names that Signalbox accepts: the modes of signalbox, where that of
// iptables also names the variant of the tools.
var Modes = modeNames()

func modeNames() (names []string) {
	for _, m := range modes.All {
		if m.Name() == "iptables" {
			names = append(names, m.Name()+"-nft", m.Name()+"-legacy")
		} else {
			names = append(names, m.Name())
		}
	}
	return names
}

// SignalboxProgram is the Program of Signalbox.
const SignalboxProgram = "signalbox"

// The arguments that say where signalbox has its objects from.
const (
	FromAPIServer = "--kubeconfig={kubeconfig}"
	FromDirectory = "--source={source}"
)

// Signalbox is signalbox in a mode of Modes, with its objects from an API server or a
// directory.
func Signalbox(binary, mode, from string) Proxy {
	name, variant, _ := strings.Cut(mode, "-")
	return Proxy{Program: SignalboxProgram, Mode: mode, Tools: variant, Command: []string{
		binary, from, "--hostname-override={node}", "--mode=" + name, "--cluster-cidr={cluster-cidr}",
	}}
}

// KubeProxy is kube-proxy in a mode of KubeProxyModes. It leaves kernel settings alone that a
// network namespace may not change.
func KubeProxy(binary, mode string) Proxy {
	name, variant, _ := strings.Cut(mode, "-")
	return Proxy{Program: "kube-proxy", Mode: mode, Tools: variant, Command: []string{
		binary, FromAPIServer, "--hostname-override={node}", "--proxy-mode=" + name, "--cluster-cidr={cluster-cidr}",
		"--detect-local-mode=ClusterCIDR", "--conntrack-max-per-core=0", "--conntrack-min=0",
		"--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0",
		"--nodeport-addresses=primary", "--oom-score-adj=0",
	}}
}

// CheckModes says which of the names that a flag was given is no mode.
func CheckModes(flag string, names, modes []string) error {
	for _, name := range names {
		if !slices.Contains(modes, name) {
			return fmt.Errorf("%s=%s: not one of %s", flag, name, strings.Join(modes, ", "))
		}
	}
	return nil
}
