package testbed

import (
	"fmt"
	"slices"
	"strings"

	"signalbox/internal/netlab"
)

// Proxy is a service proxy as a command line. In its arguments, {kubeconfig}, {node} and
// {cluster-cidr} stand for what the lab provides.
type Proxy struct {
	// Program is what the proxy is called in reports, and Mode its mode.
	Program, Mode string
	Command       []string
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

// Args is the command line with what stands for the lab filled in.
func (p Proxy) Args(kubeconfig string) []string {
	replace := strings.NewReplacer("{kubeconfig}", kubeconfig, "{node}", "node1",
		"{cluster-cidr}", netlab.PodNetwork.V4.String()+","+netlab.PodNetwork.V6.String())
	args := make([]string, len(p.Command))
	for i, a := range p.Command {
		args[i] = replace.Replace(a)
	}
	return args
}

// Modes are the names that Signalbox and KubeProxy accept. Those of iptables also name
// the variant of the tools.
var Modes = []string{"nftables", "iptables-nft", "iptables-legacy", "ipvs", "userspace"}

// SignalboxProgram is the Program of Signalbox.
const SignalboxProgram = "signalbox"

// Signalbox is signalbox in a mode of Modes.
func Signalbox(binary, mode string) Proxy {
	name, variant, _ := strings.Cut(mode, "-")
	return Proxy{Program: SignalboxProgram, Mode: mode, Tools: variant, Command: []string{
		binary, "--kubeconfig={kubeconfig}", "--hostname-override={node}", "--mode=" + name, "--cluster-cidr={cluster-cidr}",
	}}
}

// KubeProxy is kube-proxy in a mode of Modes. It leaves kernel settings alone that a
// network namespace may not change.
func KubeProxy(binary, mode string) Proxy {
	name, variant, _ := strings.Cut(mode, "-")
	return Proxy{Program: "kube-proxy", Mode: mode, Tools: variant, Command: []string{
		binary, "--kubeconfig={kubeconfig}", "--hostname-override={node}", "--proxy-mode=" + name, "--cluster-cidr={cluster-cidr}",
		"--detect-local-mode=ClusterCIDR", "--conntrack-max-per-core=0", "--conntrack-min=0",
		"--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0",
		"--nodeport-addresses=primary", "--oom-score-adj=0",
	}}
}

// CheckModes says which of the names that a flag was given is none of Modes.
func CheckModes(flag string, names []string) error {
	for _, name := range names {
		if !slices.Contains(Modes, name) {
			return fmt.Errorf("%s=%s: not one of %s", flag, name, strings.Join(Modes, ", "))
		}
	}
	return nil
}
