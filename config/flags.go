// SPDX-License-Identifier: Apache-2.0

package config

import (
	"crypto/sha256"
	"errors"
	"math"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/kube-proxy/config/v1alpha1"

	"signalbox/modes"
)

// Flags is the command line before validation. Names, defaults and meaning are
// kube-proxy's, except in the group signalbox.
type Flags struct {
	groups cliflag.NamedFlagSets

	// kubeProxy has the flags in kube-proxy's form.
	kubeProxy v1alpha1.KubeProxyConfiguration
	// kube-proxy's form has no fields for these.
	file, writeTo, master    string
	cleanup, initOnly        bool
	healthzPort, metricsPort int32

	signalbox signalboxFlags

	// text is the content of the file when it was last read.
	text []byte
	// kubeconfig is the path of the kubeconfig, and digest that of its content, when they
	// were last read.
	kubeconfig string
	digest     [sha256.Size]byte
	// unread is why Watch could not read a file; empty if it could.
	unread string
}

// signalboxFlags are the settings that kube-proxy does not have. They are not in
// the file, so that kube-proxy can still read it.
type signalboxFlags struct {
	mode                  string
	source                string
	runDir                string
	kubeProxyIPVSPolicies bool
	maxCPU                percent
	externalIPCIDRs       prefixList
	resetRemovedEndpoints bool
	stateDir              string
	statusPage            bool
	version               Version
}

// DefaultRunDir is the default of --run-dir.
const DefaultRunDir = "/run/signalbox"

// The groups of flags, in the order in which help shows them.
const (
	groupSignalbox = "signalbox"
	groupKubeProxy = "kube-proxy"
	groupLogging   = "logging"
)

// Groups registers the flags and returns them in their groups.
func (f *Flags) Groups() cliflag.NamedFlagSets {
	if f.groups.Order == nil {
		f.groups.NormalizeNameFunc = cliflag.WordSepNormalizeFunc
		f.signalbox.add(f.groups.FlagSet(groupSignalbox))
		f.addKubeProxy(f.groups.FlagSet(groupKubeProxy))
		addLogging(&f.kubeProxy.Logging, f.groups.FlagSet(groupLogging))
	}
	return f.groups
}

// Add registers the flags with their defaults.
func (f *Flags) Add(fs *pflag.FlagSet) {
	for _, group := range f.Groups().FlagSets {
		fs.AddFlagSet(group)
	}
}

func (o *signalboxFlags) add(fs *pflag.FlagSet) {
	fs.StringVar(&o.mode, "mode", "", "how Services are served: "+strings.Join(modes.Names(), ", ")+". It overrides --proxy-mode and the mode in --config. auto, the default, uses the first of "+modes.AutomaticNames()+" that works on this node")
	fs.StringVar(&o.source, "source", "", "serve the objects in the YAML and JSON files of this directory, and watch it, instead of asking an API server: Services, EndpointSlices, Nodes and ServiceCIDRs")
	fs.StringVar(&o.runDir, "run-dir", DefaultRunDir, "directory of the node lock and of the local socket for explain, status, diff and trace; no other user may enter it. An empty value means no local socket, and the node lock is an abstract socket only")
	fs.StringVar(&o.stateDir, "state-dir", "", "save the known objects in files of this directory, which only root may enter. If the API server does not answer within 5 s of a start, or lists no objects, they are served until it does. Without the flag, nothing is saved")
	fs.BoolVar(&o.statusPage, "status-page", false, "serve /services on the metrics server: a page for browsers with the Services of this node, their endpoints and reasons. Whoever reaches the server can read it")
	fs.Var(&o.version, "version", "print the version and exit; raw prints all details. With a release such as v1.36.3, kubernetes_build_info reports that release instead of the API server's")
	fs.Lookup("version").NoOptDefVal = "true"
	fs.Var(&o.maxCPU, "max-cpu", "percent of one processor that signalbox and the programs it runs may take on average; 0 means no limit. In a storm of changes, each sync then has more changes and comes later. A lone change never waits")
	fs.Var(&o.externalIPCIDRs, "external-ip-cidrs", "serve spec.externalIPs in these ranges only; other external IPs are left out, with an Event. By default all are served, and whoever may create a Service can take over any address (CVE-2020-8554)")
	fs.BoolVar(&o.resetRemovedEndpoints, "reset-removed-endpoints", false, "once an endpoint has left all EndpointSlices of its Service, answer the next packet of a client's TCP connection to it with a reset. Connections to endpoints that only terminate go on")
	fs.BoolVar(&o.kubeProxyIPVSPolicies, "ipvs-kube-proxy-policies", false, "ipvs mode: apply traffic policies as kube-proxy's ipvs mode does. Policy Local without an endpoint on this node uses endpoints on other nodes, and externalTrafficPolicy also applies to this node's Pods and processes")
}

