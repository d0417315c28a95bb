package config

import (
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
}

// signalboxFlags are the settings that kube-proxy does not have. They are not in
// the file, so that kube-proxy can still read it.
type signalboxFlags struct {
	mode                  string
	source                string
	kubeProxyIPVSPolicies bool
	version               Version
}

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
	fs.StringVar(&o.mode, "mode", "", "how Services are served: "+strings.Join(modes.Names(), ", ")+"; wins over --proxy-mode and over the mode in --config. auto, the default where none of them says anything, takes the first of "+modes.AutomaticNames()+" that works on this node")
	fs.StringVar(&o.source, "source", "", "serve the Services, EndpointSlices, Nodes and ServiceCIDRs in the YAML and JSON files of this directory, which is watched, instead of asking an API server")
	fs.Var(&o.version, "version", "print the version and end; raw for all of it. A release such as v1.36.3 is told of in kubernetes_build_info instead of the API server's")
	fs.Lookup("version").NoOptDefVal = "true"
	fs.BoolVar(&o.kubeProxyIPVSPolicies, "ipvs-kube-proxy-policies", false, "ipvs mode: traffic policies as in kube-proxy's ipvs mode: Local without an endpoint on this node falls back to those of other nodes, and this node's own Pods and processes follow externalTrafficPolicy too")
}

