// SPDX-License-Identifier: Apache-2.0

package access

import (
	"net/netip"
	"slices"

	"signalbox/nft"
	"signalbox/proxier/plan"
)

// Rules makes the rules and elements that follow from the facts of a node.
type Rules struct {
	*nft.IPFamily
	Node plan.Node
	// VirtualAddrs names a set of the node's addresses that serve no NodePorts; "" for
	// none.
	VirtualAddrs string
}

// Frontend is the key by which a packet finds its frontend.
func (r Rules) Frontend() nft.Value { return nft.Join(r.Daddr(), nft.L4Proto, nft.DPort) }

// NodePort is the key by which a packet to an address of the node finds its frontend.
var NodePort = nft.Join(nft.L4Proto, nft.DPort)

// Bypass ends a chain for packets of this node to an API server: see plan.Node.Bypass.
func (r Rules) Bypass() (rules []nft.Rule) {
	for _, at := range r.Node.Bypass {
		rules = append(rules, nft.NewRule(r.DaddrIs(at.Addr()), nft.TCPPortIs(at.Port()), nft.SaddrIsLocal(), nft.Return()).Comment("an API server"))
	}
	return rules
}

// ResetStrays resets TCP packets to Services that belong to no known connection: see
// plan.Node.ResetStrays. frontend and nodePort match packets with a key of a frontend or a NodePort.
func (r Rules) ResetStrays(frontend, nodePort nft.Statement) []nft.Rule {
	if !r.Node.ResetStrays {
		return nil
	}
	rules := []nft.Rule{nft.NewRule(nft.MidStream(), frontend, nft.Reset())}
	for _, match := range r.ToNodePortAddrs() {
		rules = append(rules, nft.NewRule(slices.Concat([]nft.Statement{nft.MidStream()}, match, []nft.Statement{nodePort, nft.Reset()})...))
	}
	return rules
}

// CheckSources drops packets whose source may not use the frontend: see
// plan.Frontend.Sources.
func (r Rules) CheckSources() []nft.Rule {
	fe := r.Frontend()
	rules := append(r.Bypass(),
		nft.NewRule(in(fe, restricted), notIn(nft.Join(fe, r.Saddr()), AllowedSources), nft.Drop()))
	for _, match := range r.ToNodePortAddrs() {
		rules = append(rules, nft.NewRule(slices.Concat([]nft.Statement{in(NodePort, restrictedNodePorts)}, match,
			[]nft.Statement{notIn(nft.Join(NodePort, r.Saddr()), allowedNodePortSources), nft.Drop()})...))
	}
	return rules
}

// RejectFrontends rejects or drops packets to frontends without endpoints that also
// match.
func (r Rules) RejectFrontends(match ...nft.Statement) []nft.Rule {
	return r.reject(r.Frontend(), Rejected, match)
}

// RejectNodePorts does the same for NodePorts.
func (r Rules) RejectNodePorts() (rules []nft.Rule) {
	for _, match := range r.ToNodePortAddrs() {
		rules = append(rules, r.reject(NodePort, RejectedNodePorts, match)...)
	}
	return rules
}

// reject takes a set of keys to reject. The next set has those to drop.
func (r Rules) reject(key nft.Value, rejected nft.SetID, match []nft.Statement) []nft.Rule {
	rule := func(set nft.SetID, verdict nft.Statement) nft.Rule {
		return nft.NewRule(slices.Concat([]nft.Statement{in(key, set)}, match, []nft.Statement{verdict})...)
	}
	return []nft.Rule{rule(rejected, r.Reject()), rule(rejected+1, nft.Drop())}
}

// FromPods are alternative matches for packets of local Pods.
func (r Rules) FromPods() []nft.Statement {
	var ways []nft.Statement
	if len(r.Node.LocalPods.Prefixes) > 0 {
		ways = append(ways, in(r.Saddr(), localPods))
	}
	if name := r.Node.LocalPods.Interface; name != "" {
		ways = append(ways, nft.EntersBy(name))
	}
	if prefix := r.Node.LocalPods.InterfacePrefix; prefix != "" {
		ways = append(ways, nft.EntersByPrefix(prefix))
	}
	return ways
}

// BetweenNodes matches packets from a Pod of another node to an endpoint of another
// node: see plan.Node.OwnPods. It is nil if this node's Pods cannot be told apart.
func (r Rules) BetweenNodes() []nft.Statement {
	if len(r.Node.OwnPods) == 0 {
		return nil
	}
	return []nft.Statement{in(r.Saddr(), localPods), notIn(r.Saddr(), ownPods), notIn(r.Daddr(), ownPods)}
}

// ToNodePortAddrs are alternative matches for packets to addresses that serve NodePorts.
// There may be none.
func (r Rules) ToNodePortAddrs() [][]nft.Statement {
	switch {
	case !r.Node.NodePortAddrs.All && len(r.nodePortAddrs()) == 0:
		return nil
	case !r.Node.NodePortAddrs.All:
		return [][]nft.Statement{{in(r.Daddr(), nodePortAddrs)}}
	case r.VirtualAddrs != "":
		return [][]nft.Statement{{nft.DaddrIsLocal(), r.NotLoopback(), nft.NotIn(r.Daddr(), r.VirtualAddrs)}}
	}
	return [][]nft.Statement{{nft.DaddrIsLocal(), r.NotLoopback()}}
}

// nodePortAddrs leaves out loopback addresses: the kernel does not route packets from
// there to a Pod.
func (r Rules) nodePortAddrs() []netip.Addr {
	return slices.DeleteFunc(slices.Clone(r.Node.NodePortAddrs.Addrs), netip.Addr.IsLoopback)
}

// Unallocated drops packets to addresses of the Service ranges. The caller handles
// packets to addresses that have a Service before this rule, or excludes them with
// except. Packets to an address of the node itself, such as that of a local DNS server,
// pass.
func (r Rules) Unallocated(except ...nft.Statement) nft.Rule {
	match := append([]nft.Statement{in(r.Daddr(), ServiceCIDRs)}, except...)
	return nft.NewRule(append(match, nft.DaddrIsNotLocal(), nft.Drop())...).Comment("no such Service")
}
