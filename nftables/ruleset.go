// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// ruleset makes the rules from the facts of a node.
type ruleset struct {
	access.Rules
	mark uint32
}

func rulesetOf(f *nft.IPFamily, mark uint32, n plan.Node) ruleset {
	return ruleset{access.Rules{IPFamily: f, Node: n}, mark}
}

// chains are all chains of the table.
func (r ruleset) chains(st *state) []nft.Chain {
	return slices.Concat(r.fixedChains(), pickChainRules(r.IPFamily, st.sortedChains()), r.nodeChains(), r.baseChains())
}

// fixedChains do not depend on the node.
func (r ruleset) fixedChains() []nft.Chain {
	return []nft.Chain{
		{Name: "pick-endpoint", Rules: []nft.Rule{
			nft.NewRule(verdictOf(nft.PriorityBits(chainMask, 0), pickChains)),
			nft.NewRule(nft.GoTo(pickChain{size: 1}.name())).Comment("the set shrank just now: its first endpoint"),
		}},
	}
}

// baseChains bind the other chains to the kernel's hooks.
func (r ruleset) baseChains() []nft.Chain {
	return []nft.Chain{
		{Name: "filter-prerouting-pre-dnat", Hook: access.PreDNATPrerouting, Rules: []nft.Rule{nft.NewRule(nft.StateNew(), nft.Jump("check-sources"))}},
		{Name: "filter-output-pre-dnat", Hook: access.PreDNATOutput, Rules: []nft.Rule{nft.NewRule(nft.StateNew(), nft.Jump("check-sources"))}},
		{Name: "filter-input", Hook: access.FilterInput, Rules: []nft.Rule{nft.NewRule(nft.StateNew(), nft.Jump("check-local"))}},
		{Name: "filter-forward", Hook: access.FilterForward, Rules: []nft.Rule{nft.NewRule(nft.StateNew(), nft.Jump("check-remote"))}},
		{Name: "filter-output", Hook: access.FilterOutput, Rules: []nft.Rule{nft.NewRule(nft.StateNew(), nft.Jump("check-remote"))}},
		{Name: "nat-prerouting", Hook: access.NATPrerouting, Rules: []nft.Rule{nft.NewRule(nft.Jump("services"))}},
		{Name: "nat-output", Hook: access.NATOutput, Rules: []nft.Rule{nft.NewRule(nft.Jump("services"))}},
		r.postrouting(),
	}
}

// postrouting is the base chain that depends on the node.
func (r ruleset) postrouting() nft.Chain {
	return nft.Chain{Name: "nat-postrouting", Hook: access.NATPostrouting, Rules: []nft.Rule{
		nft.NewRule(nft.MarkHas(r.mark), nft.SetMarkBit(r.mark, false), access.NewSource(r.Node)),
		nft.NewRule(nft.IsDNATed(), in(nft.Join(r.Saddr(), r.Daddr()), hairpin), access.NewSource(r.Node)).Comment("a client that is its own endpoint"),
		nft.NewRule(nft.IsDNATed(), nft.Jump("between-nodes")),
	}}
}

// nodeChains depend on the node. A chain stands before those that jump to it.
func (r ruleset) nodeChains() []nft.Chain {
	chains := append(append(r.localhostChains(), access.SourceChains(r.IPFamily, r.Node)...), []nft.Chain{
		{Name: "between-nodes", Rules: r.betweenNodes()},
		{Name: "check-sources", Rules: append(r.CheckSources(), r.ResetStrays(
			nft.SetPriorityFrom(idLookedUp(r.Frontend(), masquerade)), nft.SetPriorityFrom(idLookedUp(access.NodePort, nodePortMasquerade)))...)},
		{Name: "check-local", Rules: r.checkLocal()},
		{Name: "check-remote", Rules: r.checkRemote()},
	}...)
	for sources := plan.FromPods; sources <= plan.AnySource; sources++ {
		chains = append(chains, nft.Chain{Name: markChain(sources), Rules: r.markRules(sources)})
	}
	services := append(r.Bypass(), nft.NewRule(nft.SetPriorityFrom(idLookedUp(r.Frontend(), masquerade)), nft.GoTo("service")))
	for _, match := range r.ToNodePortAddrs() {
		services = append(services,
			nft.NewRule(append(match, nft.SetPriorityFrom(idLookedUp(access.NodePort, nodePortMasquerade)), nft.GoTo("nodeport"))...))
	}
	return append(chains,
		nft.Chain{Name: "nodeport", Rules: r.setRules(access.NodePort, internalNodePorts, nodePorts)},
		nft.Chain{Name: "service", Rules: r.setRules(r.Frontend(), internalFrontends, frontends)},
		nft.Chain{Name: "services", Rules: services})
}

