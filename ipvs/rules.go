// SPDX-License-Identifier: Apache-2.0

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

// IPVS handles packets to local addresses at the priorities 98 and 99 of the input hook, and
// packets of local processes at -99 and -98 of the output hook. Packets that it redirects pass
// the whole output hook. So rules choose the virtual server before these priorities, and
// clear mark and priority after them.
var (
	beforeInput  = nft.NewHook(nftables.ChainHookInput, 90, "type filter hook input priority 90")
	beforeOutput = nft.NewHook(nftables.ChainHookOutput, -110, "type filter hook output priority -110")
	afterInput   = nft.NewHook(nftables.ChainHookInput, 101, "type filter hook input priority 101")
	afterOutput  = nft.NewHook(nftables.ChainHookOutput, -97, "type filter hook output priority -97")
)

// The packet priority of a connection's first packet holds the traffic source, and then whether
// to rewrite the source address. The packet mark has no room for that: it is exactly the
// virtual server's.
const (
	fromPods    uint32 = 0x4000_0001
	fromNode    uint32 = 0x4000_0002
	fromOutside uint32 = 0x4000_0003

	toServer      uint32 = 0x4000_0010 // the packet goes to a virtual server
	toServerMask  uint32 = 0xffff_fff0
	rewriteSource uint32 = 1
	byMark        uint32 = 2 // the packet mark is the virtual server's
)

// trafficSources lists the traffic sources with their priorities.
var trafficSources = []struct {
	source   plan.TrafficSources
	priority uint32
}{
	{plan.FromPods, fromPods}, {plan.FromNode, fromNode}, {plan.FromOutside, fromOutside},
}

// ruleset makes the chains.
type ruleset struct {
	access.Rules
	mark uint32 // asks for masquerade
	// timeouts are the affinity timeouts. A mark holds the index.
	timeouts []time.Duration
}

var rule = nft.NewRule

// chains are all chains of the table. Each comes before the chains that jump to it.
func (r *ruleset) chains() []nft.Chain {
	return append(append(r.affinityChains(), r.nodeChains()...), r.baseChains()...)
}

