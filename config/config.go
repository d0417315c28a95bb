// Package config turns signalbox's command line into one validated Config.
// Nothing here asks the kernel or the network, but for the host name: the same
// words give the same Config.
package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	kubeproxyconfigv1alpha1 "k8s.io/kube-proxy/config/v1alpha1"
	"k8s.io/utils/ptr"

	"signalbox/node"
	"signalbox/proxier"
)

// The values of --mode.
const (
	ModeAuto     = "auto"
	ModeNFTables = "nftables"
	ModeIPTables = "iptables"
	ModeIPVS     = "ipvs"
)

// Modes lists what --mode takes.
var Modes = []string{ModeAuto, ModeNFTables, ModeIPTables, ModeIPVS}

// Config is what an operator decided.
type Config struct {
	// Mode is one of Modes; ModeAuto takes the first mode that works here.
	Mode string
	// NodeName is the name that this node's Node object and its endpoints
	// carry: trimmed and lower-cased, never empty.
	NodeName string

	// SourceDir serves the manifests of a directory; the API server is not
	// asked then. The empty string means the API server.
	SourceDir string
	// Kubeconfig and Master say where the API server is; both empty means the
	// Pod's own service account.
	Kubeconfig, Master string
	// QPS and Burst bound the requests to the API server.
	QPS   float32
	Burst int

	// MasqueradeMark is the packet mark's bit for source rewriting.
	MasqueradeMark uint32
	// IPVS is for ModeIPVS alone.
	IPVS     proxier.IPVSTuning
	Settings proxier.Settings

	// BindAddress, unless it is unspecified (0.0.0.0 or ::), is this node's own
	// address of its family, whatever the Node object says. Nothing listens
	// there.
	BindAddress netip.Addr
	// HealthzBindAddress and MetricsBindAddress are where the two servers
	// listen; an invalid one means that there is none.
	HealthzBindAddress, MetricsBindAddress netip.AddrPort
	// BindAddressHardFail ends the process where one of the two cannot listen.
	BindAddressHardFail bool
	// EnableProfiling serves pprof beside the metrics.
	EnableProfiling bool
	// SyncPeriod is how long an update may wait before health calls it late,
	// and the longest wait before what failed is tried again.
	SyncPeriod time.Duration
	// MinSyncPeriod is the least time between two syncs; 0 for none.
	MinSyncPeriod time.Duration
	// ConfigSyncPeriod is accepted and has no effect: watches miss nothing.
	ConfigSyncPeriod time.Duration

	Conntrack node.Conntrack
	// OOMScoreAdj is this process's own, -1000 to 1000; nil leaves it.
	OOMScoreAdj *int32
	// Cleanup removes what is in the kernel and ends.
	Cleanup bool
	// InitOnly does what needs all privileges, the kernel settings, and ends.
	InitOnly bool

	// KubeProxy is what is in force in kube-proxy's own form, for /configz:
	// the file or the flags, with every default filled in. It is to be read
	// only.
	KubeProxy *kubeproxyconfigv1alpha1.KubeProxyConfiguration

	// Warnings are about settings that are accepted but do not do what their
	// words suggest.
	Warnings []string
}

// Flags are the words of the command line, before they are checked. Names and
// meaning are kube-proxy's; --mode and --source are signalbox's own.
type Flags struct {
	mode, proxyMode        string
	hostnameOverride       string
	source                 string
	kubeconfig, master     string
	qps                    float32
	burst                  int
	masqueradeBit          int
	masqueradeAll          bool
	localhostNodePorts     bool
	minSyncPeriod          time.Duration
	clusterCIDR            string
	detectLocalMode        string
	podBridgeInterface     string
	podInterfaceNamePrefix string
	nodePortAddresses      []string
	ipvs                   proxier.IPVSTuning
}

