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
	// VirtualAddrs names a set of addresses that this node holds and that serve no
	// NodePorts; "" for none.
	VirtualAddrs string
}

// Frontend is the key by which a packet finds its frontend.
func (r Rules) Frontend() nft.Value { return nft.Join(r.Daddr(), nft.L4Proto, nft.DPort) }

// NodePort is the key by which a packet to one of the node's addresses finds its
// frontend.
var NodePort = nft.Join(nft.L4Proto, nft.DPort)

// CheckSources drops packets that may not use a frontend: see plan.Frontend.Sources.
func (r Rules) CheckSources() []nft.Rule {
	fe := r.Frontend()
	rules := []nft.Rule{
		nft.NewRule(in(fe, restricted), notIn(nft.Join(fe, r.Saddr()), AllowedSources), nft.Drop()),
	}
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

// FromPods are the ways to tell packets of local Pods; any one that matches will do.
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

// BetweenNodes matches what a Pod of another node sends to an endpoint of another node:
// see plan.Node.OwnPods. It is nil where this node's Pods cannot be told apart.
func (r Rules) BetweenNodes() []nft.Statement {
	if len(r.Node.OwnPods) == 0 {
		return nil
	}
	return []nft.Statement{in(r.Saddr(), localPods), notIn(r.Saddr(), ownPods), notIn(r.Daddr(), ownPods)}
}

// ToNodePortAddrs are the ways to tell packets to addresses that serve NodePorts; there
// may be none.
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

// nodePortAddrs leaves loopback addresses out: the kernel does not route what comes from
// there to a Pod.
func (r Rules) nodePortAddrs() []netip.Addr {
	return slices.DeleteFunc(slices.Clone(r.Node.NodePortAddrs.Addrs), netip.Addr.IsLoopback)
}

// Unallocated drops packets to addresses of the Service ranges. The mode says by except
// which addresses have a Service, or has led packets to these elsewhere before. An
// address that the node itself holds, as a local DNS server's, is left to what listens
// there.
func (r Rules) Unallocated(except ...nft.Statement) nft.Rule {
	match := append([]nft.Statement{in(r.Daddr(), ServiceCIDRs)}, except...)
	return nft.NewRule(append(match, nft.DaddrIsNotLocal(), nft.Drop())...).Comment("no such Service")
}
