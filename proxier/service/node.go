// SPDX-License-Identifier: Apache-2.0

package service

import (
	"log/slog"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"signalbox/proxier/plan"
)

// nodeObject is what this node's Node object says. The zero value stands for
// a node without one.
type nodeObject struct {
	zone      string
	podCIDRs  []netip.Prefix
	addresses []netip.Addr // the node's own, InternalIP before ExternalIP
}

// primary is the node's own address of a family; not valid where there is none.
func (n *nodeObject) primary(family plan.Family) netip.Addr {
	for _, a := range n.addresses {
		if plan.FamilyOf(a) == family {
			return a
		}
	}
	return netip.Addr{}
}

func readNode(obj *corev1.Node) (nodeObject, []plan.Problem) {
	p := plan.Problems{Kind: "Node", Object: objectName(obj)}
	n := nodeObject{zone: obj.Labels[corev1.LabelTopologyZone]}
	cidrs := obj.Spec.PodCIDRs
	if len(cidrs) == 0 && obj.Spec.PodCIDR != "" {
		cidrs = []string{obj.Spec.PodCIDR}
	}
	n.podCIDRs = readPrefixes(&p, "spec.podCIDRs", cidrs)
	for _, want := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for i, address := range obj.Status.Addresses {
			if address.Type != want {
				continue
			}
			if a, ok := readAddr(&p, indexed("status.addresses", i)+".address", address.Address); ok {
				n.addresses = append(n.addresses, a)
			}
		}
	}
	return n, p.All()
}

// readServiceCIDR leaves out a range of all addresses: unallocated addresses
// of a ServiceCIDR are dropped, so it would cut the node off.
func readServiceCIDR(obj *networkingv1.ServiceCIDR) ([]netip.Prefix, []plan.Problem) {
	p := plan.Problems{Kind: "ServiceCIDR", Object: objectName(obj)}
	var out []netip.Prefix
	for _, prefix := range readPrefixes(&p, "spec.cidrs", obj.Spec.CIDRs) {
		if prefix.Bits() == 0 {
			p.Add("spec.cidrs", "%s is every address there is; it is left out", prefix)
			continue
		}
		out = append(out, prefix)
	}
	return out, p.All()
}

// Node is what rules need to know about this node in one family, given
// the addresses that its interfaces have and the sources that its routes name.
func (t *Tracker) Node(settings *Settings, family plan.Family, local []netip.Addr, routes []plan.RouteSource) plan.Node {
	addrs := settings.NodePortAddresses.pick(family, settings.primary(family, &t.node), local)
	var own []netip.Prefix
	if settings.takesRemotePodsForLocal(family) {
		own = ownPods(firstOf(family, t.node.podCIDRs), local)
	}
	var sources []plan.RouteSource
	for _, s := range routes {
		if plan.FamilyOf(s.Destination.Addr()) == family {
			sources = append(sources, s)
		}
	}
	return plan.Node{
		RouteSources:       sources,
		OwnPods:            own,
		LocalPods:          settings.localPods(family, t.node.podCIDRs),
		NodePortAddrs:      addrs,
		LocalhostNodePorts: settings.ServesLocalhost(family),
		ServiceCIDRs:       t.cidrsOf(family),
		ResetStrays:        settings.ResetRemovedEndpoints,
	}
}

// NodeAddrs returns the addresses in this node's Node object.
func (t *Tracker) NodeAddrs() []netip.Addr { return t.node.addresses }

// ownPods returns the Node's Pod range where a local address shows that the network
// plugin follows it: plugins that do, give a bridge, a tunnel or the node's end of a
// Pod's link the first or second address of the range. Others ignore spec.podCIDRs,
// and Pods of this node have addresses outside it.
func ownPods(podRange []netip.Prefix, local []netip.Addr) []netip.Prefix {
	for _, p := range podRange {
		first := p.Masked().Addr()
		if slices.Contains(local, first) || slices.Contains(local, first.Next()) {
			return podRange
		}
	}
	return nil
}

// WarnOfUnknowns logs what the settings need from the Node object and the Tracker
// does not know yet.
func (t *Tracker) WarnOfUnknowns(log *slog.Logger, s *Settings, families []plan.Family) {
	n := &t.node
	if s.DetectLocal == DetectLocalNodeCIDR && len(n.podCIDRs) == 0 {
		log.Warn("this node's Pod ranges are not known, so its Pods cannot be told from other traffic until a Node object says them", "node", t.nodeName)
	}
	for _, f := range families {
		if s.DetectLocal == DetectLocalNodeCIDR && len(n.podCIDRs) > 0 && firstOf(f, n.podCIDRs) == nil {
			log.Warn("this node has no Pod range of the family, so its Pods cannot be told from other traffic there", "family", f.String(), "podCIDRs", n.podCIDRs)
		}
	}
	if s.NodePortAddresses.Primary && len(n.addresses) == 0 && !s.NodeAddress.IsValid() {
		log.Warn("this node's own address is not known: until a Node object says it, NodePorts are served at the first address of the interface with the default route", "node", t.nodeName)
	}
}