// Add registers the flags with their defaults.
func (f *Flags) Add(fs *pflag.FlagSet) {
	fs.StringVar(&f.mode, "mode", ModeAuto, "how Services are served: "+strings.Join(Modes, ", ")+"; auto takes the first of nftables and iptables that works on this node")
	fs.StringVar(&f.proxyMode, "proxy-mode", "", "kube-proxy's name for --mode")
	fs.StringVar(&f.hostnameOverride, "hostname-override", "", "the name of this node's Node object (default: the host name, in lower case)")
	fs.StringVar(&f.source, "source", "", "serve the Services, EndpointSlices, Nodes and ServiceCIDRs in the YAML and JSON files of this directory, which is watched, instead of asking an API server")
	fs.StringVar(&f.kubeconfig, "kubeconfig", "", "kubeconfig file with the API server's address and credentials (default: the Pod's service account)")
	fs.StringVar(&f.master, "master", "", "address of the API server; wins over the kubeconfig's")
	fs.Float32Var(&f.qps, "kube-api-qps", 5, "requests a second to the API server")
	fs.IntVar(&f.burst, "kube-api-burst", 10, "requests to the API server that may exceed --kube-api-qps for a moment")
	fs.IntVar(&f.masqueradeBit, "iptables-masquerade-bit", 14, "bit of the packet mark (0 to 31) that asks for the source address to be rewritten, in every mode")
	fs.BoolVar(&f.masqueradeAll, "masquerade-all", false, "rewrite the source address of all traffic to cluster IPs")
	fs.BoolVar(&f.localhostNodePorts, "iptables-localhost-nodeports", true, "iptables mode: serve NodePorts on 127.0.0.1 too")
	fs.DurationVar(&f.minSyncPeriod, "iptables-min-sync-period", 0, "least time between two syncs, in every mode; 0 for none: a lone change never waits")
	fs.StringVar(&f.clusterCIDR, "cluster-cidr", "", "the Pods' address range, or one IPv4 and one IPv6 range with a comma; traffic to cluster IPs from elsewhere is masqueraded")
	fs.StringVar(&f.detectLocalMode, "detect-local-mode", string(proxier.DetectLocalClusterCIDR), "how this node's Pods are told from other traffic: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix")
	fs.StringVar(&f.podBridgeInterface, "pod-bridge-interface", "", "the bridge that Pods are behind (--detect-local-mode=BridgeInterface)")
	fs.StringVar(&f.podInterfaceNamePrefix, "pod-interface-name-prefix", "", "what the names of Pods' interfaces begin with (--detect-local-mode=InterfaceNamePrefix)")
	fs.StringSliceVar(&f.nodePortAddresses, "nodeport-addresses", nil, `serve NodePorts only at local addresses inside these ranges, or only at the Node's own address with the single word "primary" (default: primary in nftables mode, all addresses in iptables mode)`)
	fs.StringVar(&f.ipvs.Scheduler, "ipvs-scheduler", "", "ipvs mode: the kernel's scheduler that chooses endpoints, such as rr, wrr, lc, wlc, sed, nq, sh, dh or mh (default rr)")
	fs.BoolVar(&f.ipvs.StrictARP, "ipvs-strict-arp", false, "ipvs mode: answer ARP only for addresses of the interface that is asked (arp_ignore=1, arp_announce=2)")
	fs.DurationVar(&f.ipvs.TCPTimeout, "ipvs-tcp-timeout", 0, "ipvs mode: how long an idle TCP connection is remembered, in whole seconds; 0 leaves the kernel's value")
	fs.DurationVar(&f.ipvs.TCPFinTimeout, "ipvs-tcpfin-timeout", 0, "ipvs mode: the same for a TCP connection that one side has closed")
	fs.DurationVar(&f.ipvs.UDPTimeout, "ipvs-udp-timeout", 0, "ipvs mode: the same for a UDP flow")
}

