package userspace

import (
	"net/netip"
	"slices"

	nflib "github.com/google/nftables"

	"signalbox/nftables"

	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

// ownTraffic is the priority (SO_PRIORITY) of the relay's own connections to
// endpoints, which must not be redirected again. Rules put it back to 0 when they
// have seen it.
const ownTraffic = 0x53420001

// origin is where a connection came from. The relay has one port for each, so
// that it learns from the kernel what only rules can tell: the interface that a
// packet entered by, for example.
type origin uint8

const (
	fromPods origin = iota
	fromNode
	fromOutside
	originCount
)

// bit is the origin as the plan names it.
func (o origin) bit() plan.TrafficSources { return plan.FromPods << o }

// inside says whether connections go to Frontend.Internal.
func (o origin) inside() bool { return o != fromOutside }

func (o origin) String() string { return [...]string{"pods", "node", "outside"}[o] }

// ruleset makes the chains. Their number does not depend on Services.
type ruleset struct {
	*nftables.IPFamily
	mark  uint32 // sends answers to a transparent connection to the relay
	ports ports
	node  plan.Node
}

var (
	divertHook = nftables.NewHook(nflib.ChainHookPrerouting, -150, "type filter hook prerouting priority mangle")
	// Those of every other mode come before: while both are there, as when this
	// process ends its last connections, new ones go to the others.
	natPrerouting = nftables.NewNATHook(nflib.ChainHookPrerouting, -98, "type nat hook prerouting priority dstnat + 2")
	natOutput     = nftables.NewNATHook(nflib.ChainHookOutput, -98, "type nat hook output priority -98")
	lastHook      = nftables.NewHook(nflib.ChainHookPostrouting, 300, "type filter hook postrouting priority 300")
)

func (r ruleset) frontendOf() nftables.Value {
	return nftables.Join(r.Daddr(), nftables.L4Proto, nftables.DPort)
}

var nodePortOf = nftables.Join(nftables.L4Proto, nftables.DPort)

// chains are all chains of the table; those that are jumped to come first.
func (r ruleset) chains() []nftables.Chain {
	isNew := nftables.StateNew()
	jump := func(chain string) nftables.Rule { return nftables.NewRule(isNew, nftables.Jump(chain)) }
	services := nftables.NewRule(nftables.Jump("services"))
	return append(r.nodeChains(),
		nftables.NewChain("divert-answers", divertHook,
			nftables.NewRule(nftables.TransparentSocket(), nftables.SetMarkBit(r.mark, true)).
				Because("answers to a connection that bears its client's address")),
		nftables.NewChain("filter-prerouting-pre-dnat", nftables.PreDNATPrerouting, jump("check-sources")),
		nftables.NewChain("filter-output-pre-dnat", nftables.PreDNATOutput, jump("check-sources")),
		nftables.NewChain("filter-input", nftables.FilterInput, jump("check-local")),
		nftables.NewChain("filter-forward", nftables.FilterForward, jump("check-remote")),
		nftables.NewChain("filter-output", nftables.FilterOutput, jump("check-remote")),
		nftables.NewChain("nat-prerouting", natPrerouting, services),
		nftables.NewChain("nat-output", natOutput,
			nftables.NewRule(nftables.PriorityIs(ownTraffic), nftables.Return()).Because("from the relay to an endpoint"),
			services,
			nftables.NewRule(nftables.Jump("localhost"))),
		nftables.NewChain("last", lastHook,
			nftables.NewRule(nftables.PriorityIs(ownTraffic), nftables.ClearPriority()).Because("it has served")),
	)
}

// nodeChains depend on the node's facts, and are written anew with them.
func (r ruleset) nodeChains() []nftables.Chain {
	chains := []nftables.Chain{
		nftables.NewChain("check-sources", nil, r.checkSources()...),
		nftables.NewChain("check-local", nil, r.checkLocal()...),
		nftables.NewChain("check-remote", nil, r.checkRemote()...),
		nftables.NewChain("localhost", nil, r.localhost()...),
	}
	for o := range originCount {
		chains = append(chains,
			nftables.NewChain("nodeports-from-"+o.String(), nil, r.redirect(nodePortOf, nodePortSets, o)...),
			nftables.NewChain("services-from-"+o.String(), nil, r.services(o)...))
	}
	var byOrigin []nftables.Rule
	for _, match := range r.isFromPods() {
		byOrigin = append(byOrigin, nftables.NewRule(match, nftables.GoTo("services-from-pods")))
	}
	return append(chains, nftables.NewChain("services", nil, append(byOrigin,
		nftables.NewRule(nftables.FibLocal(true), nftables.GoTo("services-from-node")),
		nftables.NewRule(nftables.GoTo("services-from-outside")))...))
}

func (r ruleset) services(o origin) []nftables.Rule {
	rules := r.redirect(r.frontendOf(), addressedSets, o)
	for _, match := range r.toNodePortAddrs() {
		rules = append(rules, nftables.NewRule(append(match, nftables.GoTo("nodeports-from-"+o.String()))...))
	}
	return rules
}

// redirect sends what is for a frontend to the relay's port for its origin.
func (r ruleset) redirect(key nftables.Value, sets frontendSets, o origin) []nftables.Rule {
	noEndpoints := sets.noExternalEndpoints
	if o.inside() {
		noEndpoints = sets.noInternalEndpoints
	}
	return []nftables.Rule{
		nftables.NewRule(nftables.In(key, setNames[noEndpoints]), nftables.Return()),
		nftables.NewRule(r.DNATToPort(nftables.LookedUp(key, setNames[sets.redirected]), r.ports.of(o))),
	}
}

// isFromPods are the ways to tell packets of local Pods.
func (r ruleset) isFromPods() []nftables.Statement {
	var ways []nftables.Statement
	if len(r.node.LocalPods.Prefixes) > 0 {
		ways = append(ways, nftables.In(r.Saddr(), setNames[localPods]))
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
// NodePorts; there may be none.
func (r ruleset) toNodePortAddrs() [][]nftables.Statement {
	var ways [][]nftables.Statement
	if r.node.NodePortAddrs.All {
		ways = append(ways, []nftables.Statement{nftables.FibLocal(false), r.NotLoopback()})
	}
	if len(r.nodePortAddrs()) > 0 {
		ways = append(ways, []nftables.Statement{nftables.In(r.Daddr(), setNames[nodePortAddrs])})
	}
	return ways
}

// localhost redirects what is for NodePorts on the loopback address. Only the
// output hook sees it: in prerouting a neighbour of the node could send packets to
// that address, and rewritten there they would escape the kernel's own check.
func (r ruleset) localhost() []nftables.Rule {
	if !r.node.LocalhostNodePorts {
		return nil
	}
	return []nftables.Rule{nftables.NewRule(r.DaddrIs(service.Localhost(r.Family)), nftables.GoTo("nodeports-from-node"))}
}

// nodePortAddrs are the single addresses that serve NodePorts.
func (r ruleset) nodePortAddrs() []netip.Addr {
	var addrs []netip.Addr
	if !r.node.NodePortAddrs.All {
		for _, a := range r.node.NodePortAddrs.Addrs {
			if !a.IsLoopback() {
				addrs = append(addrs, a)
			}
		}
	}
	return addrs
}

// checkSources drops what may not use a frontend.
func (r ruleset) checkSources() []nftables.Rule {
	rules := []nftables.Rule{
		nftables.NewRule(nftables.In(r.frontendOf(), setNames[restricted]),
			nftables.NotIn(nftables.Join(r.frontendOf(), r.Saddr()), setNames[allowedSources]), nftables.Drop()),
	}
	for _, match := range r.toNodePortAddrs() {
		rules = append(rules, nftables.NewRule(append(match, nftables.In(nodePortOf, setNames[restrictedNodePorts]),
			nftables.NotIn(nftables.Join(nodePortOf, r.Saddr()), setNames[allowedNodePortSources]), nftables.Drop())...))
	}
	return rules
}

// checkLocal rejects or drops what has come to this node and was not redirected
// because its endpoint set is empty. It also hides the relay's ports: only what was
// redirected gets to them.
func (r ruleset) checkLocal() []nftables.Rule {
	rules := []nftables.Rule{nftables.NewRule(nftables.IsDNATed(), nftables.Return())}
	for _, p := range []plan.Protocol{plan.TCP, plan.UDP} {
		rules = append(rules, nftables.NewRule(nftables.ProtocolIs(p),
			nftables.DPortsBetween(r.ports.of(0), r.ports.of(originCount-1)), r.Reject()))
	}
	rules = append(rules,
		nftables.NewRule(nftables.In(r.frontendOf(), setNames[rejected]), r.Reject()),
		nftables.NewRule(nftables.In(r.frontendOf(), setNames[dropped]), nftables.Drop()))
	for _, match := range r.toNodePortAddrs() {
		inSet := func(set int, verdict nftables.Statement) nftables.Rule {
			return nftables.NewRule(slices.Concat([]nftables.Statement{nftables.In(nodePortOf, setNames[set])}, match, []nftables.Statement{verdict})...)
		}
		rules = append(rules, inSet(rejectedNodePorts, r.Reject()), inSet(droppedNodePorts, nftables.Drop()))
	}
	return rules
}

// checkRemote rejects or drops likewise what leaves for other hosts, and answers for
// cluster IPs where no frontend is. What the node sends to itself passes: checkLocal
// sees it next, and a process whose packet is rejected at the output hook gets EPERM
// in place of ECONNREFUSED. So an address that the node itself holds, as a local DNS
// server's, is left to what listens there.
func (r ruleset) checkRemote() []nftables.Rule {
	return []nftables.Rule{
		nftables.NewRule(nftables.IsDNATed(), nftables.Return()),
		nftables.NewRule(nftables.In(r.frontendOf(), setNames[rejected]), nftables.FibNotLocal(), r.Reject()),
		nftables.NewRule(nftables.In(r.frontendOf(), setNames[dropped]), nftables.FibNotLocal(), nftables.Drop()),
		nftables.NewRule(nftables.In(r.Daddr(), setNames[clusterIPs]), nftables.FibNotLocal(), r.Reject()).Because("no such port"),
		nftables.NewRule(nftables.In(r.Daddr(), setNames[serviceCIDRs]), nftables.FibNotLocal(), nftables.Drop()).Because("no such Service"),
	}
}

// nodeElements are the elements that the node's facts make.
func (r ruleset) nodeElements() []nftables.Element {
	var list []nftables.Element
	ranges := func(set int, prefixes []netip.Prefix) {
		for _, p := range nftables.Disjoint(prefixes) {
			list = append(list, nftables.NewElement(set, string(p.Addr().AsSlice()), string(nftables.LastAddr(p).AsSlice()), "", ""))
		}
	}
	ranges(localPods, r.node.LocalPods.Prefixes)
	for _, a := range r.nodePortAddrs() {
		list = append(list, nftables.NewElement(nodePortAddrs, string(a.AsSlice()), "", "", ""))
	}
	ranges(serviceCIDRs, r.node.ServiceCIDRs)
	return list
}
