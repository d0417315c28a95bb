package nftables

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"signalbox/proxier/plan"
)

// ruleset makes the chains that every node has. Those that node makes a
// difference to are in nodeChains.
type ruleset struct {
	*family
	mark uint32
	node plan.Node
}

// frontendOf is the key of the maps by frontend.
func (r ruleset) frontendOf() value { return join(r.daddr(), l4proto, dport) }

// nodePortOf is the key of the maps by node port.
var nodePortOf = join(l4proto, dport)

// fixedChains do not depend on the node. Chains come before those that jump to
// them.
func (r ruleset) fixedChains() []chain {
	return []chain{
		{name: "pick-endpoint", rules: []rule{
			newRule(verdictOf(priorityBits(chainMask, 0), pickChains)),
			newRule(goTo(sizedChain{size: 1}.name())).because("the set shrank just now: its first endpoint"),
		}},
	}
}

// baseChains bind the others to the kernel's hooks.
func (r ruleset) baseChains() []chain {
	return []chain{
		{name: "filter-prerouting-pre-dnat", hook: preDNATPrerouting, rules: []rule{newRule(stateNew(), jump("check-sources"))}},
		{name: "filter-output-pre-dnat", hook: preDNATOutput, rules: []rule{newRule(stateNew(), jump("check-sources"))}},
		{name: "filter-input", hook: filterInput, rules: []rule{newRule(stateNew(), jump("check-local"))}},
		{name: "filter-forward", hook: filterForward, rules: []rule{newRule(stateNew(), jump("check-remote"))}},
		{name: "filter-output", hook: filterOutput, rules: []rule{newRule(stateNew(), jump("check-remote"))}},
		{name: "nat-prerouting", hook: natPrerouting, rules: []rule{newRule(jump("services"))}},
		{name: "nat-output", hook: natOutput, rules: []rule{newRule(jump("services"))}},
		r.postrouting(),
	}
}

// postrouting is a base chain that depends on the node.
func (r ruleset) postrouting() chain {
	return chain{name: "nat-postrouting", hook: natPostrouting, rules: []rule{
		newRule(markHas(r.mark), setMarkBit(r.mark, false), NewSource(r.node)),
		newRule(isDNATed(), in(join(r.saddr(), r.daddr()), hairpin), NewSource(r.node)).because("a client that is its own endpoint"),
		newRule(isDNATed(), jump("between-nodes")),
	}}
}

// nodeChains are written anew when the node's facts change.
func (r ruleset) nodeChains() []chain {
	chains := append(append(r.localhostChains(), SourceChains(r.family, r.node)...), []chain{
		{name: "refuse", rules: r.refuse(r.frontendOf(), dropped)},
		{name: "refuse-nodeport", rules: r.refuse(nodePortOf, droppedNodePorts)},
		{name: "between-nodes", rules: r.betweenNodes()},
		{name: "check-sources", rules: r.checkSources()},
		{name: "check-local", rules: r.checkLocal()},
		{name: "check-remote", rules: r.checkRemote()},
	}...)
	for origins := plan.FromPods; origins <= plan.AnySource; origins++ {
		chains = append(chains, chain{name: markChain(origins), rules: r.markRules(origins)})
	}
	services := []rule{newRule(setPriority(idLookedUp(r.frontendOf(), masquerade)), goTo("service"))}
	for _, match := range r.toNodePortAddrs() {
		services = append(services,
			newRule(append(match, setPriority(idLookedUp(nodePortOf, nodePortMasquerade)), goTo("nodeport"))...))
	}
	return append(chains,
		chain{name: "nodeport", rules: r.setRules(nodePortOf, internalNodePorts, nodePorts)},
		chain{name: "service", rules: r.setRules(r.frontendOf(), internalFrontends, frontends)},
		chain{name: "services", rules: services})
}

// setRules mark what is to be masqueraded, by the origins that the priority holds,
// and look the endpoint set up, first among those for internal traffic.
func (r ruleset) setRules(key value, internal, external setID) []rule {
	choose := setPriority(idLookedUp(key, internal))
	rules := []rule{newRule(verdictOf(priority, markChains))}
	for _, match := range r.fromPods() {
		rules = append(rules, newRule(match, choose, goTo("pick-endpoint")))
	}
	return append(rules,
		newRule(fibLocal(true), choose, goTo("pick-endpoint")),
		newRule(setPriority(idLookedUp(key, external)), goTo("pick-endpoint")))
}