func (f *Flags) addKubeProxy(fs *pflag.FlagSet) {
	k := &f.kubeProxy
	setDefaults(k)
	k.IPVS.MinSyncPeriod = k.IPTables.MinSyncPeriod // the flag's default, and not the file's
	fs.StringVar(&f.file, "config", "", "kube-proxy's configuration file (KubeProxyConfiguration v1alpha1), which is watched; every flag of this group but --hostname-override is then left to it")
	fs.StringVar(&f.writeTo, "write-config-to", "", "write the configuration that follows from all this, defaults included, to this file and end")
	fs.BoolVar(&f.cleanup, "cleanup", false, "remove what signalbox wrote into the kernel, and end")
	fs.BoolVar(&f.initOnly, "init-only", false, "do only what needs all privileges, the kernel settings, and end; signalbox needs CAP_NET_ADMIN alone afterwards")
	fs.Var(cliflag.NewMapStringBool(&k.FeatureGates), "feature-gates", "feature gates of Kubernetes, as in AllowServiceExternalIPs=false, which ignores spec.externalIPs, KubeProxyIPVS=false, which refuses --proxy-mode=ipvs, and KubeProxyNFTablesLocalhostNodePorts=false, which serves no NodePorts on loopback in nftables mode; the others change nothing here, and the log names them")

	fs.StringVar(&k.ClientConnection.Kubeconfig, "kubeconfig", "", "kubeconfig file with the API server's address and credentials (default: the Pod's service account)")
	fs.StringVar(&f.master, "master", "", "address of the API server; wins over the kubeconfig's")
	fs.StringVar(&k.ClientConnection.ContentType, "kube-api-content-type", k.ClientConnection.ContentType, "what is spoken with the API server")
	fs.Float32Var(&k.ClientConnection.QPS, "kube-api-qps", k.ClientConnection.QPS, "requests a second to the API server")
	fs.Int32Var(&k.ClientConnection.Burst, "kube-api-burst", k.ClientConnection.Burst, "requests to the API server that may exceed --kube-api-qps for a moment")

	fs.StringVar(&k.HostnameOverride, "hostname-override", "", "the name of this node's Node object (default: the host name, in lower case)")
	fs.StringVar(&k.BindAddress, "bind-address", k.BindAddress, "the node's own address, in the place of the Node object's of the same family; 0.0.0.0 and :: for the Node object's")
	fs.StringVar(&k.HealthzBindAddress, "healthz-bind-address", k.HealthzBindAddress, "where health is served, with or without a port; 0 or nothing for nowhere")
	fs.StringVar(&k.MetricsBindAddress, "metrics-bind-address", k.MetricsBindAddress, "where metrics are served, with or without a port; 0 or nothing for nowhere")
	fs.BoolVar(&k.BindAddressHardFail, "bind-address-hard-fail", false, "end where health or metrics cannot be served, instead of trying again")
	fs.BoolVar(&k.EnableProfiling, "profiling", false, "serve /debug/pprof beside the metrics")
	fs.StringVar(&k.ShowHiddenMetricsForVersion, "show-hidden-metrics-for-version", "", "no effect: no metric is hidden")
	fs.Int32Var(&f.healthzPort, "healthz-port", healthzPort, "the port for --healthz-bind-address where that is an address without one; 0 for no server")
	fs.Int32Var(&f.metricsPort, "metrics-port", metricsPort, "the port for --metrics-bind-address where that is an address without one; 0 for no server")

	fs.StringVar((*string)(&k.Mode), "proxy-mode", "", "kube-proxy's name for --mode; given and empty, it is iptables. Where neither of the two is given, nor --config, the mode is auto and not iptables as with kube-proxy")
	fs.Int32Var(k.IPTables.MasqueradeBit, "iptables-masquerade-bit", *k.IPTables.MasqueradeBit, "bit of the packet mark (0 to 31) that asks for the source address to be rewritten, in every mode")
	fs.BoolVar(&k.IPTables.MasqueradeAll, "masquerade-all", false, "rewrite the source address of all traffic to cluster IPs")
	fs.BoolVar(k.IPTables.LocalhostNodePorts, "iptables-localhost-nodeports", true, "iptables mode: serve NodePorts on 127.0.0.1 too")
	fs.DurationVar(&k.IPTables.SyncPeriod.Duration, "iptables-sync-period", k.IPTables.SyncPeriod.Duration, "every mode but ipvs: the longest wait before what failed is tried again, and half the wait after which health calls an update late")
	fs.DurationVar(&k.IPTables.MinSyncPeriod.Duration, "iptables-min-sync-period", k.IPTables.MinSyncPeriod.Duration, "every mode but ipvs: the least time between two syncs. A change that comes alone never waits, and where this is not given, a storm of changes is batched by its own cost")
	fs.DurationVar(&k.IPVS.SyncPeriod.Duration, "ipvs-sync-period", k.IPVS.SyncPeriod.Duration, "ipvs mode: as --iptables-sync-period")
	fs.DurationVar(&k.IPVS.MinSyncPeriod.Duration, "ipvs-min-sync-period", k.IPVS.MinSyncPeriod.Duration, "ipvs mode: as --iptables-min-sync-period")
	fs.StringVar(&k.IPVS.Scheduler, "ipvs-scheduler", "", "ipvs mode: the kernel's scheduler that chooses endpoints, such as rr, wrr, lc, wlc, sed, nq, sh, dh or mh (default rr)")
	fs.StringSliceVar(&k.IPVS.ExcludeCIDRs, "ipvs-exclude-cidrs", nil, "no effect: virtual servers of others are left alone anyway")
	fs.BoolVar(&k.IPVS.StrictARP, "ipvs-strict-arp", false, "ipvs mode: answer ARP only for addresses of the interface that is asked (arp_ignore=1, arp_announce=2)")
	fs.DurationVar(&k.IPVS.TCPTimeout.Duration, "ipvs-tcp-timeout", 0, "ipvs mode: how long an idle TCP connection is remembered; 0 leaves the kernel's value")
	fs.DurationVar(&k.IPVS.TCPFinTimeout.Duration, "ipvs-tcpfin-timeout", 0, "ipvs mode: the same for a TCP connection that one side has closed")
	fs.DurationVar(&k.IPVS.UDPTimeout.Duration, "ipvs-udp-timeout", 0, "ipvs mode: the same for a UDP flow")

	fs.StringVar((*string)(&k.DetectLocalMode), "detect-local-mode", "", "how this node's Pods are told from other traffic: ClusterCIDR (the default), NodeCIDR, BridgeInterface or InterfaceNamePrefix")
	fs.StringVar(&k.DetectLocal.BridgeInterface, "pod-bridge-interface", "", "the bridge that Pods are behind (--detect-local-mode=BridgeInterface)")
	fs.StringVar(&k.DetectLocal.InterfaceNamePrefix, "pod-interface-name-prefix", "", "what the names of Pods' interfaces begin with (--detect-local-mode=InterfaceNamePrefix)")
	fs.StringVar(&k.ClusterCIDR, "cluster-cidr", "", "the Pods' address range, or one IPv4 and one IPv6 range with a comma; traffic to cluster IPs from elsewhere is masqueraded")
	fs.StringSliceVar(&k.NodePortAddresses, "nodeport-addresses", nil, "serve NodePorts only at these of the node's addresses: CIDRs and the words primary (the Node object's own addresses), localhost (127.0.0.0/8 and ::1/128) and all, in any combination (default: primary in nftables mode, all in the others)")

	fs.Int32Var(k.OOMScoreAdj, "oom-score-adj", *k.OOMScoreAdj, "how readily the kernel kills this process when memory runs out, from -1000 (never) to 1000")
	fs.Int32Var(k.Conntrack.MaxPerCore, "conntrack-max-per-core", *k.Conntrack.MaxPerCore, "connections that the kernel can track, for each CPU; 0 leaves the kernel's value, and a higher one is never lowered")
	fs.Int32Var(k.Conntrack.Min, "conntrack-min", *k.Conntrack.Min, "connections that the kernel can track at least, unless --conntrack-max-per-core is 0")
	fs.DurationVar(&k.Conntrack.TCPEstablishedTimeout.Duration, "conntrack-tcp-timeout-established", k.Conntrack.TCPEstablishedTimeout.Duration, "how long an idle TCP connection is tracked; 0 leaves the kernel's value")
	fs.DurationVar(&k.Conntrack.TCPCloseWaitTimeout.Duration, "conntrack-tcp-timeout-close-wait", k.Conntrack.TCPCloseWaitTimeout.Duration, "the same for a TCP connection in CLOSE_WAIT")
	fs.BoolVar(&k.Conntrack.TCPBeLiberal, "conntrack-tcp-be-liberal", false, "track TCP segments outside the window too")
	fs.DurationVar(&k.Conntrack.UDPTimeout.Duration, "conntrack-udp-timeout", 0, "how long a UDP flow without an answer is tracked; 0 leaves the kernel's value")
	fs.DurationVar(&k.Conntrack.UDPStreamTimeout.Duration, "conntrack-udp-timeout-stream", 0, "the same for one with answers")
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
