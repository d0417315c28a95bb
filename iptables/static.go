// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"slices"
	"strings"

	"signalbox/internal/xtables"
	"signalbox/proxier/plan"
)

// This file holds what depends on no Service: the jumps from built-in chains,
// the static chains, and the rules at the end of the trees' root chains.

// jump is a rule in a built-in chain that leads to a chain of ours.
type jump struct {
	table  table
	from   string
	target string
	// newOnly limits the jump to the first packet of a connection.
	newOnly bool
	comment string
}

// jumps are kube-proxy's. Each is inserted before the rules that a chain holds,
// so the last one comes first for a packet: it checks source ranges.
var jumps = []jump{
	{filter, "INPUT", externalServicesChain, true, "kubernetes externally-visible service portals"},
	{filter, "FORWARD", externalServicesChain, true, "kubernetes externally-visible service portals"},
	{filter, "INPUT", nodePortsChain, false, "kubernetes health check service ports"},
	{filter, "FORWARD", servicesChain, true, "kubernetes service portals"},
	{filter, "OUTPUT", servicesChain, true, "kubernetes service portals"},
	{filter, "FORWARD", forwardChain, false, "kubernetes forwarding rules"},
	{filter, "INPUT", proxyFirewallChain, true, "kubernetes load balancer firewall"},
	{filter, "OUTPUT", proxyFirewallChain, true, "kubernetes load balancer firewall"},
	{filter, "FORWARD", proxyFirewallChain, true, "kubernetes load balancer firewall"},
	{nat, "OUTPUT", servicesChain, false, "kubernetes service portals"},
	{nat, "PREROUTING", servicesChain, false, "kubernetes service portals"},
	{nat, "POSTROUTING", postroutingChain, false, "kubernetes postrouting rules"},
}

// rule is the jump as iptables-save writes it after the chain's name.
func (j jump) rule() string {
	var s string
	if j.newOnly {
		s = " -m conntrack --ctstate NEW"
	}
	return s + comment(j.comment) + " -j " + j.target
}

// preceding returns the rules of other software that a packet meets before the jumps of table
// nat to the Services: those that take every packet, and those that may take some.
func preceding(l *xtables.Listing) (every, some []string) {
	for _, from := range []string{"PREROUTING", "OUTPUT"} {
		rules := slices.DeleteFunc(slices.Clone(l.Builtin), func(rule string) bool { return !strings.HasPrefix(rule, "-A "+from+" ") })
		jump := slices.IndexFunc(rules, func(rule string) bool { return xtables.JumpTarget(rule) == servicesChain })
		for _, rule := range rules[:max(0, jump)] {
			switch takes, all := xtables.Takes(rule); {
			case all:
				every = append(every, rule)
			case takes:
				some = append(some, rule)
			}
		}
	}
	return every, some
}

// randomFully lets MASQUERADE and SNAT choose any free source port. Connections
// made at the same time then do not collide.
const randomFully = " --random-fully"

// staticChains are the chains that depend on no Service and hold no tree.
// dropInvalid says that conntrack calls packets outside the TCP window invalid
// (nf_conntrack_tcp_be_liberal = 0). The kernel does not translate such a packet
// back, and its receiver would answer it with a reset.
func (c *compiler) staticChains(node *plan.Node) [tableCount][]chain {
	bit := fmt.Sprintf("%#x", c.packetMark)
	marked, unmarked := " -m mark --mark "+bit+"/"+bit, " -m mark ! --mark "+bit+"/"+bit
	sources := routeSources(node)
	// newSource gives matching packets a source of this node.
	newSource := func(match string) []string {
		masquerade := match + " -j MASQUERADE" + randomFully
		if len(sources) == 0 {
			return []string{masquerade}
		}
		return []string{match + " -j " + routeSourcesChain, masquerade}
	}
	var forward []string
	if c.dropInvalid {
		forward = append(forward, " -m conntrack --ctstate INVALID -j DROP")
	}
	forward = append(forward,
		comment("kubernetes forwarding rules")+marked+" -j ACCEPT",
		comment("kubernetes forwarding conntrack rule")+" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
		// A flow is new until it is answered, and only its first packet has the
		// mark. A flow is confirmed once its first packet was let through.
		comment("kubernetes forwarding of unanswered flows")+" -m conntrack --ctstate DNAT --ctstatus CONFIRMED -j ACCEPT")
	postrouting := []string{comment("endpoints that are their own clients") + " -m conntrack --ctstate DNAT -j " + hairpinChain}
	for _, own := range node.OwnPods {
		for _, all := range node.LocalPods.Prefixes {
			postrouting = append(postrouting, newSource(fmt.Sprintf(" -s %s ! -d %s%s -m conntrack --ctstate DNAT ! --ctorigsrc %[2]s",
				all.Masked(), own.Masked(), comment("from another node to another node")))...)
		}
	}
	postrouting = append(postrouting, unmarked+" -j RETURN",
		// The packet may come by again, after encapsulation.
		" -j MARK --xor-mark "+bit)
	postrouting = append(postrouting, newSource(comment("kubernetes service traffic requiring SNAT"))...)
	return [tableCount][]chain{
		nat: slices.Concat([]chain{
			{Name: markMasqChain, Level: staticLevel, Rules: []string{" -j MARK --or-mark " + bit}},
			{Name: postroutingChain, Level: postroutingLevel, Rules: postrouting},
		}, sources, masqueradeChains(c.pods)),
		filter: {{Name: forwardChain, Level: staticLevel, Rules: forward}},
	}
}