// fromPods are the ways to tell packets of local Pods; any one that matches
// will do.
func (r ruleset) fromPods() []statement {
	var ways []statement
	if len(r.node.LocalPods.Prefixes) > 0 {
		ways = append(ways, in(r.saddr(), localPods))
	}
	if name := r.node.LocalPods.Interface; name != "" {
		ways = append(ways, entersBy(name, false))
	}
	if prefix := r.node.LocalPods.InterfacePrefix; prefix != "" {
		ways = append(ways, entersBy(prefix, true))
	}
	return ways
}

// betweenNodes masquerades what a Pod of another node sends to an endpoint of
// another node.
func (r ruleset) betweenNodes() []rule {
	if len(r.node.OwnPods) == 0 {
		return nil
	}
	return []rule{newRule(in(r.saddr(), localPods), notIn(r.saddr(), ownPods), notIn(r.daddr(), ownPods), NewSource(r.node))}
}

// toNodePortAddrs are the ways to tell packets to addresses that serve
// NodePorts; there may be none.
func (r ruleset) toNodePortAddrs() [][]statement {
	if r.node.NodePortAddrs.All {
		return [][]statement{{fibLocal(false), r.notLoopback()}}
	}
	if len(r.nodePortAddrs()) > 0 {
		return [][]statement{{in(r.daddr(), nodePortAddrs)}}
	}
	return nil
}

