// SPDX-License-Identifier: Apache-2.0

package proxier

import "signalbox/proxier/plan"

// Mode is one way to serve Services, before it is at work. Its methods work in the
// network namespace of the calling thread. ModeDefaults has those that a mode may
// leave out.
type Mode interface {
	// Name is the value of --mode, and the mode's name in metrics and messages.
	Name() string
	// Supported says why the mode cannot serve a family on this node, or returns
	// nil. The error is an *UnsupportedError.
	Supported(plan.Family) error
	// New makes the mode work in one family. It writes nothing: the first Sync does.
	New(Options) (Proxier, error)
	// Render writes what New's Proxier would put into the kernel for a plan, in the
	// words in which the kernel's own tool for it lists rules. It touches no kernel. It refuses
	// a plan that Sync would refuse.
	Render(Options, *plan.Plan) (string, error)
	// Cleanup removes everything that the mode ever put into the kernel for a
	// family, and nothing else. removed says whether anything went, also where the
	// rest cannot be removed. The error names what is left; an *UnsupportedError
	// says that this node cannot hold anything of the mode. An error that wraps
	// ErrUnknownOwner is about objects that may be kube-proxy's.
	//
	// With drain, what carries open connections stays and takes no new ones:
	// draining counts that, and Cleanup is to be called again later. A mode whose
	// rules can go without ending connections ignores drain.
	Cleanup(f plan.Family, drain bool) (removed bool, draining int, err error)

	// Written says whether the kernel has rules of the mode for a family, which may be an
	// earlier process's, and what of kube-proxy's they have taken over. It writes nothing.
	// Default: ErrNotCompared.
	Written(plan.Family) (found bool, taken TakenOver, err error)
	// KubeProxy lists what kube-proxy leaves in the part of the kernel that the mode
	// writes. What a later mode removes may depend on an earlier mode's.
	// Default: nothing.
	KubeProxy() []Remnant
	// Traits says how the mode differs from others in what is decided outside it.
	// Default: the zero value.
	Traits() Traits
	// Init does beforehand what New's Proxier needs more than CAP_NET_ADMIN for.
	// localhost says whether NodePorts are served on the loopback address.
	// Default: nothing.
	Init(o Options, localhost bool) error
	// FullAffinityLists counts the endpoints for which the kernel's list of clients
	// with session affinity is full.
	// Default: 0, for a mode without a bound on these lists.
	FullAffinityLists() (int, error)
}

// Traits are how a mode differs from others in what is decided outside it. The zero
// value is right for most modes.
type Traits struct {
	// Automatic says that "auto" may take the mode; others only serve those who ask
	// for them by name.
	Automatic bool
	// FileSection is the section of kube-proxy's configuration file that the mode
	// reads: "iptables", "nftables" or "ipvs". Empty means iptables.
	FileSection string
	// FeatureGate is the feature gate of kube-proxy without which kube-proxy's
	// settings cannot name the mode; empty for none.
	FeatureGate string
	// Series names the metrics of kube-proxy that exist in this mode and not in
	// every mode. Package metrics has the list.
	Series []string
	// Schedulers says that the mode chooses endpoints by the kernel's schedulers and
	// by weights. Options.IPVS, the ipvs flags and a Service's annotations count then.
	Schedulers bool
	// PrimaryNodePorts serves NodePorts at the Node's own addresses alone, unless
	// --nodeport-addresses says otherwise.
	PrimaryNodePorts bool
	// Localhost is how the mode serves NodePorts on the loopback address.
	Localhost LocalhostNodePorts
	// LocalhostListens, with LocalhostByRelay, says that the process listens at each
	// NodePort: it serves TCP alone, and connections count as from outside.
	LocalhostListens bool
	// Refused are protocols that the mode does not carry: all their ports refuse.
	Refused []plan.Protocol
	// RelaysByRules says that the mode's rules lead connections to a relay in the
	// process that wrote them. While such a Proxier drains, it accepts what obeyed
	// its rules. The rules of an earlier process stay until that process has ended.
	RelaysByRules bool
	// GuardsClusterIPs says that the mode drops packets to addresses of the Service ranges
	// that no Service has, and rejects packets to other ports of cluster IPs. Without it,
	// the node's routes decide about them.
	GuardsClusterIPs bool
	// LeavesAPIServers says that the mode serves an address by giving it to the node. So it
	// gives it no API server's address: Pods and other hosts reach the API server there,
	// and processes of the node the endpoints, if there are any. See
	// plan.Frontend.ForeignAddr.
	LeavesAPIServers bool
	// FullWriteAfterTakeover says that nothing tells the mode when another process
	// changes its part of the kernel. A Proxier reads it back and mends it after an
	// earlier process has let go of the node.
	FullWriteAfterTakeover bool
}

// LocalhostNodePorts is how a mode serves NodePorts on the loopback address.
type LocalhostNodePorts int

// The ways to serve NodePorts on the loopback address.
const (
	// NoLocalhost: not at all.
	NoLocalhost LocalhostNodePorts = iota
	// LocalhostByRoute: in IPv4, by rules and the setting route_localnet, unless
	// --iptables-localhost-nodeports=false.
	LocalhostByRoute
	// LocalhostByRelay: in both families, where --nodeport-addresses names the
	// address and the feature gate of KEP-6032 is on.
	LocalhostByRelay
)

// ModeDefaults are the answers of a mode that needs nothing special. A Mode embeds
// it.
type ModeDefaults struct{}

// Written implements Mode.
func (ModeDefaults) Written(plan.Family) (bool, TakenOver, error) {
	return false, TakenOver{}, ErrNotCompared
}

// KubeProxy implements Mode.
func (ModeDefaults) KubeProxy() []Remnant { return nil }

// Traits implements Mode.
func (ModeDefaults) Traits() Traits { return Traits{} }

// Init implements Mode.
func (ModeDefaults) Init(Options, bool) error { return nil }

// FullAffinityLists implements Mode.
func (ModeDefaults) FullAffinityLists() (int, error) { return 0, nil }
