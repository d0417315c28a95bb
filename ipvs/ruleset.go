package ipvs

import (
	"fmt"
	"net/netip"
	"time"

	nflib "github.com/google/nftables"

	"signalbox/nftables"

	"signalbox/proxier/plan"
)

// IPVS looks at packets for local addresses at priorities 98 and 99 of the
// input hook, and at those of local processes at -99 and -98 of the output
// hook. What it redirects passes the output hook from its beginning. So the
// choice has to be made before these, and what is left of it cleared away
// after them.
var (
	beforeInput  = nftables.NewHook(nflib.ChainHookInput, 90, "type filter hook input priority 90")
	beforeOutput = nftables.NewHook(nflib.ChainHookOutput, -110, "type filter hook output priority -110")
	afterInput   = nftables.NewHook(nflib.ChainHookInput, 101, "type filter hook input priority 101")
	afterOutput  = nftables.NewHook(nflib.ChainHookOutput, -97, "type filter hook output priority -97")
)

// While a packet that opens a connection is on its way through IPVS, its
// priority field holds first where it comes from and then whether its source
// is to be rewritten: the packet mark must be the virtual server's exactly.
const (
	fromPods    uint32 = 0x4000_0001
	fromNode    uint32 = 0x4000_0002
	fromOutside uint32 = 0x4000_0003

	decision     uint32 = 0x4000_0010
	decisionMask uint32 = 0xffff_fff0
	newSource    uint32 = 1 // the source is to be rewritten
	marked       uint32 = 2 // the packet mark is a virtual server's
)

// origins lists where a connection can come from, with the priority that says
// so.
var origins = []struct {
	origin   plan.TrafficSources
	priority uint32
}{
	{plan.FromPods, fromPods}, {plan.FromNode, fromNode}, {plan.FromOutside, fromOutside},
}

// ruleset makes the chains.
type ruleset struct {
	*nftables.IPFamily
	mark uint32 // asks for the source address to be rewritten
	node plan.Node
	// timeouts are those of session affinity; the index is the class that a
	// mark holds.
	timeouts []time.Duration
}

var (
	rule        = nftables.NewRule
	nodePortKey = nftables.Join(nftables.L4Proto, nftables.DPort)
	accept      = nftables.Return
)

func (r *ruleset) frontendKey() nftables.Value {
	return nftables.Join(r.Daddr(), nftables.L4Proto, nftables.DPort)
}

// chains are all chains of the table, each before those that jump to it.
func (r *ruleset) chains() []nftables.Chain {
	return append(append(r.affinityChains(), r.nodeChains()...), r.baseChains()...)
}

func (r *ruleset) baseChains() []nftables.Chain {
	isNew, chain := nftables.StateNew(), nftables.NewChain
	noService := rule(isNew, nftables.Jump("check-cluster-ips"))
	return []nftables.Chain{
		chain("before-ipvs-input", beforeInput, rule(isNew, nftables.Jump("services"))),
		chain("before-ipvs-output", beforeOutput, rule(isNew, nftables.Jump("services"))),
		chain("after-ipvs-input", afterInput, rule(isNew, nftables.Jump("decided"))),
		chain("after-ipvs-output", afterOutput, rule(isNew, nftables.Jump("decided"))),
		chain("filter-forward", nftables.FilterForward, noService),
		chain("filter-output", nftables.FilterOutput, noService),
		r.postrouting(),
	}
}

// postrouting is a base chain that depends on the node.
func (r *ruleset) postrouting() nftables.Chain {
	return nftables.NewChain("nat-postrouting", nftables.NATPostrouting,
		rule(nftables.MarkHas(r.mark), nftables.SetMarkBit(r.mark, false), nftables.NewSource(r.node)),
		rule(nftables.LeavesNotBy("lo"), in(nftables.Join(r.Saddr(), r.Daddr()), hairpin), nftables.NewSource(r.node)).Because("a client that is its own endpoint"))
}