// routeSources is the chain for routes that name another source than the one
// that MASQUERADE takes. Packets on other routes return from it.
func routeSources(node *plan.Node) []chain {
	if len(node.RouteSources) == 0 {
		return nil
	}
	c := chain{Name: routeSourcesChain, Level: staticLevel}
	for _, s := range node.RouteSources {
		rule := " -o " + s.Link
		if s.Destination.Bits() > 0 {
			rule += " -d " + s.Destination.Masked().String()
		}
		if s.Source.IsValid() {
			rule += " -j SNAT --to-source " + s.Source.String() + randomFully
		} else {
			rule += " -j RETURN"
		}
		c.Rules = append(c.Rules, rule)
	}
	return []chain{c}
}

// masquerade returns the rules that mark packets from the traffic sources, each
// limited by guard (empty or beginning with a blank). Two rules may mark the
// same packet.
func masquerade(pods []podMatch, sources plan.TrafficSources, guard string) []string {
	const mark = " -j " + markMasqChain
	if len(pods) == 0 {
		// Nothing is FromPods, so the other two are everything.
		if sources |= plan.FromPods; sources != plan.AnySource {
			sources &^= plan.FromPods
		}
	}
	switch sources {
	case plan.NoSource:
		return nil
	case plan.AnySource:
		return []string{guard + mark}
	}
	node := ""
	switch {
	case sources&plan.FromNode != 0 && sources&plan.FromOutside == 0:
		node = fromNode
	case sources&plan.FromOutside != 0 && sources&plan.FromNode == 0:
		node = notFromNode
	}
	if sources&plan.FromPods != 0 {
		var rules []string
		for _, p := range pods {
			rules = append(rules, p.is+guard+mark)
		}
		if node != "" {
			rules = append(rules, guard+node+mark)
		}
		return rules
	}
	switch len(pods) {
	case 0:
		return []string{guard + node + mark}
	case 1:
		return []string{pods[0].not + guard + node + mark}
	}
	return []string{guard + " -j " + masqueradeChain(sources)}
}

// masqueradeChain marks packets of other sources than Pods: one rule cannot
// negate several matches.
func masqueradeChain(sources plan.TrafficSources) string {
	return fmt.Sprintf("%sMASQ-%d", clusterPrefix, sources)
}

func masqueradeChains(pods []podMatch) []chain {
	if len(pods) < 2 {
		return nil
	}
	var out []chain
	for _, sources := range []plan.TrafficSources{plan.FromNode, plan.FromOutside, plan.FromNode | plan.FromOutside} {
		c := chain{Name: masqueradeChain(sources), Level: masqueradeLevel}
		for _, p := range pods {
			c.Rules = append(c.Rules, p.is+" -j RETURN")
		}
		c.Rules = append(c.Rules, masquerade(nil, sources, "")...)
		out = append(out, c)
	}
	return out
}

// toExternalServices is in KUBE-SERVICES, because OUTPUT has no jump to the
// external Services: kube-proxy's cleanup would leave one that it does not know.
// Packets to the node's own addresses come there from INPUT only: a process
// whose datagram OUTPUT rejects gets EPERM and not ECONNREFUSED.
const toExternalServices = " -m addrtype ! --dst-type LOCAL -j " + externalServicesChain

// rootRules are rules of a tree's root chain before and after those of the tree.
type rootRules struct{ first, last []string }

// rootRulesOf returns the root rules of all trees.
func rootRulesOf(family plan.Family, node *plan.Node) (rules [treeCount]rootRules) {
	// After the addresses: one of the node's own may be an external IP.
	rules[servicesTree].last = nodePortRules(family, node, "kubernetes service nodeports; NOTE: this must be the last rule in this chain", nodePortsChain)
	rules[emptyTree].last = []string{toExternalServices}
	rules[externalTree].last = nodePortRules(family, node, "kubernetes service nodeports", externalPortsChain)
	bypass := bypassRules(node)
	for _, tree := range []treeID{servicesTree, emptyTree, externalTree, firewallTree} {
		rules[tree].first = bypass
	}
	return rules
}

// midStream, in a match of TCP, matches packets that do not open a connection, and
// rejectReset resets them: see plan.Node.ResetStrays. A rule for frontends without
// endpoints is enough. At all others, the packet gets another endpoint, whose host resets
// it. A rule would do so with a wrong source: of a packet that came in by a bridge, the
// kernel sends the reset without translating it back.
const (
	midStream   = " ! --tcp-flags FIN,SYN,RST,ACK SYN"
	rejectReset = " -j REJECT --reject-with tcp-reset"
)

// bypassRules let packets of this node to an API server pass: see plan.Node.Bypass.
func bypassRules(node *plan.Node) (rules []string) {
	for _, at := range node.Bypass {
		rules = append(rules, fmt.Sprintf("%s -p tcp -m tcp --dport %d%s%s -j RETURN", destination(at.Addr()), at.Port(), comment("an API server"), fromNode))
	}
	return rules
}

// nodePortRules lead packets to the addresses that serve NodePorts to a chain.
func nodePortRules(family plan.Family, node *plan.Node, text, chain string) (rules []string) {
	if node.NodePortAddrs.All {
		notLoopback := ""
		switch {
		case family == plan.IPv6:
			notLoopback = " ! -d ::1/128"
		case !node.LocalhostNodePorts:
			notLoopback = " ! -d 127.0.0.0/8"
		}
		return []string{notLoopback + comment(text) + " -m addrtype --dst-type LOCAL -j " + chain}
	}
	for _, a := range node.NodePortAddrs.Addrs {
		if plan.FamilyOf(a) == family && (!a.IsLoopback() || family == plan.IPv4 && node.LocalhostNodePorts) {
			rules = append(rules, destination(a)+comment(text)+" -j "+chain)
		}
	}
	return rules
}