// Config checks the flags. Every mistake is in the error, not only the first.
func (f *Flags) Config() (*Config, error) {
	c := &Config{
		Mode: f.mode, SourceDir: f.source, Kubeconfig: f.kubeconfig, Master: f.master,
		QPS: f.qps, Burst: f.burst, MinSyncPeriod: f.minSyncPeriod,
		BindAddress:        netip.IPv4Unspecified(),
		HealthzBindAddress: netip.AddrPortFrom(netip.IPv4Unspecified(), 10256),
		MetricsBindAddress: netip.MustParseAddrPort("127.0.0.1:10249"),
		SyncPeriod:         30 * time.Second,
		ConfigSyncPeriod:   15 * time.Minute,
		Conntrack:          node.Conntrack{MaxPerCore: 32768, Min: 131072, TCPEstablishedTimeout: 24 * time.Hour, TCPCloseWaitTimeout: time.Hour},
		OOMScoreAdj:        ptr.To[int32](-999),
		KubeProxy:          &kubeproxyconfigv1alpha1.KubeProxyConfiguration{},
		Settings: proxier.Settings{
			MasqueradeAll: f.masqueradeAll, LocalhostNodePorts: f.localhostNodePorts,
			DetectLocal:        proxier.DetectLocal(f.detectLocalMode),
			PodBridgeInterface: f.podBridgeInterface, PodInterfaceNamePrefix: f.podInterfaceNamePrefix,
		},
	}
	var wrong []error
	for _, check := range []func(*Config) error{
		f.checkMode, f.checkNodeName, f.checkSource, f.checkNumbers, f.checkClusterCIDR, f.checkDetectLocal, f.checkNodePortAddresses, f.checkIPVS,
	} {
		wrong = append(wrong, check(c))
	}
	if err := errors.Join(wrong...); err != nil {
		return nil, err
	}
	return c, nil
}

func (f *Flags) checkMode(c *Config) error {
	if f.proxyMode != "" {
		if f.mode != ModeAuto && f.mode != f.proxyMode {
			return fmt.Errorf("--mode=%s and --proxy-mode=%s contradict each other: give one of them", f.mode, f.proxyMode)
		}
		c.Mode = f.proxyMode
	}
	if !slices.Contains(Modes, c.Mode) {
		return fmt.Errorf("--mode=%s: there is no such mode; there are %s", c.Mode, strings.Join(Modes, ", "))
	}
	return nil
}

func (f *Flags) checkNodeName(c *Config) (err error) {
	if c.NodeName, err = node.Name(f.hostnameOverride); err != nil {
		return fmt.Errorf("--hostname-override=%q: %w", f.hostnameOverride, err)
	}
	return nil
}

func (f *Flags) checkSource(c *Config) error {
	if f.source == "" {
		return nil
	}
	if f.kubeconfig != "" || f.master != "" {
		return fmt.Errorf("--source=%s contradicts --kubeconfig and --master: objects come from a directory or from an API server, not from both", f.source)
	}
	if info, err := os.Stat(f.source); err == nil && !info.IsDir() {
		return fmt.Errorf("--source=%s: not a directory", f.source)
	}
	return nil
}

func (f *Flags) checkNumbers(c *Config) error {
	var wrong []error
	if f.masqueradeBit < 0 || f.masqueradeBit > 31 {
		wrong = append(wrong, fmt.Errorf("--iptables-masquerade-bit=%d: the packet mark has the bits 0 to 31", f.masqueradeBit))
	} else {
		c.MasqueradeMark = 1 << f.masqueradeBit
	}
	if f.burst < 0 {
		wrong = append(wrong, fmt.Errorf("--kube-api-burst=%d: must not be negative", f.burst))
	}
	if f.minSyncPeriod < 0 {
		wrong = append(wrong, fmt.Errorf("--iptables-min-sync-period=%v: must not be negative", f.minSyncPeriod))
	}
	return errors.Join(wrong...)
}

func (f *Flags) checkClusterCIDR(c *Config) error {
	if strings.TrimSpace(f.clusterCIDR) == "" {
		return nil
	}
	prefixes, err := parsePrefixes("--cluster-cidr", strings.Split(f.clusterCIDR, ","))
	if err != nil {
		return err
	}
	if len(prefixes) > 2 || len(prefixes) == 2 && prefixes[0].Addr().Is4() == prefixes[1].Addr().Is4() {
		return fmt.Errorf("--cluster-cidr=%s: at most one range of each IP family", f.clusterCIDR)
	}
	c.Settings.ClusterCIDRs = prefixes
	return nil
}

