package ipvs

import (
	"fmt"
	"slices"
	"time"

	"github.com/google/nftables"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// IPVS looks at packets for local addresses at priorities 98 and 99 of the
// input hook, and at those of local processes at -99 and -98 of the output
// hook. What it redirects passes the output hook from its beginning. So the
// choice has to be made before these, and what is left of it cleared away
// after them.
var (
	beforeInput  = nft.NewHook(nftables.ChainHookInput, 90, "type filter hook input priority 90")
	beforeOutput = nft.NewHook(nftables.ChainHookOutput, -110, "type filter hook output priority -110")
	afterInput   = nft.NewHook(nftables.ChainHookInput, 101, "type filter hook input priority 101")
	afterOutput  = nft.NewHook(nftables.ChainHookOutput, -97, "type filter hook output priority -97")
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
	access.Rules
	mark uint32 // asks for the source address to be rewritten
	// timeouts are those of session affinity; the index is the class that a
	// mark holds.
	timeouts []time.Duration
}

var (
	rule   = nft.NewRule
	accept = nft.Return
)

// chains are all chains of the table, each before those that jump to it.
func (r *ruleset) chains() []nft.Chain {
	return append(append(r.affinityChains(), r.nodeChains()...), r.baseChains()...)
}

func (r *ruleset) baseChains() []nft.Chain {
	isNew, chain := nft.StateNew(), nft.NewChain
	noService := rule(isNew, nft.Jump("check-cluster-ips"))
	return []nft.Chain{
		chain("before-ipvs-input", beforeInput, rule(isNew, nft.Jump("services"))),
		chain("before-ipvs-output", beforeOutput, rule(isNew, nft.Jump("services"))),
		chain("after-ipvs-input", afterInput, rule(isNew, nft.Jump("decided"))),
		chain("after-ipvs-output", afterOutput, rule(isNew, nft.Jump("decided"))),
		chain("filter-forward", access.FilterForward, noService),
		chain("filter-output", access.FilterOutput, noService),
		r.postrouting(),
	}
}

// postrouting is a base chain that depends on the node.
func (r *ruleset) postrouting() nft.Chain {
	return nft.NewChain("nat-postrouting", access.NATPostrouting,
		rule(nft.MarkHas(r.mark), nft.SetMarkBit(r.mark, false), access.NewSource(r.Node)),
		rule(nft.LeavesNotBy("lo"), in(nft.Join(r.Saddr(), r.Daddr()), hairpin), access.NewSource(r.Node)).Comment("a client that is its own endpoint"))
}

// nodeChains are written anew when the node's facts change. Each comes before
// those that jump to it.
func (r *ruleset) nodeChains() []nft.Chain {
	chain := nft.NewChain
	fe := r.Frontend()
	return append(access.SourceChains(r.IPFamily, r.Node), []nft.Chain{
		chain("check-cluster-ips", nil,
			r.Unallocated(notIn(r.Daddr(), vips))),
		chain("reject", nil, r.refuse(r.Reject())...),
		chain("drop", nil, r.refuse(nft.Drop())...),
		chain("no-endpoints", nil, r.noEndpoints()...),
		chain("chosen-by-address", nil, r.sourceRules(fe, masquerade, decision)...),
		chain("chosen", nil, r.chosen(fe, masquerade)...),
		chain("nodeport-chosen", nil, r.chosen(access.NodePort, nodePortMasquerade)...),
		chain("nodeports", nil,
			rule(nft.SetMark(markOf(access.NodePort, nodePortMarks)), nft.GoTo("nodeport-chosen")),
			rule(in(access.NodePort, rejectedNodePorts), nft.GoTo("reject")),
			rule(in(access.NodePort, droppedNodePorts), nft.GoTo("drop"))),
		chain("internal-nodeports", nil,
			rule(nft.SetMark(markOf(access.NodePort, internalNodePortMarks)), nft.GoTo("nodeport-chosen"))),
		chain("external", nil, r.external(fe)...),
		chain("internal", nil, r.internal(fe)...),
		chain("services", nil, r.services(fe)...),
		chain("decided", nil, r.decided()...),
	}...)
}

// services finds out where a packet that opens a connection comes from.
func (r *ruleset) services(fe nft.Value) []nft.Rule {
	rules := []nft.Rule{
		rule(nft.PriorityBitsAre(decisionMask, decision), nft.Return()).Comment("IPVS has redirected it"),
	}
	rules = append(rules, r.CheckSources()...)
	for _, match := range r.FromPods() {
		rules = append(rules, rule(match, nft.SetPriority(fromPods), nft.GoTo("internal")))
	}
	return append(rules,
		rule(nft.SaddrIsLocal(), nft.SetPriority(fromNode), nft.GoTo("internal")),
		rule(nft.SetPriority(fromOutside), nft.GoTo("external")))
}

// internal chooses for traffic of this node and its Pods, where that goes
// elsewhere than other traffic. The mark 0 stands for no endpoints.
func (r *ruleset) internal(fe nft.Value) []nft.Rule {
	rules := []nft.Rule{rule(nft.SetMark(markOf(fe, internalMarks)), nft.GoTo("chosen"))}
	for _, match := range r.ToNodePortAddrs() {
		rules = append(rules, rule(append(match, nft.Jump("internal-nodeports"))...))
	}
	return append(rules,
		rule(nft.PriorityBitsAre(decisionMask, decision), nft.Return()),
		rule(nft.GoTo("external")))
}

// external chooses for all other traffic. Ports of virtual addresses at which
// no Service is are refused, or they would be those of the node's daemons.
func (r *ruleset) external(fe nft.Value) []nft.Rule {
	rules := []nft.Rule{
		rule(in(fe, plainServers), nft.GoTo("chosen-by-address")),
		rule(nft.SetMark(markOf(fe, marks)), nft.GoTo("chosen")),
		rule(in(fe, rejected), nft.GoTo("reject")),
		rule(in(fe, dropped), nft.GoTo("drop")),
		rule(in(fe, healthChecks), nft.ClearPriority(), accept()),
	}
	for _, p := range plan.Protocols {
		rules = append(rules, rule(nft.ProtocolIs(p), in(r.Daddr(), vips), r.Reject()).Comment("no such port"))
	}
	for _, match := range r.ToNodePortAddrs() {
		rules = append(rules, rule(append(match, nft.Jump("nodeports"))...))
	}
	return append(rules,
		rule(nft.PriorityBitsAre(decisionMask, decision), nft.Return()),
		rule(nft.ClearPriority()))
}

// chosen goes on with a virtual server that is known by its mark.
func (r *ruleset) chosen(key nft.Value, masquerade nft.SetID) []nft.Rule {
	return append([]nft.Rule{
		rule(nft.MarkIs(^uint32(0), noEndpoints), nft.GoTo("no-endpoints")),
		rule(nft.MarkIs(stickyMask, stickySpace), nft.Jump("recall")),
	}, r.sourceRules(key, masquerade, decision|marked)...)
}

// sourceRules remember in the priority whether the source is to be rewritten.
// That of a process of this node, which the kernel gave the virtual address as
// its own, always is: answers to it would not come back.
func (r *ruleset) sourceRules(key nft.Value, masquerade nft.SetID, decided uint32) []nft.Rule {
	return []nft.Rule{
		rule(in(nft.Join(key, nft.Priority), masquerade), nft.SetPriority(decided|newSource), nft.Return()),
		rule(in(r.Saddr(), vips), nft.SetPriority(decided|newSource), nft.Return()),
		rule(nft.SetPriority(decided)),
	}
}

// refuse ends a connection that has no endpoints. What the node sends to an address
// that it holds besides the virtual ones passes the output hook, and is refused at the
// input hook: a process whose packet is rejected at the output hook gets EPERM in place
// of ECONNREFUSED.
func (r *ruleset) refuse(verdict nft.Statement) []nft.Rule {
	return []nft.Rule{
		rule(in(r.Daddr(), vips), verdict),
		rule(nft.HasEntered(), verdict),
		rule(nft.ClearPriority()),
	}
}

// noEndpoints answers where internal traffic alone has no endpoints.
func (r *ruleset) noEndpoints() []nft.Rule {
	fe := r.Frontend()
	clear := nft.SetMark(nft.ConstantMark(0))
	return []nft.Rule{
		rule(clear, in(fe, rejected), nft.GoTo("reject")),
		rule(in(fe, dropped), nft.GoTo("drop")),
		rule(in(access.NodePort, rejectedNodePorts), nft.GoTo("reject")),
		rule(in(access.NodePort, droppedNodePorts), nft.GoTo("drop")),
	}
}

// decided takes the decision out of the packet once IPVS has followed it.
func (r *ruleset) decided() []nft.Rule {
	isMarked := nft.PriorityBitsAre(decisionMask|marked, decision|marked)
	rules := []nft.Rule{
		rule(isMarked, nft.MarkIs(stickyMask|endpointFlag, stickySpace), nft.Jump("learn")),
		rule(isMarked, nft.SetMark(nft.ConstantMark(0))),
		rule(nft.PriorityBitsAre(decisionMask|newSource, decision|newSource), nft.SetMarkBit(r.mark, true)),
	}
	if match := r.BetweenNodes(); match != nil {
		rules = append(rules, rule(slices.Concat([]nft.Statement{nft.PriorityBitsAre(decisionMask, decision)}, match,
			[]nft.Statement{nft.SetMarkBit(r.mark, true)})...).Comment("from another node to another node"))
	}
	return append(rules, rule(nft.PriorityBitsAre(decisionMask, decision), nft.ClearPriority()))
}

// affinityChains recall and learn a client's endpoint. A client is known by
// the mark of its endpoint, which is that of a virtual server with this one
// destination; a client that is not known is scheduled by the virtual server of
// the endpoint set, and what the scheduler chose is learnt afterwards from the
// packet.
//
// What the map remembers has to be deleted where it is not in the set: to
// update a key that exists starts its time again and keeps the old endpoint.
func (r *ruleset) affinityChains() []nft.Chain {
	var chains []nft.Chain
	var recall, learn []nft.Rule
	block := nft.MarkBits(blockMask, 0)
	client := nft.Join(r.Saddr(), block)
	for class, timeout := range r.timeouts {
		for v := range maxVariants {
			low := uint32(class)<<variantBits | uint32(v)
			name := fmt.Sprintf("recall-%ds-%d", int(timeout/time.Second), v)
			isEndpoint := nft.MarkIs(endpointFlag, endpointFlag)
			chains = append(chains, nft.NewChain(name, nil,
				rule(nft.SetMark(markOf(client, affinity))),
				rule(in(nft.Mark, affinityMembers+nft.SetID(v)), nft.Remember(setNames[affinity], client, nft.Mark, timeout), nft.Return()),
				rule(isEndpoint, nft.Forget(setNames[affinity], client, nft.Mark)).Comment("its endpoint is gone"),
				rule(nft.SetMark(nft.MarkBits(blockMask|low, low)))))
			recall = append(recall, rule(nft.MarkIs(^blockMask, low), nft.GoTo(name)))
		}
		name := fmt.Sprintf("learn-%ds", int(timeout/time.Second))
		chains = append(chains, nft.NewChain(name, nil,
			rule(nft.SetMark(markOf(nft.Join(block, r.Daddr(), nft.DPort), affinityMarks)),
				nft.Remember(setNames[affinity], client, nft.Mark, timeout))))
		learn = append(learn, rule(nft.MarkIs(^blockMask&^(maxVariants-1), uint32(class)<<variantBits), nft.GoTo(name)))
	}
	return append(chains, nft.NewChain("recall", nil, recall...), nft.NewChain("learn", nil, learn...))
}

func rulesetOf(f *nft.IPFamily, mark uint32, n plan.Node, timeouts []time.Duration) *ruleset {
	return &ruleset{access.Rules{IPFamily: f, Node: n, VirtualAddrs: setNames[vips]}, mark, timeouts}
}