// nodeChains are written anew when the node's facts change. Each comes before
// those that jump to it.
func (r *ruleset) nodeChains() []nftables.Chain {
	chain := nftables.NewChain
	fe := r.frontendKey()
	return append(nftables.SourceChains(r.IPFamily, r.node), []nftables.Chain{
		chain("check-cluster-ips", nil,
			rule(in(r.Daddr(), serviceCIDRs), notIn(r.Daddr(), vips), nftables.FibNotLocal(), nftables.Drop()).Because("no such Service")),
		chain("reject", nil, r.refuse(r.Reject())...),
		chain("drop", nil, r.refuse(nftables.Drop())...),
		chain("no-endpoints", nil, r.noEndpoints()...),
		chain("chosen-by-address", nil, r.sourceRules(fe, masquerade, decision)...),
		chain("chosen", nil, r.chosen(fe, masquerade)...),
		chain("nodeport-chosen", nil, r.chosen(nodePortKey, nodePortMasquerade)...),
		chain("nodeports", nil,
			rule(nftables.SetMark(markOf(nodePortKey, nodePortMarks)), nftables.GoTo("nodeport-chosen")),
			rule(in(nodePortKey, rejectedNodePorts), nftables.GoTo("reject")),
			rule(in(nodePortKey, droppedNodePorts), nftables.GoTo("drop"))),
		chain("internal-nodeports", nil,
			rule(nftables.SetMark(markOf(nodePortKey, internalNodePortMarks)), nftables.GoTo("nodeport-chosen"))),
		chain("external", nil, r.external(fe)...),
		chain("internal", nil, r.internal(fe)...),
		chain("services", nil, r.services(fe)...),
		chain("decided", nil, r.decided()...),
	}...)
}

// services finds out where a packet that opens a connection comes from.
func (r *ruleset) services(fe nftables.Value) []nftables.Rule {
	rules := []nftables.Rule{
		rule(nftables.PriorityBitsAre(decisionMask, decision), nftables.Return()).Because("IPVS has redirected it"),
		rule(in(fe, restricted), notIn(nftables.Join(fe, r.Saddr()), allowedSources), nftables.Drop()),
	}
	for _, match := range r.toNodePortAddrs() {
		rules = append(rules, rule(append(match, in(nodePortKey, restrictedNodePorts),
			notIn(nftables.Join(nodePortKey, r.Saddr()), allowedNodePortSources), nftables.Drop())...))
	}
	for _, match := range r.fromPods() {
		rules = append(rules, rule(match, nftables.SetPriority(fromPods), nftables.GoTo("internal")))
	}
	return append(rules,
		rule(nftables.FibLocal(true), nftables.SetPriority(fromNode), nftables.GoTo("internal")),
		rule(nftables.SetPriority(fromOutside), nftables.GoTo("external")))
}

// internal chooses for traffic of this node and its Pods, where that goes
// elsewhere than other traffic. The mark 0 stands for no endpoints.
func (r *ruleset) internal(fe nftables.Value) []nftables.Rule {
	rules := []nftables.Rule{rule(nftables.SetMark(markOf(fe, internalMarks)), nftables.GoTo("chosen"))}
	for _, match := range r.toNodePortAddrs() {
		rules = append(rules, rule(append(match, nftables.Jump("internal-nodeports"))...))
	}
	return append(rules,
		rule(nftables.PriorityBitsAre(decisionMask, decision), nftables.Return()),
		rule(nftables.GoTo("external")))
}

// external chooses for all other traffic. Ports of virtual addresses at which
// no Service is are refused, or they would be those of the node's daemons.
func (r *ruleset) external(fe nftables.Value) []nftables.Rule {
	rules := []nftables.Rule{
		rule(in(fe, plainServers), nftables.GoTo("chosen-by-address")),
		rule(nftables.SetMark(markOf(fe, marks)), nftables.GoTo("chosen")),
		rule(in(fe, rejected), nftables.GoTo("reject")),
		rule(in(fe, dropped), nftables.GoTo("drop")),
		rule(in(fe, healthChecks), nftables.ClearPriority(), accept()),
	}
	for _, p := range plan.Protocols {
		rules = append(rules, rule(nftables.ProtocolIs(p), in(r.Daddr(), vips), r.Reject()).Because("no such port"))
	}
	for _, match := range r.toNodePortAddrs() {
		rules = append(rules, rule(append(match, nftables.Jump("nodeports"))...))
	}
	return append(rules,
		rule(nftables.PriorityBitsAre(decisionMask, decision), nftables.Return()),
		rule(nftables.ClearPriority()))
}