// markChain names the chain that marks packets from these origins.
func markChain(origins plan.TrafficSources) string {
	switch origins {
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

// markRules mark packets from the given origins for masquerading. A packet
// from a Pod's address counts as from a Pod even where the node holds that
// address too, as a bridge of Pods does.
func (r ruleset) markRules(origins plan.TrafficSources) []rule {
	mark := setMarkBit(r.mark, true)
	if origins == plan.AnySource {
		return []rule{newRule(mark)}
	}
	var rules []rule
	decide := func(match statement, origin plan.TrafficSources) {
		if origins&origin != 0 {
			rules = append(rules, newRule(match, mark, returns()))
			return
		}
		rules = append(rules, newRule(match, returns()))
	}
	for _, match := range r.fromPods() {
		decide(match, plan.FromPods)
	}
	decide(fibLocal(true), plan.FromNode)
	if origins&plan.FromOutside != 0 {
		rules = append(rules, newRule(mark))
	}
	return rules
}

// checkSources drops what may not use a frontend.
func (r ruleset) checkSources() []rule {
	allowed := join(r.frontendOf(), r.saddr())
	rules := []rule{
		newRule(in(r.frontendOf(), restricted), notIn(allowed, allowedSources), drop()),
	}
	for _, match := range r.toNodePortAddrs() {
		rules = append(rules, newRule(slices.Concat([]statement{in(nodePortOf, restrictedNodePorts)}, match,
			[]statement{notIn(join(nodePortOf, r.saddr()), allowedNodePortSources), drop()})...))
	}
	return rules
}

// withoutDNAT are the rules that begin both checks for frontends without
// endpoints. A connection that was given an endpoint needs no check.
func withoutDNAT() []rule {
	return []rule{
		newRule(priorityIs(idSpaceMask, idSpace), clearPriority()).because("the id has served"),
		newRule(isDNATed(), returns()),
	}
}

// refuse drops or rejects a connection to a frontend without endpoints.
func (r ruleset) refuse(key value, dropped setID) []rule {
	return []rule{newRule(in(key, dropped), drop()), newRule(r.reject())}
}

// checkLocal rejects or drops what has come to this node for a frontend without
// endpoints.
func (r ruleset) checkLocal() []rule {
	rules := append(withoutDNAT(),
		newRule(in(r.frontendOf(), refused), goTo("refuse")))
	for _, match := range r.toNodePortAddrs() {
		rules = append(rules, newRule(slices.Concat([]statement{in(nodePortOf, refusedNodePorts)}, match, []statement{goTo("refuse-nodeport")})...))
	}
	return append(rules, r.toLocalhost()...)
}

// checkRemote does the same with what leaves for other hosts, and answers for
// cluster IPs where no frontend is. What the node sends to itself passes: checkLocal
// sees it next, and a process whose packet is rejected at the output hook gets EPERM
// in place of ECONNREFUSED. So an address that the node itself holds, as a local DNS
// server's, is left to what listens there.
func (r ruleset) checkRemote() []rule {
	return append(withoutDNAT(),
		newRule(in(r.frontendOf(), refused), fibNotLocal(), goTo("refuse")),
		newRule(in(r.daddr(), clusterIPs), fibNotLocal(), r.reject()).because("no such port"),
		newRule(in(r.daddr(), serviceCIDRs), fibNotLocal(), drop()).because("no such Service"))
}

// sizedChain is a chain that picks one of size endpoints. There is one for each
// kind of endpoint set in use.
type sizedChain struct {
	size    int
	timeout time.Duration // of affinity; 0 without
	variant int           // with affinity: which of the Service port's sets
	large   bool          // with affinity: the Service port has a large block of ids
}

func (c sizedChain) name() string {
	if c.timeout == 0 {
		return fmt.Sprintf("pick-%d", c.size)
	}
	name := fmt.Sprintf("pick-%d-affinity-%ds", c.size, int(c.timeout/time.Second))
	if c.variant > 0 {
		name += fmt.Sprintf("-set-%d", c.variant)
	}
	if c.large {
		name += "-large"
	}
	return name
}

func (c sizedChain) chain(f *family) chain {
	if c.timeout == 0 {
		return chain{name: c.name(), rules: []rule{
			newRule(f.dnatTo(lookedUp(join(priorityBits(^chainMask, 0), random(c.size)), endpoints))),
		}}
	}
	return chain{name: c.name(), rules: c.stickyRules(f)}
}

// stickyRules choose with session affinity. On entry the priority holds the
// id of the endpoint set: the Service port's number in the bits of mask, below
// it the chain's.
//
// The first rule serves the client that is known and whose endpoint is in this
// set. Otherwise the priority holds now either still the set's id, or the id of
// an endpoint that is not in the set; then what the map remembers has to be
// deleted, because to update a key that exists starts its time again and keeps
// the old endpoint. An endpoint is drawn and remembered, and read back: where
// two connections of one client race on two processors, the first to write has
// decided for both. If the map is full nothing is read back and the drawn
// endpoint serves.
func (c sizedChain) stickyRules(f *family) []rule {
	mask, flag := blockMask(c.large), endpointFlag(c.large)
	known := affinityEndpoints + setID(c.variant)
	client := join(f.saddr(), priorityBits(mask, 0))
	recall := setPriority(idLookedUp(client, affinity))
	toKnown := f.dnatTo(lookedUp(priority, known))
	draw := func(n int) statement {
		return setPriority(idLookedUp(join(priorityBits(mask, uint32(c.variant)), random(n)), affinitySlots))
	}
	return []rule{
		newRule(recall, remember(client, priority, c.timeout), toKnown),
		newRule(priorityIs(flag, flag), forget(client, priority)).because("its endpoint is gone"),
		newRule(draw(c.size), remember(client, priority, c.timeout)),
		newRule(recall),
		newRule(toKnown),
		newRule(draw(1), toKnown).because("the set changed just now: its first endpoint"),
	}
}

// ownNumber says whether the chain's size is its number too.
func (c sizedChain) ownNumber() bool { return c.timeout == 0 && c.size <= ownNumber }

// ready says whether the chain exists always.
func (c sizedChain) ready() bool { return c.timeout == 0 && c.size <= readyChains }

func (c sizedChain) compare(o sizedChain) int {
	large := func(b bool) int {
		if b {
			return 1
		}
		return 0
	}
	return cmp.Or(
		cmp.Compare(c.timeout, o.timeout),
		cmp.Compare(c.size, o.size),
		cmp.Compare(c.variant, o.variant),
		cmp.Compare(large(c.large), large(o.large)),
	)
}

// in matches a packet whose value is an element of the set.
func in(v value, set setID) statement { return In(v, schemas[set].name) }

// notIn matches a packet whose value is no element of the set.
func notIn(v value, set setID) statement { return NotIn(v, schemas[set].name) }

// lookedUp is the datum that the map holds for v. A packet for which it holds
// none leaves the rule.
func lookedUp(v value, m setID) value { return LookedUp(v, schemas[m].name) }

// verdictOf goes where the verdict map says, or on if it says nothing.
func verdictOf(v value, m setID) statement { return VerdictOf(v, schemas[m].name) }

// idLookedUp is the id that the map holds for v.
func idLookedUp(v value, m setID) value { return MarkLookedUp(v, schemas[m].name) }

// remember records key -> id in the affinity map for the given time.
func remember(key, id value, timeout time.Duration) statement {
	return Remember(schemas[affinity].name, key, id, timeout)
}

// forget removes the key from the affinity map.
func forget(key, id value) statement { return Forget(schemas[affinity].name, key, id) }