// percent is a flag of at least 0.1, or 0 for no limit.
type percent float64

func (p *percent) String() string { return strconv.FormatFloat(float64(*p), 'g', -1, 64) }
func (p *percent) Type() string   { return "percent" }

func (p *percent) Set(text string) error {
	v, err := strconv.ParseFloat(strings.TrimSuffix(text, "%"), 64)
	if err != nil || v != 0 && v < 0.1 || math.IsNaN(v) || math.IsInf(v, 0) {
		return errors.New("want a percentage of at least 0.1, or 0 for no limit")
	}
	*p = percent(v)
	return nil
}

// prefixList is a flag of address ranges with commas between them, which can be given
// several times.
type prefixList []netip.Prefix

func (l *prefixList) Type() string { return "CIDRs" }

func (l *prefixList) String() string {
	texts := make([]string, len(*l))
	for i, p := range *l {
		texts[i] = p.String()
	}
	return strings.Join(texts, ",")
}

func (l *prefixList) Set(text string) error {
	list := strings.Split(text, ",")
	if wrong := cidrs(list); wrong != "" {
		return errors.New(wrong)
	}
	*l = append(*l, prefixes(list)...)
	return nil
}

func (f *Flags) addKubeProxy(fs *pflag.FlagSet) {
	k := &f.kubeProxy
	setDefaults(k)
	k.IPVS.MinSyncPeriod = k.IPTables.MinSyncPeriod // the flag's default, and not the file's
	fs.StringVar(&f.file, "config", "", "kube-proxy's configuration file (KubeProxyConfiguration v1alpha1); signalbox watches it. With a file, only these flags of this group count: --hostname-override, --master, --cleanup, --init-only, --write-config-to")
	fs.StringVar(&f.writeTo, "write-config-to", "", "write the resulting configuration with all defaults to this file, and exit")
	fs.BoolVar(&f.cleanup, "cleanup", false, "remove what signalbox wrote into the kernel, and exit")
	fs.BoolVar(&f.initOnly, "init-only", false, "set the kernel settings, which need all privileges, and exit; afterwards signalbox needs only CAP_NET_ADMIN")
	fs.Var(cliflag.NewMapStringBool(&k.FeatureGates), "feature-gates", "Kubernetes feature gates. AllowServiceExternalIPs=false ignores spec.externalIPs. KubeProxyIPVS=false refuses --proxy-mode=ipvs. KubeProxyNFTablesLocalhostNodePorts=false serves no NodePorts on loopback in nftables and userspace mode. Other gates have no effect, and the log names them")

	fs.StringVar(&k.ClientConnection.Kubeconfig, "kubeconfig", "", "kubeconfig file with the API server's address and credentials (default: the Pod's service account)")
	fs.StringVar(&f.master, "master", "", "address of the API server; overrides the address in the kubeconfig")
	fs.StringVar(&k.ClientConnection.ContentType, "kube-api-content-type", k.ClientConnection.ContentType, "content type of requests to the API server")
	fs.Float32Var(&k.ClientConnection.QPS, "kube-api-qps", k.ClientConnection.QPS, "requests per second to the API server")
	fs.Int32Var(&k.ClientConnection.Burst, "kube-api-burst", k.ClientConnection.Burst, "number of requests to the API server that may exceed --kube-api-qps for a short time")

	fs.StringVar(&k.HostnameOverride, "hostname-override", "", "name of this node's Node object (default: the host name, in lower case)")
	fs.StringVar(&k.BindAddress, "bind-address", k.BindAddress, "address of this node, which replaces the Node object's address of the same IP family; 0.0.0.0 and :: keep the Node object's addresses")
	fs.StringVar(&k.HealthzBindAddress, "healthz-bind-address", k.HealthzBindAddress, "address of the health server, with or without a port; 0 or an empty value disables the server")
	fs.StringVar(&k.MetricsBindAddress, "metrics-bind-address", k.MetricsBindAddress, "address of the metrics server, with or without a port; 0 or an empty value disables the server")
	fs.BoolVar(&k.BindAddressHardFail, "bind-address-hard-fail", false, "exit if the health or the metrics server cannot listen, instead of trying again")
	fs.BoolVar(&k.EnableProfiling, "profiling", false, "serve /debug/pprof on the metrics server")
	fs.StringVar(&k.ShowHiddenMetricsForVersion, "show-hidden-metrics-for-version", "", "no effect: signalbox hides no metrics")
	fs.Int32Var(&f.healthzPort, "healthz-port", healthzPort, "port of the health server, if --healthz-bind-address has none; 0 disables the server")
	fs.Int32Var(&f.metricsPort, "metrics-port", metricsPort, "port of the metrics server, if --metrics-bind-address has none; 0 disables the server")

	fs.StringVar((*string)(&k.Mode), "proxy-mode", "", "kube-proxy's name for --mode; an empty value means iptables. Without --mode, --proxy-mode and --config the mode is auto, where kube-proxy's is iptables")
	fs.Int32Var(k.IPTables.MasqueradeBit, "iptables-masquerade-bit", *k.IPTables.MasqueradeBit, "every mode: bit of the packet mark (0 to 31) that requests masquerading")
	fs.BoolVar(&k.IPTables.MasqueradeAll, "masquerade-all", false, "masquerade all traffic to cluster IPs")
	fs.BoolVar(k.IPTables.LocalhostNodePorts, "iptables-localhost-nodeports", true, "iptables mode: serve NodePorts on 127.0.0.1 too")
	fs.DurationVar(&k.IPTables.SyncPeriod.Duration, "iptables-sync-period", k.IPTables.SyncPeriod.Duration, "every mode but ipvs: longest wait before a failed sync is tried again. An update that waits for twice this time makes the node unhealthy")
	fs.DurationVar(&k.IPTables.MinSyncPeriod.Duration, "iptables-min-sync-period", k.IPTables.MinSyncPeriod.Duration, "every mode but ipvs: shortest time between two syncs. A lone change never waits. Without this flag, it is 50ms during many changes, or longer if syncs take longer")
	fs.DurationVar(&k.IPVS.SyncPeriod.Duration, "ipvs-sync-period", k.IPVS.SyncPeriod.Duration, "ipvs mode: see --iptables-sync-period")
	fs.DurationVar(&k.IPVS.MinSyncPeriod.Duration, "ipvs-min-sync-period", k.IPVS.MinSyncPeriod.Duration, "ipvs mode: see --iptables-min-sync-period")
	fs.StringVar(&k.IPVS.Scheduler, "ipvs-scheduler", "", "ipvs mode: the kernel's scheduler, which chooses endpoints, for example rr, wrr, lc, wlc, sed, nq, sh, dh or mh (default rr)")
	fs.StringSliceVar(&k.IPVS.ExcludeCIDRs, "ipvs-exclude-cidrs", nil, "no effect: signalbox never changes virtual servers of other programs")
	fs.BoolVar(&k.IPVS.StrictARP, "ipvs-strict-arp", false, "ipvs mode: answer an ARP request only on the interface that has the address (arp_ignore=1, arp_announce=2)")
	fs.DurationVar(&k.IPVS.TCPTimeout.Duration, "ipvs-tcp-timeout", 0, "ipvs mode: timeout of an idle TCP connection; 0 keeps the kernel's value")
	fs.DurationVar(&k.IPVS.TCPFinTimeout.Duration, "ipvs-tcpfin-timeout", 0, "ipvs mode: timeout of a TCP connection that one side has closed; 0 keeps the kernel's value")
	fs.DurationVar(&k.IPVS.UDPTimeout.Duration, "ipvs-udp-timeout", 0, "ipvs mode: timeout of a UDP flow; 0 keeps the kernel's value")

	fs.StringVar((*string)(&k.DetectLocalMode), "detect-local-mode", "", "how signalbox recognises traffic of this node's Pods: ClusterCIDR (the default), NodeCIDR, BridgeInterface or InterfaceNamePrefix")
	fs.StringVar(&k.DetectLocal.BridgeInterface, "pod-bridge-interface", "", "bridge of this node's Pods, for --detect-local-mode=BridgeInterface")
	fs.StringVar(&k.DetectLocal.InterfaceNamePrefix, "pod-interface-name-prefix", "", "prefix of the names of Pod interfaces, for --detect-local-mode=InterfaceNamePrefix")
	fs.StringVar(&k.ClusterCIDR, "cluster-cidr", "", "address range of Pods, or one IPv4 and one IPv6 range with a comma between them; traffic to cluster IPs from other sources is masqueraded")
	fs.StringSliceVar(&k.NodePortAddresses, "nodeport-addresses", nil, "addresses of this node that serve NodePorts: CIDRs and the words primary (the Node object's addresses), localhost (127.0.0.0/8 and ::1/128) and all, in any combination (default: primary in nftables mode, all in other modes)")

	fs.Int32Var(k.OOMScoreAdj, "oom-score-adj", *k.OOMScoreAdj, "oom_score_adj of this process, from -1000 (the kernel never kills it) to 1000 (the kernel kills it first)")
	fs.Int32Var(k.Conntrack.MaxPerCore, "conntrack-max-per-core", *k.Conntrack.MaxPerCore, "limit of tracked connections for each CPU; 0 keeps the kernel's value, and signalbox never lowers a higher one")
	fs.Int32Var(k.Conntrack.Min, "conntrack-min", *k.Conntrack.Min, "least limit of tracked connections, unless --conntrack-max-per-core is 0")
	fs.DurationVar(&k.Conntrack.TCPEstablishedTimeout.Duration, "conntrack-tcp-timeout-established", k.Conntrack.TCPEstablishedTimeout.Duration, "conntrack timeout of an idle TCP connection; 0 keeps the kernel's value")
	fs.DurationVar(&k.Conntrack.TCPCloseWaitTimeout.Duration, "conntrack-tcp-timeout-close-wait", k.Conntrack.TCPCloseWaitTimeout.Duration, "conntrack timeout of a TCP connection in CLOSE_WAIT; 0 keeps the kernel's value")
	fs.BoolVar(&k.Conntrack.TCPBeLiberal, "conntrack-tcp-be-liberal", false, "track TCP segments outside the window too")
	fs.DurationVar(&k.Conntrack.UDPTimeout.Duration, "conntrack-udp-timeout", 0, "conntrack timeout of a UDP flow without an answer; 0 keeps the kernel's value")
	fs.DurationVar(&k.Conntrack.UDPStreamTimeout.Duration, "conntrack-udp-timeout-stream", 0, "conntrack timeout of a UDP flow with answers; 0 keeps the kernel's value")
	fs.DurationVar(&k.ConfigSyncPeriod.Duration, "config-sync-period", k.ConfigSyncPeriod.Duration, "no effect: watches miss nothing")
	fs.String("boot-id-file", "/proc/sys/kernel/random/boot_id", "no effect")
	fs.String("machine-id-file", "/etc/machine-id,/var/lib/dbus/machine-id", "no effect")
	for name, instead := range map[string]string{"healthz-port": "healthz-bind-address", "metrics-port": "metrics-bind-address"} {
		_ = fs.MarkDeprecated(name, "use --"+instead) // fails only for a flag that is not there
	}
}

// given says whether a flag is on the command line.
func (f *Flags) given(name string) bool {
	for _, group := range f.groups.FlagSets {
		if flag := group.Lookup(name); flag != nil {
			return flag.Changed
		}
	}
	return false
}

// Values returns the values of all flags, by name.
func (f *Flags) Values() map[string]string {
	all := map[string]string{}
	for _, group := range f.Groups().FlagSets {
		group.VisitAll(func(flag *pflag.Flag) { all[flag.Name] = flag.Value.String() })
	}
	return all
}