// chosen goes on with a virtual server that is known by its mark.
func (r *ruleset) chosen(key nftables.Value, masquerade int) []nftables.Rule {
	return append([]nftables.Rule{
		rule(nftables.MarkIs(^uint32(0), noEndpoints), nftables.GoTo("no-endpoints")),
		rule(nftables.MarkIs(stickyMask, stickySpace), nftables.Jump("recall")),
	}, r.sourceRules(key, masquerade, decision|marked)...)
}

// sourceRules remember in the priority whether the source is to be rewritten.
// That of a process of this node, which the kernel gave the virtual address as
// its own, always is: answers to it would not come back.
func (r *ruleset) sourceRules(key nftables.Value, masquerade int, decided uint32) []nftables.Rule {
	return []nftables.Rule{
		rule(in(nftables.Join(key, nftables.Priority), masquerade), nftables.SetPriority(decided|newSource), nftables.Return()),
		rule(in(r.Saddr(), vips), nftables.SetPriority(decided|newSource), nftables.Return()),
		rule(nftables.SetPriority(decided)),
	}
}

// refuse ends a connection that has no endpoints. What the node sends to an address
// that it holds besides the virtual ones passes the output hook, and is refused at the
// input hook: a process whose packet is rejected at the output hook gets EPERM in place
// of ECONNREFUSED.
func (r *ruleset) refuse(verdict nftables.Statement) []nftables.Rule {
	return []nftables.Rule{
		rule(in(r.Daddr(), vips), verdict),
		rule(nftables.HasEntered(), verdict),
		rule(nftables.ClearPriority()),
	}
}

// noEndpoints answers where internal traffic alone has no endpoints.
func (r *ruleset) noEndpoints() []nftables.Rule {
	fe := r.frontendKey()
	clear := nftables.SetMark(nftables.ConstantMark(0))
	return []nftables.Rule{
		rule(clear, in(fe, rejected), nftables.GoTo("reject")),
		rule(in(fe, dropped), nftables.GoTo("drop")),
		rule(in(nodePortKey, rejectedNodePorts), nftables.GoTo("reject")),
		rule(in(nodePortKey, droppedNodePorts), nftables.GoTo("drop")),
	}
}

// decided takes the decision out of the packet once IPVS has followed it.
func (r *ruleset) decided() []nftables.Rule {
	isMarked := nftables.PriorityBitsAre(decisionMask|marked, decision|marked)
	rules := []nftables.Rule{
		rule(isMarked, nftables.MarkIs(stickyMask|endpointFlag, stickySpace), nftables.Jump("learn")),
		rule(isMarked, nftables.SetMark(nftables.ConstantMark(0))),
		rule(nftables.PriorityBitsAre(decisionMask|newSource, decision|newSource), nftables.SetMarkBit(r.mark, true)),
	}
	if len(r.node.OwnPods) > 0 {
		rules = append(rules, rule(nftables.PriorityBitsAre(decisionMask, decision), in(r.Saddr(), localPods), notIn(r.Saddr(), ownPods), notIn(r.Daddr(), ownPods),
			nftables.SetMarkBit(r.mark, true)).Because("from another node to another node"))
	}
	return append(rules, rule(nftables.PriorityBitsAre(decisionMask, decision), nftables.ClearPriority()))
}