// setRules mark packets to masquerade: the priority holds the traffic sources to
// masquerade. Then they look up the endpoint set of the frontend. For traffic of this
// node and its Pods they look into the internal map first.
func (r ruleset) setRules(key nft.Value, internal, external nft.SetID) []nft.Rule {
	choose := nft.SetPriorityFrom(idLookedUp(key, internal))
	rules := []nft.Rule{nft.NewRule(verdictOf(nft.Priority, markChains))}
	for _, match := range r.FromPods() {
		rules = append(rules, nft.NewRule(match, choose, nft.GoTo("pick-endpoint")))
	}
	return append(rules,
		nft.NewRule(nft.SaddrIsLocal(), choose, nft.GoTo("pick-endpoint")),
		nft.NewRule(nft.SetPriorityFrom(idLookedUp(key, external)), nft.GoTo("pick-endpoint")))
}

// betweenNodes masquerades packets from a Pod of another node to an endpoint of another
// node.
func (r ruleset) betweenNodes() []nft.Rule {
	match := r.BetweenNodes()
	if match == nil {
		return nil
	}
	return []nft.Rule{nft.NewRule(append(match, access.NewSource(r.Node))...)}
}

// markChain names the chain that marks packets from these sources.
func markChain(sources plan.TrafficSources) string {
	switch sources {
	case plan.FromPods:
		return "mark-from-pods"
	case plan.FromNode:
		return "mark-from-node"
	case plan.FromOutside:
		return "mark-from-outside"
	case plan.FromPods | plan.FromNode:
		return "mark-unless-outside"
	case plan.FromPods | plan.FromOutside:
		return "mark-unless-node"
	case plan.FromNode | plan.FromOutside:
		return "mark-unless-pods"
	}
	return "mark-always"
}

// markRules mark packets from these sources for masquerading. A packet from the address
// of a Pod counts as from a Pod, even if the node has that address too, as with a bridge
// of Pods.
func (r ruleset) markRules(sources plan.TrafficSources) []nft.Rule {
	mark := nft.SetMarkBit(r.mark, true)
	if sources == plan.AnySource {
		return []nft.Rule{nft.NewRule(mark)}
	}
	var rules []nft.Rule
	decide := func(match nft.Statement, source plan.TrafficSources) {
		if sources&source != 0 {
			rules = append(rules, nft.NewRule(match, mark, nft.Return()))
			return
		}
		rules = append(rules, nft.NewRule(match, nft.Return()))
	}
	for _, match := range r.FromPods() {
		decide(match, plan.FromPods)
	}
	decide(nft.SaddrIsLocal(), plan.FromNode)
	if sources&plan.FromOutside != 0 {
		rules = append(rules, nft.NewRule(mark))
	}
	return rules
}

// withoutDNAT begins both checks for frontends without endpoints. A connection that has
// an endpoint needs no check.
func withoutDNAT() []nft.Rule {
	return []nft.Rule{
		nft.NewRule(nft.PriorityBitsAre(idSpaceMask, idSpace), nft.ClearPriority()).Comment("the id is not needed any more"),
		nft.NewRule(nft.IsDNATed(), nft.Return()),
	}
}

// checkLocal rejects or drops packets to this node for a frontend without endpoints.
func (r ruleset) checkLocal() []nft.Rule {
	return slices.Concat(withoutDNAT(), r.Bypass(), r.RejectFrontends(), r.RejectNodePorts(), r.toLocalhost())
}

// checkRemote does the same with packets to other hosts. It also rejects packets to
// ports of cluster IPs that no Service has, and drops packets to unallocated cluster
// IPs. Packets of the node to itself pass, because checkLocal sees them next: a process
// whose packet is rejected at the output hook gets EPERM instead of ECONNREFUSED. So
// packets to an address that the node has, such as that of a local DNS server, reach the
// program there.
func (r ruleset) checkRemote() []nft.Rule {
	return append(slices.Concat(withoutDNAT(), r.Bypass(), r.RejectFrontends(nft.DaddrIsNotLocal())),
		nft.NewRule(in(r.Daddr(), clusterIPs), nft.DaddrIsNotLocal(), r.Reject()).Comment("no such port"),
		r.Unallocated())
}

// pickChain is a chain that picks one of size endpoints.
type pickChain struct {
	size     int
	timeout  time.Duration // of affinity; 0 without
	setIndex int           // with affinity: which of the Service port's sets
	large    bool          // with affinity: the Service port has a large range of ids
}

