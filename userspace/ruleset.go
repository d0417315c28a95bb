// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"slices"

	"github.com/google/nftables"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// ownTraffic is the priority (SO_PRIORITY) of the relay's own connections to
// endpoints, which must not be redirected again. Rules put it back to 0 when they
// have seen it.
const ownTraffic = 0x53420001

// trafficSource is where a connection comes from. The relay has one port for each, so
// that it learns from the kernel what only rules can tell: the interface that a
// packet entered by, for example.
type trafficSource uint8

const (
	fromPods trafficSource = iota
	fromNode
	fromOutside
	trafficSourceCount
)

// bit is the traffic source as the plan names it.
func (o trafficSource) bit() plan.TrafficSources { return plan.FromPods << o }

// inside says whether connections go to Frontend.Internal.
func (o trafficSource) inside() bool { return o != fromOutside }

func (o trafficSource) String() string { return [...]string{"pods", "node", "outside"}[o] }

// ruleset makes the chains. Their number does not depend on Services.
type ruleset struct {
	access.Rules
	mark  uint32 // sends answers to a transparent connection to the relay
	ports ports
}

var (
	divertHook = nft.NewHook(nftables.ChainHookPrerouting, -150, "type filter hook prerouting priority mangle")
	// Those of every other mode come before: while both are there, as when this
	// process ends its last connections, new ones go to the others.
	natPrerouting = nft.NewNATHook(nftables.ChainHookPrerouting, -98, "type nat hook prerouting priority dstnat + 2")
	natOutput     = nft.NewNATHook(nftables.ChainHookOutput, -98, "type nat hook output priority -98")
	lastHook      = nft.NewHook(nftables.ChainHookPostrouting, 300, "type filter hook postrouting priority 300")
)

// chains are all chains of the table; those that are jumped to come first.
func (r ruleset) chains() []nft.Chain {
	isNew := nft.StateNew()
	jump := func(chain string) nft.Rule { return nft.NewRule(isNew, nft.Jump(chain)) }
	services := nft.NewRule(nft.Jump("services"))
	return append(r.nodeChains(),
		nft.NewChain("divert-answers", divertHook,
			nft.NewRule(nft.TransparentSocket(), nft.SetMarkBit(r.mark, true)).
				Comment("answers to a connection that bears its client's address")),
		nft.NewChain("filter-prerouting-pre-dnat", access.PreDNATPrerouting, jump("check-sources")),
		nft.NewChain("filter-output-pre-dnat", access.PreDNATOutput, jump("check-sources")),
		nft.NewChain("filter-input", access.FilterInput, jump("check-local")),
		nft.NewChain("filter-forward", access.FilterForward, jump("check-remote")),
		nft.NewChain("filter-output", access.FilterOutput, jump("check-remote")),
		nft.NewChain("nat-prerouting", natPrerouting, services),
		nft.NewChain("nat-output", natOutput,
			nft.NewRule(nft.PriorityIs(ownTraffic), nft.Return()).Comment("from the relay to an endpoint"),
			services,
			nft.NewRule(nft.Jump("localhost"))),
		nft.NewChain("last", lastHook,
			nft.NewRule(nft.PriorityIs(ownTraffic), nft.ClearPriority()).Comment("it has served")),
	)
}

// nodeChains depend on the node's facts, and are written anew with them.
func (r ruleset) nodeChains() []nft.Chain {
	chains := []nft.Chain{
		nft.NewChain("check-sources", nil, r.CheckSources()...),
		nft.NewChain("check-local", nil, r.checkLocal()...),
		nft.NewChain("check-remote", nil, r.checkRemote()...),
		nft.NewChain("localhost", nil, r.localhost()...),
	}
	for o := range trafficSourceCount {
		chains = append(chains,
			nft.NewChain("nodeports-from-"+o.String(), nil, r.redirect(access.NodePort, nodePortSets, o)...),
			nft.NewChain("services-from-"+o.String(), nil, r.services(o)...))
	}
	var byOrigin []nft.Rule
	for _, match := range r.FromPods() {
		byOrigin = append(byOrigin, nft.NewRule(match, nft.GoTo("services-from-pods")))
	}
	return append(chains, nft.NewChain("services", nil, append(append(r.Bypass(), byOrigin...),
		nft.NewRule(nft.SaddrIsLocal(), nft.GoTo("services-from-node")),
		nft.NewRule(nft.GoTo("services-from-outside")))...))
}

func (r ruleset) services(o trafficSource) []nft.Rule {
	rules := r.redirect(r.Frontend(), addressedSets, o)
	for _, match := range r.ToNodePortAddrs() {
		rules = append(rules, nft.NewRule(append(match, nft.GoTo("nodeports-from-"+o.String()))...))
	}
	return rules
}

// redirect sends what is for a frontend to the relay's port for its traffic source.
func (r ruleset) redirect(key nft.Value, sets frontendSets, o trafficSource) []nft.Rule {
	noEndpoints := sets.noExternalEndpoints
	if o.inside() {
		noEndpoints = sets.noInternalEndpoints
	}
	return []nft.Rule{
		nft.NewRule(nft.In(key, setNames[noEndpoints]), nft.Return()),
		nft.NewRule(r.DNATToPort(nft.LookedUp(key, setNames[sets.redirected]), r.ports.of(o))),
	}
}

// localhost redirects what is for NodePorts on the loopback address. Only the
// output hook sees it: in prerouting a neighbour of the node could send packets to
// that address, and rewritten there they would escape the kernel's own check.
func (r ruleset) localhost() []nft.Rule {
	if !r.Node.LocalhostNodePorts {
		return nil
	}
	return append(r.Bypass(), nft.NewRule(r.DaddrIs(plan.Localhost(r.Family)), nft.GoTo("nodeports-from-node")))
}

// checkLocal rejects or drops what has come to this node and was not redirected
// because its endpoint set is empty. It also hides the relay's ports: only what was
// redirected gets to them.
func (r ruleset) checkLocal() []nft.Rule {
	rules := append([]nft.Rule{nft.NewRule(nft.IsDNATed(), nft.Return())}, r.Bypass()...)
	for _, p := range []plan.Protocol{plan.TCP, plan.UDP} {
		rules = append(rules, nft.NewRule(nft.ProtocolIs(p),
			nft.DPortsBetween(r.ports.of(0), r.ports.of(trafficSourceCount-1)), r.Reject()))
	}
	return slices.Concat(rules, r.RejectFrontends(), r.RejectNodePorts())
}

// checkRemote rejects or drops likewise what leaves for other hosts, and answers for
// cluster IPs where no frontend is. What the node sends to itself passes: checkLocal
// sees it next, and a process whose packet is rejected at the output hook gets EPERM
// in place of ECONNREFUSED. So an address that the node itself holds, as a local DNS
// server's, is left to what listens there.
func (r ruleset) checkRemote() []nft.Rule {
	rules := slices.Concat([]nft.Rule{nft.NewRule(nft.IsDNATed(), nft.Return())}, r.Bypass(), r.RejectFrontends(nft.DaddrIsNotLocal()))
	return append(rules,
		nft.NewRule(nft.In(r.Daddr(), setNames[clusterIPs]), nft.DaddrIsNotLocal(), r.Reject()).Comment("no such port"),
		r.Unallocated())
}