// affinityChains recall and learn a client's endpoint. A client is known by
// the mark of its endpoint, which is that of a virtual server with this one
// destination; a client that is not known is scheduled by the virtual server of
// the endpoint set, and what the scheduler chose is learnt afterwards from the
// packet.
//
// What the map remembers has to be deleted where it is not in the set: to
// update a key that exists starts its time again and keeps the old endpoint.
func (r *ruleset) affinityChains() []nftables.Chain {
	var chains []nftables.Chain
	var recall, learn []nftables.Rule
	block := nftables.MarkBits(blockMask, 0)
	client := nftables.Join(r.Saddr(), block)
	for class, timeout := range r.timeouts {
		for v := range maxVariants {
			low := uint32(class)<<variantBits | uint32(v)
			name := fmt.Sprintf("recall-%ds-%d", int(timeout/time.Second), v)
			isEndpoint := nftables.MarkIs(endpointFlag, endpointFlag)
			chains = append(chains, nftables.NewChain(name, nil,
				rule(nftables.SetMark(markOf(client, affinity))),
				rule(in(nftables.Mark, affinityMembers+v), nftables.Remember(setNames[affinity], client, nftables.Mark, timeout), nftables.Return()),
				rule(isEndpoint, nftables.Forget(setNames[affinity], client, nftables.Mark)).Because("its endpoint is gone"),
				rule(nftables.SetMark(nftables.MarkBits(blockMask|low, low)))))
			recall = append(recall, rule(nftables.MarkIs(^blockMask, low), nftables.GoTo(name)))
		}
		name := fmt.Sprintf("learn-%ds", int(timeout/time.Second))
		chains = append(chains, nftables.NewChain(name, nil,
			rule(nftables.SetMark(markOf(nftables.Join(block, r.Daddr(), nftables.DPort), affinityMarks)),
				nftables.Remember(setNames[affinity], client, nftables.Mark, timeout))))
		learn = append(learn, rule(nftables.MarkIs(^blockMask&^(maxVariants-1), uint32(class)<<variantBits), nftables.GoTo(name)))
	}
	return append(chains, nftables.NewChain("recall", nil, recall...), nftables.NewChain("learn", nil, learn...))
}

// fromPods are the ways to tell packets of local Pods; any one that matches
// will do.
func (r *ruleset) fromPods() []nftables.Statement {
	var ways []nftables.Statement
	if len(r.node.LocalPods.Prefixes) > 0 {
		ways = append(ways, in(r.Saddr(), localPods))
	}
	if name := r.node.LocalPods.Interface; name != "" {
		ways = append(ways, nftables.EntersBy(name, false))
	}
	if prefix := r.node.LocalPods.InterfacePrefix; prefix != "" {
		ways = append(ways, nftables.EntersBy(prefix, true))
	}
	return ways
}

// toNodePortAddrs are the ways to tell packets to addresses that serve
// NodePorts; there may be none. Virtual addresses, though local, do not.
func (r *ruleset) toNodePortAddrs() [][]nftables.Statement {
	if r.node.NodePortAddrs.All {
		return [][]nftables.Statement{{nftables.FibLocal(false), r.NotLoopback(), notIn(r.Daddr(), vips)}}
	}
	if len(r.nodePortAddrs()) > 0 {
		return [][]nftables.Statement{{in(r.Daddr(), nodePortAddrs)}}
	}
	return nil
}

// nodePortAddrs leaves loopback addresses out: the kernel does not route what
// comes from there to a Pod.
func (r *ruleset) nodePortAddrs() []netip.Addr {
	var addrs []netip.Addr
	for _, a := range r.node.NodePortAddrs.Addrs {
		if !a.IsLoopback() {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// nodeElements are the elements that the node's facts make.
func (r *ruleset) nodeElements() []nftables.Element {
	var list []nftables.Element
	intervals := func(set int, prefixes []netip.Prefix) {
		for _, p := range nftables.Disjoint(prefixes) {
			list = append(list, nftables.NewElement(set, addrBytes(p.Addr()), addrBytes(nftables.LastAddr(p)), "", ""))
		}
	}
	intervals(localPods, r.node.LocalPods.Prefixes)
	intervals(ownPods, r.node.OwnPods)
	for _, a := range r.nodePortAddrs() {
		list = append(list, nftables.NewElement(nodePortAddrs, addrBytes(a), "", "", ""))
	}
	intervals(serviceCIDRs, r.node.ServiceCIDRs)
	return list
}