func (c pickChain) name() string {
	if c.timeout == 0 {
		return fmt.Sprintf("pick-%d", c.size)
	}
	name := fmt.Sprintf("pick-%d-affinity-%ds", c.size, int(c.timeout/time.Second))
	if c.setIndex > 0 {
		name += fmt.Sprintf("-set-%d", c.setIndex)
	}
	if c.large {
		name += "-large"
	}
	return name
}

func (c pickChain) chain(f *nft.IPFamily) nft.Chain {
	if c.timeout == 0 {
		return nft.Chain{Name: c.name(), Rules: []nft.Rule{
			nft.NewRule(f.DNATTo(lookedUp(nft.Join(nft.PriorityBits(^chainMask, 0), nft.Random(c.size)), endpoints))),
		}}
	}
	return nft.Chain{Name: c.name(), Rules: c.stickyRules(f)}
}

func pickChainRules(f *nft.IPFamily, list []pickChain) []nft.Chain {
	chains := make([]nft.Chain, len(list))
	for i, c := range list {
		chains[i] = c.chain(f)
	}
	return chains
}

// stickyRules pick with session affinity. At the start the priority holds the id of the
// endpoint set: the Service port's number in the bits of mask, below them the chain's
// number.
//
//  1. A client that is in the affinity map keeps its endpoint if that is in this set.
//  2. If it is not, the priority holds the id of the old endpoint. The client is
//     deleted from the map, because an update would keep the old endpoint.
//  3. An endpoint is drawn and written to the map.
//  4. It is read back, because two connections of one client can race on two
//     processors. The endpoint of the first one serves both.
//  5. If the map is full, the drawn endpoint serves.
func (c pickChain) stickyRules(f *nft.IPFamily) []nft.Rule {
	mask, flag := rangeMask(c.large), endpointFlag(c.large)
	known := affinityEndpoints + nft.SetID(c.setIndex)
	client := nft.Join(f.Saddr(), nft.PriorityBits(mask, 0))
	lookUpClient := nft.SetPriorityFrom(idLookedUp(client, affinity))
	toKnown := f.DNATTo(lookedUp(nft.Priority, known))
	draw := func(n int) nft.Statement {
		return nft.SetPriorityFrom(idLookedUp(nft.Join(nft.PriorityBits(mask, uint32(c.setIndex)), nft.Random(n)), affinitySlots))
	}
	return []nft.Rule{
		nft.NewRule(lookUpClient, remember(client, nft.Priority, c.timeout), toKnown),
		nft.NewRule(nft.PriorityBitsAre(flag, flag), forget(client, nft.Priority)).Comment("its endpoint is gone"),
		nft.NewRule(draw(c.size), remember(client, nft.Priority, c.timeout)),
		nft.NewRule(lookUpClient),
		nft.NewRule(toKnown),
		nft.NewRule(draw(1), toKnown).Comment("the set changed just now: its first endpoint"),
	}
}

// sizeIsNumber says whether the number of the chain in ids is its size.
func (c pickChain) sizeIsNumber() bool { return c.timeout == 0 && c.size <= maxSizeAsNumber }

// permanent says whether the chain always exists.
func (c pickChain) permanent() bool { return c.timeout == 0 && c.size <= permanentChains }

func (c pickChain) compare(o pickChain) int {
	large := func(b bool) int {
		if b {
			return 1
		}
		return 0
	}
	return cmp.Or(
		cmp.Compare(c.timeout, o.timeout),
		cmp.Compare(c.size, o.size),
		cmp.Compare(c.setIndex, o.setIndex),
		cmp.Compare(large(c.large), large(o.large)),
	)
}

// in matches a packet whose value is an element of the set.
func in(v nft.Value, set nft.SetID) nft.Statement { return nft.In(v, allSets[set].Name) }

// lookedUp is the datum that the map has for v. Without one the packet leaves the rule.
func lookedUp(v nft.Value, m nft.SetID) nft.Value { return nft.LookedUp(v, allSets[m].Name) }

// verdictOf jumps to the chain that the verdict map has for v, if any.
func verdictOf(v nft.Value, m nft.SetID) nft.Statement { return nft.VerdictOf(v, allSets[m].Name) }

// idLookedUp is the id that the map has for v.
func idLookedUp(v nft.Value, m nft.SetID) nft.Value { return nft.MarkLookedUp(v, allSets[m].Name) }

// remember puts key -> id into the affinity map for the given time.
func remember(key, id nft.Value, timeout time.Duration) nft.Statement {
	return nft.Remember(allSets[affinity].Name, key, id, timeout)
}

// forget removes the key from the affinity map.
func forget(key, id nft.Value) nft.Statement { return nft.Forget(allSets[affinity].Name, key, id) }
