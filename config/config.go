// SPDX-License-Identifier: Apache-2.0

// Package config turns the command line and kube-proxy's configuration file into
// one validated Config. Apart from the host name, nothing depends on the kernel or
// the network: the same input gives the same Config.
//
// Flags and file are both read into kube-proxy's form, KubeProxyConfiguration
// v1alpha1. There, defaults are set and rules are checked. The Config follows from
// that.
package config

import (
	"crypto/sha256"
	"net/netip"
	"time"

	"k8s.io/kube-proxy/config/v1alpha1"

	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

// Config is the validated configuration.
type Config struct {
	// Mode is one of modes.Names.
	Mode string
	// ModeReason says where Mode comes from.
	ModeReason string
	// ModeUnset: nothing names a mode, and Mode is a default.
	ModeUnset bool
	// NodeName is the name that this node's Node object and its endpoints
	// carry: trimmed and lower-cased, never empty.
	NodeName string

	// SourceDir is a directory of manifests; empty means the API server.
	SourceDir string
	// RunDir is the directory of the local socket; empty means none.
	RunDir string
	// StateDir is a directory for the last known objects; empty means that nothing is
	// saved.
	StateDir string
	// StatusPage serves a page about Services beside the metrics.
	StatusPage bool
	// Kubeconfig and Master say where the API server is; both empty means the
	// Pod's own service account.
	Kubeconfig, Master string
	// KubeconfigDigest makes a Config of a changed kubeconfig another one.
	KubeconfigDigest [sha256.Size]byte
	// ContentType is for requests to the API server, AcceptContentTypes for its
	// answers; empty means the same as ContentType.
	ContentType, AcceptContentTypes string
	// QPS and Burst bound the requests to the API server.
	QPS   float32
	Burst int

	// MasqueradeMark is the packet mark's bit for source rewriting.
	MasqueradeMark uint32
	// IPVS is for modes with schedulers alone; see Options.
	IPVS     proxier.IPVSTuning
	Settings service.Settings
	// LocalhostRelay lets modes with proxier.LocalhostByRelay serve NodePorts on
	// loopback (feature gate KubeProxyNFTablesLocalhostNodePorts).
	LocalhostRelay bool

	// BindAddress, unless it is unspecified (0.0.0.0 or ::), replaces the Node
	// object's address of the same family. Nothing listens there.
	BindAddress netip.Addr
	// HealthzBindAddress and MetricsBindAddress are where the two servers
	// listen; an invalid one means that there is none.
	HealthzBindAddress, MetricsBindAddress netip.AddrPort
	// BindAddressHardFail ends the process where one of the two cannot listen.
	BindAddressHardFail bool
	// EnableProfiling serves pprof beside the metrics.
	EnableProfiling bool
	// SyncPeriod is the wait after which health calls an update late, and the
	// longest pause before a failed sync is tried again.
	SyncPeriod time.Duration
	// MinSyncPeriod is the least time between two syncs; 0 for none. A single
	// change never waits for it.
	MinSyncPeriod time.Duration
	// MaxProcessor is the share of one processor that the process and the programs it
	// runs may take on average; 0 for no limit.
	MaxProcessor float64

	Conntrack node.Conntrack
	// OOMScoreAdj is this process's own, -1000 to 1000; nil leaves it.
	OOMScoreAdj *int32
	// Cleanup removes signalbox's rules from the kernel and ends.
	Cleanup bool
	// InitOnly writes the kernel settings, which needs all privileges, and ends.
	InitOnly bool
	// WriteTo is a file for KubeProxy; nothing is served then. Empty means no file.
	WriteTo string

	Logging Logging

	// KubernetesVersion is the Kubernetes release in metrics, such as v1.36.3; empty
	// for the API server's.
	KubernetesVersion string

	// KubeProxy is this configuration in kube-proxy's form with all defaults, for
	// /configz. It is read only.
	KubeProxy *v1alpha1.KubeProxyConfiguration

	// Flags are the values of all flags, by name, for /flagz. Flags.Config does not
	// set them.
	Flags map[string]string

	// Warnings are about settings without effect, or with another effect than their
	// name suggests.
	Warnings []string
}

// Options returns what a mode is made with in one family.
func (c *Config) Options(mode proxier.Mode, family plan.Family) proxier.Options {
	o := proxier.Options{Family: family, MasqueradeMark: c.MasqueradeMark}
	if mode.Traits().Schedulers {
		o.IPVS = c.IPVS
	}
	return o
}

// ForMode returns the settings as a mode reads them, by its traits.
func (c *Config) ForMode(mode proxier.Mode) service.Settings {
	s, traits := c.Settings, mode.Traits()
	s.HasSchedulers = traits.Schedulers
	s.KubeProxyIPVSPolicies = s.KubeProxyIPVSPolicies && traits.Schedulers
	if traits.PrimaryNodePorts && len(s.NodePortAddresses.CIDRs) == 0 {
		s.NodePortAddresses.Primary = true
	}
	switch {
	case traits.Localhost == proxier.LocalhostByRoute:
	case traits.Localhost == proxier.LocalhostByRelay && c.LocalhostRelay:
		s.LocalhostNodePorts = service.LocalhostNamed
	default:
		s.LocalhostNodePorts = service.NoLocalhost
	}
	return s
}
