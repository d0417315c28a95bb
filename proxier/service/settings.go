// SPDX-License-Identifier: Apache-2.0

package service

import (
	"net/netip"

	"signalbox/proxier/plan"
)

// DetectLocal is how Pods of this node are told from other traffic
// (--detect-local-mode).
type DetectLocal string

// The four ways of kube-proxy.
const (
	DetectLocalClusterCIDR         DetectLocal = "ClusterCIDR"
	DetectLocalNodeCIDR            DetectLocal = "NodeCIDR"
	DetectLocalBridgeInterface     DetectLocal = "BridgeInterface"
	DetectLocalInterfaceNamePrefix DetectLocal = "InterfaceNamePrefix"
)

// Settings are the operator's decisions that change what a Service means on
// this node.
type Settings struct {
	// MasqueradeAll rewrites the source address of all traffic to cluster IPs.
	MasqueradeAll bool
	// DetectLocal is DetectLocalClusterCIDR when empty.
	DetectLocal DetectLocal
	// ClusterCIDRs serves DetectLocalClusterCIDR; the first of each family
	// counts. Without one of a family, local Pods are not told apart there.
	ClusterCIDRs           []netip.Prefix
	PodBridgeInterface     string // serves DetectLocalBridgeInterface
	PodInterfaceNamePrefix string // serves DetectLocalInterfaceNamePrefix
	NodePortAddresses      NodePortSelector
	LocalhostNodePorts     LocalhostNodePorts
	// NodeAddress, where valid, is the node's own address of its family,
	// whatever the Node object says (--bind-address).
	NodeAddress netip.Addr
	// IgnoreExternalIPs leaves spec.externalIPs out (KEP-5707).
	IgnoreExternalIPs bool
	// ExternalIPCIDRs, where not empty, hold the external IPs that are served. Who may
	// create a Service could otherwise take over any address (CVE-2020-8554).
	ExternalIPCIDRs []netip.Prefix
	// ResetRemovedEndpoints ends TCP connections to endpoints that no EndpointSlice of
	// their Service has any more.
	ResetRemovedEndpoints bool
	// HasSchedulers says that the mode chooses endpoints by a scheduler and by
	// weights, so that plan.AnnotationScheduler and weights above 1 count.
	HasSchedulers bool
	// KubeProxyIPVSPolicies makes traffic policies what they are in
	// kube-proxy's ipvs mode: where policy Local finds no endpoint on this node
	// it is Cluster, and where externalTrafficPolicy Local finds one, Pods and
	// processes of this node get no others either.
	KubeProxyIPVSPolicies bool
}

// primary is the node's own address of a family; not valid where none is known.
func (s *Settings) primary(family plan.Family, n *nodeObject) netip.Addr {
	if s.NodeAddress.IsValid() && plan.FamilyOf(s.NodeAddress) == family {
		return s.NodeAddress
	}
	return n.primary(family)
}

// localPods is how this node's Pods are told apart in one family, given the
// Node's own Pod ranges.
func (s *Settings) localPods(family plan.Family, podCIDRs []netip.Prefix) plan.LocalPods {
	switch s.DetectLocal {
	case DetectLocalBridgeInterface:
		return plan.LocalPods{Interface: s.PodBridgeInterface}
	case DetectLocalInterfaceNamePrefix:
		return plan.LocalPods{InterfacePrefix: s.PodInterfaceNamePrefix}
	case DetectLocalNodeCIDR:
		return plan.LocalPods{Prefixes: firstOf(family, podCIDRs)}
	}
	return plan.LocalPods{Prefixes: firstOf(family, s.ClusterCIDRs)}
}

// takesRemotePodsForLocal says whether Pods of other nodes count as FromPods.
func (s *Settings) takesRemotePodsForLocal(family plan.Family) bool {
	return (s.DetectLocal == "" || s.DetectLocal == DetectLocalClusterCIDR) && firstOf(family, s.ClusterCIDRs) != nil
}

func firstOf(family plan.Family, prefixes []netip.Prefix) []netip.Prefix {
	for _, p := range prefixes {
		if plan.FamilyOf(p.Addr()) == family {
			return []netip.Prefix{p.Masked()}
		}
	}
	return nil
}