func (f *Flags) checkDetectLocal(c *Config) error {
	s := &c.Settings
	needs := map[proxier.DetectLocal]struct{ flag, value string }{
		proxier.DetectLocalClusterCIDR:         {},
		proxier.DetectLocalNodeCIDR:            {},
		proxier.DetectLocalBridgeInterface:     {"--pod-bridge-interface", f.podBridgeInterface},
		proxier.DetectLocalInterfaceNamePrefix: {"--pod-interface-name-prefix", f.podInterfaceNamePrefix},
	}
	need, known := needs[s.DetectLocal]
	switch {
	case !known:
		return fmt.Errorf("--detect-local-mode=%s: not one of ClusterCIDR, NodeCIDR, BridgeInterface and InterfaceNamePrefix", s.DetectLocal)
	case need.flag != "" && need.value == "":
		return fmt.Errorf("--detect-local-mode=%s needs %s", s.DetectLocal, need.flag)
	case strings.ContainsAny(need.value, "/ \t\n"):
		return fmt.Errorf("%s=%q: not the name of an interface", need.flag, need.value)
	case len(need.value) > 15:
		return fmt.Errorf("%s=%s: the kernel's interface names have at most 15 characters", need.flag, need.value)
	case s.DetectLocal == proxier.DetectLocalClusterCIDR && f.clusterCIDR == "":
		c.Warnings = append(c.Warnings, "--cluster-cidr is not given: Pods cannot be told from other traffic, so nothing sent to a cluster IP from outside the cluster is masqueraded")
	}
	for mode, other := range needs {
		if mode != s.DetectLocal && other.value != "" {
			c.Warnings = append(c.Warnings, fmt.Sprintf("%s=%s has no effect with --detect-local-mode=%s", other.flag, other.value, s.DetectLocal))
		}
	}
	return nil
}

func (f *Flags) checkIPVS(c *Config) error {
	c.IPVS = f.ipvs
	var wrong []error
	name := f.ipvs.Scheduler
	if len(name) > 15 || strings.ContainsFunc(name, func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '_' }) {
		wrong = append(wrong, fmt.Errorf("--ipvs-scheduler=%s: not a name of a scheduler: at most 15 lower-case letters, digits and underscores", name))
	}
	for _, t := range []struct {
		flag string
		time time.Duration
	}{{"tcp", f.ipvs.TCPTimeout}, {"tcpfin", f.ipvs.TCPFinTimeout}, {"udp", f.ipvs.UDPTimeout}} {
		if t.time < 0 || t.time%time.Second != 0 {
			wrong = append(wrong, fmt.Errorf("--ipvs-%s-timeout=%v: must be whole seconds and not negative", t.flag, t.time))
		}
	}
	if set := f.ipvs != (proxier.IPVSTuning{}); set && c.Mode != ModeIPVS {
		c.Warnings = append(c.Warnings, "the --ipvs flags have no effect without --mode=ipvs")
	}
	return errors.Join(wrong...)
}

// Primary is the word that --nodeport-addresses takes instead of ranges.
const Primary = "primary"

func (f *Flags) checkNodePortAddresses(c *Config) error {
	if slices.Contains(f.nodePortAddresses, Primary) {
		if len(f.nodePortAddresses) > 1 {
			return fmt.Errorf("--nodeport-addresses=%s: %q stands alone or not at all", strings.Join(f.nodePortAddresses, ","), Primary)
		}
		c.Settings.NodePortAddresses.Primary = true
		return nil
	}
	prefixes, err := parsePrefixes("--nodeport-addresses", f.nodePortAddresses)
	c.Settings.NodePortAddresses.CIDRs = prefixes
	return err
}

func parsePrefixes(flag string, texts []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	var wrong []error
	for _, text := range texts {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil {
			wrong = append(wrong, fmt.Errorf("%s: %q is not a CIDR such as 10.0.0.0/8 or fd00::/48", flag, text))
			continue
		}
		out = append(out, p.Masked())
	}
	return out, errors.Join(wrong...)
}

// ForMode returns the settings as the mode, once it is known, reads them:
// nftables mode serves NodePorts at the Node's own address alone unless told
// otherwise, as kube-proxy does since 1.31.
func (c *Config) ForMode(mode string) proxier.Settings {
	s := c.Settings
	if mode == ModeNFTables {
		if len(s.NodePortAddresses.CIDRs) == 0 {
			s.NodePortAddresses.Primary = true
		}
		s.LocalhostNodePorts = false
	}
	return s
}
