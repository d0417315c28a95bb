// Package config turns what an operator decided, on the command line and in
// kube-proxy's configuration file, into one validated Config. Nothing here asks
// the kernel or the network, but for the host name: the same words give the
// same Config.
//
// kube-proxy's own form of a configuration, KubeProxyConfiguration v1alpha1,
// is the middle: flags and file are both read into it, defaults are filled in
// and rules are checked there, and the Config follows from it.
package config

import (
	"net/netip"
	"time"

	"k8s.io/kube-proxy/config/v1alpha1"

	"signalbox/node"
	"signalbox/proxier"
)

// The values of --mode.
const (
	ModeAuto      = "auto"
	ModeNFTables  = "nftables"
	ModeIPTables  = "iptables"
	ModeUserspace = "userspace"
	ModeIPVS      = "ipvs"
)

// Modes lists what --mode takes.
var Modes = []string{ModeAuto, ModeNFTables, ModeIPTables, ModeIPVS, ModeUserspace}

// Config is what an operator decided.
type Config struct {
	// Mode is one of Modes; ModeAuto takes the first mode that works here.
	Mode string
	// ModeReason says in words where Mode comes from.
	ModeReason string
	// ModeUnset says that nothing names a mode: Mode is a default.
	ModeUnset bool
	// NodeName is the name that this node's Node object and its endpoints
	// carry: trimmed and lower-cased, never empty.
	NodeName string

	// SourceDir serves the manifests of a directory; the API server is not
	// asked then. The empty string means the API server.
	SourceDir string
	// Kubeconfig and Master say where the API server is; both empty means the
	// Pod's own service account.
	Kubeconfig, Master string
	// ContentType and AcceptContentTypes are what is spoken with the API
	// server; an empty AcceptContentTypes follows ContentType.
	ContentType, AcceptContentTypes string
	// QPS and Burst bound the requests to the API server.
	QPS   float32
	Burst int

	// MasqueradeMark is the packet mark's bit for source rewriting.
	MasqueradeMark uint32
	// IPVS is for ModeIPVS alone.
	IPVS     proxier.IPVSTuning
	Settings proxier.Settings
	// LocalhostRelay lets nftables and userspace mode serve NodePorts on loopback
	// (feature gate KubeProxyNFTablesLocalhostNodePorts).
	LocalhostRelay bool

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
	// MinSyncPeriod is the least time between two syncs; 0 for none. A change
	// that comes alone never waits for it.
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
	// WriteTo is the file that takes KubeProxy, instead of anything being
	// served; the empty string for none.
	WriteTo string

	Logging Logging

	// KubernetesVersion is the release of Kubernetes that metrics tell of, as
	// v1.36.3; empty for the API server's.
	KubernetesVersion string

	// KubeProxy is what is in force in kube-proxy's own form, for /configz:
	// the file or the flags, with every default filled in. It is to be read
	// only.
	KubeProxy *v1alpha1.KubeProxyConfiguration

	// Flags are the values of all flags, by name, for /flagz; Config leaves
	// them out.
	Flags map[string]string

	// Warnings are about settings that are accepted but do not do what their
	// words suggest.
	Warnings []string
}

// ForMode returns the settings as the mode, once it is known, reads them: ipvs
// mode alone has schedulers and kube-proxy's deviations, and nftables mode serves
// NodePorts at the Node's own address alone unless told otherwise, as kube-proxy
// does since 1.31. On loopback, iptables mode serves them unless told otherwise,
// and nftables and userspace mode where they are told to.
func (c *Config) ForMode(mode string) proxier.Settings {
	s := c.Settings
	s.HasSchedulers = mode == ModeIPVS
	s.KubeProxyIPVSPolicies = s.KubeProxyIPVSPolicies && mode == ModeIPVS
	if mode == ModeNFTables {
		if len(s.NodePortAddresses.CIDRs) == 0 {
			s.NodePortAddresses.Primary = true
		}
	}
	switch {
	case mode == ModeIPTables:
	case c.LocalhostRelay && (mode == ModeUserspace || mode == ModeNFTables):
		s.LocalhostNodePorts = proxier.LocalhostNamed
	default:
		s.LocalhostNodePorts = proxier.NoLocalhost
	}
	return s
}
