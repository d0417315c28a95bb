package iptables

import (
	"fmt"
	"slices"

	"signalbox/proxier/plan"
)

// facts is what rules need to know of the kernel and of the tools.
type facts struct {
	// dropInvalid says that conntrack calls packets outside the TCP window
	// invalid (nf_conntrack_tcp_be_liberal = 0). Such a packet is not
	// translated back, and its receiver would answer it with a reset.
	dropInvalid bool
	// randomFully says that MASQUERADE and SNAT can choose any free source port, which
	// spares connections made at the same time a collision.
	randomFully bool
}

// frameChains are the chains that depend on no Service and hold no tree.
func frameChains(mark uint32, node *plan.Node, pods []podMatch, facts facts) [tableCount][]chain {
	bit := fmt.Sprintf("%#x", mark)
	random := ""
	if facts.randomFully {
		random = " --random-fully"
	}
	sources := routeSources(node, random)
	// newSource are the rules that give packets that match a source of this node.
	newSource := func(match string) []string {
		masq := match + " -j MASQUERADE" + random
		if len(sources) == 0 {
			return []string{masq}
		}
		return []string{match + " -j " + routeSourcesChain, masq}
	}
	var forward []string
	if facts.dropInvalid {
		forward = append(forward, " -m conntrack --ctstate INVALID -j DROP")
	}
	forward = append(forward,
		comment("kubernetes forwarding rules")+" -m mark --mark "+bit+"/"+bit+" -j ACCEPT",
		comment("kubernetes forwarding conntrack rule")+" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
		// Until somebody answers, a flow is new and only its first packet has the
		// mark. A confirmed one is a flow whose first packet was let through.
		comment("kubernetes forwarding of unanswered flows")+" -m conntrack --ctstate DNAT --ctstatus CONFIRMED -j ACCEPT")
	// Of the others no address is both source and destination.
	postrouting := []string{comment("endpoints that are their own clients") + " -m conntrack --ctstate DNAT -j " + hairpinChain}
	for _, own := range node.OwnPods {
		for _, all := range node.LocalPods.Prefixes {
			postrouting = append(postrouting, newSource(fmt.Sprintf(" -s %s ! -d %s%s -m conntrack --ctstate DNAT ! --ctorigsrc %[2]s",
				all.Masked(), own.Masked(), comment("from another node to another node")))...)
		}
	}
	postrouting = append(postrouting,
		" -m mark ! --mark "+bit+"/"+bit+" -j RETURN",
		// The packet may come by again, after encapsulation.
		" -j MARK --xor-mark "+bit)
	postrouting = append(postrouting, newSource(comment("kubernetes service traffic requiring SNAT"))...)
	return [tableCount][]chain{
		nat: slices.Concat([]chain{
			{markMasqChain, frameLevel, []string{" -j MARK --or-mark " + bit}},
			{postroutingChain, trunkLevel, postrouting},
		}, sources, masqueradeChains(pods)),
		filter: {{forwardChain, frameLevel, forward}},
	}
}

// routeSources is the chain that rewrites sources to the addresses that the node's
// routes name, if they name others than MASQUERADE takes. It leaves to MASQUERADE the
// packets for which they do not.
func routeSources(node *plan.Node, random string) []chain {
	if len(node.RouteSources) == 0 {
		return nil
	}
	c := chain{name: routeSourcesChain, level: frameLevel}
	for _, s := range node.RouteSources {
		rule := " -o " + s.Link
		if s.Destination.Bits() > 0 {
			rule += " -d " + s.Destination.Masked().String()
		}
		if s.Source.IsValid() {
			rule += " -j SNAT --to-source " + s.Source.String() + random
		} else {
			rule += " -j RETURN"
		}
		c.rules = append(c.rules, rule)
	}
	return []chain{c}
}

// toExternalServices is in KUBE-SERVICES, as OUTPUT has no jump of its own to the
// external Services, and a jump that kube-proxy does not know would be in the way
// of its cleanup. INPUT leads packets for the node's own addresses there: a
// process whose datagram is rejected in OUTPUT gets EPERM and not ECONNREFUSED.
const toExternalServices = " -m addrtype ! --dst-type LOCAL -j " + externalServicesChain

// tails are the rules at the end of the trees' root chains.
func tails(family plan.Family, node *plan.Node) map[treeID][]string {
	to := func(target, text string) []string {
		var rules []string
		for _, match := range nodePortMatches(family, node) {
			rules = append(rules, match.before+comment(text)+match.after+" -j "+target)
		}
		return rules
	}
	return map[treeID][]string{
		// After the addresses: one of the node's own may be an external IP.
		servicesTree: to(nodePortsChain, "kubernetes service nodeports; NOTE: this must be the last rule in this chain"),
		emptyTree:    {toExternalServices},
		externalTree: to(externalPortsChain, "kubernetes service nodeports"),
	}
}

// splitMatch is a match that a comment stands in the middle of.
type splitMatch struct{ before, after string }

// nodePortMatches recognise packets to the addresses that serve NodePorts, one
// for each.
func nodePortMatches(family plan.Family, node *plan.Node) []splitMatch {
	if node.NodePortAddrs.All {
		notLoopback := ""
		switch {
		case family == plan.IPv6:
			notLoopback = " ! -d ::1/128"
		case !node.LocalhostNodePorts:
			notLoopback = " ! -d 127.0.0.0/8"
		}
		return []splitMatch{{notLoopback, " -m addrtype --dst-type LOCAL"}}
	}
	var matches []splitMatch
	for _, a := range node.NodePortAddrs.Addrs {
		if plan.FamilyOf(a) == family && (!a.IsLoopback() || family == plan.IPv4 && node.LocalhostNodePorts) {
			matches = append(matches, splitMatch{before: destination(a)})
		}
	}
	return matches
}