func (r *ruleset) baseChains() []nft.Chain {
	isNew, chain := nft.StateNew(), nft.NewChain
	noService := rule(isNew, nft.Jump("check-cluster-ips"))
	return []nft.Chain{
		chain("before-ipvs-input", beforeInput, rule(isNew, nft.Jump("services"))),
		chain("before-ipvs-output", beforeOutput, rule(isNew, nft.Jump("services"))),
		chain("after-ipvs-input", afterInput, rule(isNew, nft.Jump("clear-marks"))),
		chain("after-ipvs-output", afterOutput, rule(isNew, nft.Jump("clear-marks"))),
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

// nodeChains are replaced when the node's facts change. Each comes before the chains that jump
// to it.
func (r *ruleset) nodeChains() []nft.Chain {
	chain := nft.NewChain
	fe := r.Frontend()
	return append(access.SourceChains(r.IPFamily, r.Node), []nft.Chain{
		chain("check-cluster-ips", nil,
			append(r.Bypass(), r.Unallocated(notIn(r.Daddr(), vips)))...),
		chain("reject", nil, r.refuse(r.Reject())...),
		chain("drop", nil, r.refuse(nft.Drop())...),
		chain("no-endpoints", nil, r.noEndpoints()...),
		chain("server-by-address", nil, r.sourceRules(fe, masquerade, toServer)...),
		chain("server-by-mark", nil, r.serverByMark(fe, masquerade)...),
		chain("nodeport-server-by-mark", nil, r.serverByMark(access.NodePort, nodePortMasquerade)...),
		chain("nodeports", nil,
			rule(nft.SetMark(lookUpMark(access.NodePort, nodePortMarks)), nft.GoTo("nodeport-server-by-mark")),
			rule(in(access.NodePort, access.RejectedNodePorts), nft.GoTo("reject")),
			rule(in(access.NodePort, access.DroppedNodePorts), nft.GoTo("drop"))),
		chain("internal-nodeports", nil,
			rule(nft.SetMark(lookUpMark(access.NodePort, internalNodePortMarks)), nft.GoTo("nodeport-server-by-mark"))),
		chain("external", nil, r.external(fe)...),
		chain("internal", nil, r.internal(fe)...),
		chain("services", nil, r.services()...),
		chain("clear-marks", nil, r.clearMarks()...),
	}...)
}

// services finds the traffic source of a connection.
func (r *ruleset) services() []nft.Rule {
	rules := append(r.Bypass(),
		rule(nft.PriorityBitsAre(toServerMask, toServer), nft.Return()).Comment("IPVS has redirected it"))
	rules = append(rules, r.CheckSources()...)
	for _, match := range r.FromPods() {
		rules = append(rules, rule(match, nft.SetPriority(fromPods), nft.GoTo("internal")))
	}
	return append(rules,
		rule(nft.SaddrIsLocal(), nft.SetPriority(fromNode), nft.GoTo("internal")),
		rule(nft.SetPriority(fromOutside), nft.GoTo("external")))
}

// internal chooses the virtual server for traffic of this node and its Pods, if it differs from
// the server for other traffic.
func (r *ruleset) internal(fe nft.Value) []nft.Rule {
	rules := []nft.Rule{rule(nft.SetMark(lookUpMark(fe, internalMarks)), nft.GoTo("server-by-mark"))}
	for _, match := range r.ToNodePortAddrs() {
		rules = append(rules, rule(append(match, nft.Jump("internal-nodeports"))...))
	}
	return append(rules,
		rule(nft.PriorityBitsAre(toServerMask, toServer), nft.Return()),
		rule(nft.GoTo("external")))
}

// external chooses the virtual server for all other traffic. Ports of virtual addresses without
// a Service are rejected, so that no daemon of the node is reachable there.
func (r *ruleset) external(fe nft.Value) []nft.Rule {
	rules := []nft.Rule{
		rule(in(fe, serversByAddress), nft.GoTo("server-by-address")),
		rule(nft.SetMark(lookUpMark(fe, marks)), nft.GoTo("server-by-mark")),
		rule(in(fe, access.Rejected), nft.GoTo("reject")),
		rule(in(fe, access.Dropped), nft.GoTo("drop")),
		rule(in(fe, healthChecks), nft.ClearPriority(), nft.Return()),
	}
	for _, p := range plan.Protocols {
		rules = append(rules, rule(nft.ProtocolIs(p), in(r.Daddr(), vips), r.Reject()).Comment("no such port"))
	}
	for _, match := range r.ToNodePortAddrs() {
		rules = append(rules, rule(append(match, nft.Jump("nodeports"))...))
	}
	return append(rules,
		rule(nft.PriorityBitsAre(toServerMask, toServer), nft.Return()),
		rule(nft.ClearPriority()))
}

// serverByMark handles packets whose mark is a virtual server's.
func (r *ruleset) serverByMark(key nft.Value, masquerade nft.SetID) []nft.Rule {
	return append([]nft.Rule{
		rule(nft.MarkIs(^uint32(0), noEndpoints), nft.GoTo("no-endpoints")),
		rule(nft.MarkIs(affinityMask, affinitySpace), nft.Jump("affinity-lookup")),
	}, r.sourceRules(key, masquerade, toServer|byMark)...)
}

// sourceRules set the priority of a packet to a virtual server. The kernel gives a local process
// the virtual address as its source address. It is always rewritten, because answers to it
// would not come back.
func (r *ruleset) sourceRules(key nft.Value, masquerade nft.SetID, server uint32) []nft.Rule {
	return []nft.Rule{
		rule(in(nft.Join(key, nft.Priority), masquerade), nft.SetPriority(server|rewriteSource), nft.Return()),
		rule(in(r.Saddr(), vips), nft.SetPriority(server|rewriteSource), nft.Return()),
		rule(nft.SetPriority(server)),
	}
}

// refuse ends a connection without endpoints. If a process of the node connects to an address
// of another device, its packet is refused at the input hook: a reject at the output hook
// gives the process EPERM instead of ECONNREFUSED.
func (r *ruleset) refuse(verdict nft.Statement) []nft.Rule {
	var rules []nft.Rule
	if r.Node.ResetStrays {
		// At a frontend with endpoints, the node itself resets what IPVS does not take.
		rules = append(rules, rule(nft.MidStream(), nft.Reset()))
	}
	return append(rules,
		rule(in(r.Daddr(), vips), verdict),
		rule(nft.HasEntered(), verdict),
		rule(nft.ClearPriority()))
}

// noEndpoints refuses internal traffic of a frontend that has endpoints for other traffic.
func (r *ruleset) noEndpoints() []nft.Rule {
	fe := r.Frontend()
	clearMark := nft.SetMark(nft.ConstantMark(0))
	return []nft.Rule{
		rule(clearMark, in(fe, access.Rejected), nft.GoTo("reject")),
		rule(in(fe, access.Dropped), nft.GoTo("drop")),
		rule(in(access.NodePort, access.RejectedNodePorts), nft.GoTo("reject")),
		rule(in(access.NodePort, access.DroppedNodePorts), nft.GoTo("drop")),
	}
}

// clearMarks clears mark and priority after IPVS, and asks for masquerade.
func (r *ruleset) clearMarks() []nft.Rule {
	isMarked := nft.PriorityBitsAre(toServerMask|byMark, toServer|byMark)
	rules := []nft.Rule{
		rule(isMarked, nft.MarkIs(affinityMask|endpointFlag, affinitySpace), nft.Jump("affinity-store")),
		rule(isMarked, nft.SetMark(nft.ConstantMark(0))),
		rule(nft.PriorityBitsAre(toServerMask|rewriteSource, toServer|rewriteSource), nft.SetMarkBit(r.mark, true)),
	}
	if match := r.BetweenNodes(); match != nil {
		rules = append(rules, rule(slices.Concat([]nft.Statement{nft.PriorityBitsAre(toServerMask, toServer)}, match,
			[]nft.Statement{nft.SetMarkBit(r.mark, true)})...).Comment("from another node to another node"))
	}
	return append(rules, rule(nft.PriorityBitsAre(toServerMask, toServer), nft.ClearPriority()))
}

// affinityChains look up and store the endpoint of a client. The map of clients has the mark of
// the endpoint's virtual server. The virtual server of the endpoint set schedules a client that
// is not in the map. Afterwards the destination of the packet is the endpoint to store.
//
// An entry whose endpoint has left the set is deleted: an update of an existing key would
// restart its timeout and keep the old endpoint.
func (r *ruleset) affinityChains() []nft.Chain {
	var chains []nft.Chain
	var lookup, store []nft.Rule
	first := nft.MarkBits(rangeMask, 0)
	client := nft.Join(r.Saddr(), first)
	for i, timeout := range r.timeouts {
		for v := range maxEndpointSets {
			low := uint32(i)<<setIndexBits | uint32(v)
			name := fmt.Sprintf("affinity-lookup-%ds-%d", int(timeout/time.Second), v)
			isEndpoint := nft.MarkIs(endpointFlag, endpointFlag)
			chains = append(chains, nft.NewChain(name, nil,
				rule(nft.SetMark(lookUpMark(client, affinity))),
				rule(in(nft.Mark, affinityMembers+nft.SetID(v)), nft.Remember(setNames[affinity], client, nft.Mark, timeout), nft.Return()),
				rule(isEndpoint, nft.Forget(setNames[affinity], client, nft.Mark)).Comment("its endpoint is gone"),
				rule(nft.SetMark(nft.MarkBits(rangeMask|low, low)))))
			lookup = append(lookup, rule(nft.MarkIs(^rangeMask, low), nft.GoTo(name)))
		}
		name := fmt.Sprintf("affinity-store-%ds", int(timeout/time.Second))
		chains = append(chains, nft.NewChain(name, nil,
			rule(nft.SetMark(lookUpMark(nft.Join(first, r.Daddr(), nft.DPort), affinityMarks)),
				nft.Remember(setNames[affinity], client, nft.Mark, timeout))))
		store = append(store, rule(nft.MarkIs(^rangeMask&^(maxEndpointSets-1), uint32(i)<<setIndexBits), nft.GoTo(name)))
	}
	return append(chains, nft.NewChain("affinity-lookup", nil, lookup...), nft.NewChain("affinity-store", nil, store...))
}

func newRuleset(f *nft.IPFamily, mark uint32, n plan.Node, timeouts []time.Duration) *ruleset {
	return &ruleset{access.Rules{IPFamily: f, Node: n, VirtualAddrs: setNames[vips]}, mark, timeouts}
}
