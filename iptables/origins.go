package iptables

import (
	"fmt"
	"strings"

	"signalbox/proxier/plan"
)

// podMatch recognises local Pods by one prefix or interface; is begins with a
// blank and not is its negation.
type podMatch struct{ is, not string }

const (
	fromNode    = " -m addrtype --src-type LOCAL"
	notFromNode = " -m addrtype ! --src-type LOCAL"
)

// podMatches are the ways in which a packet of a local Pod can show. Any of
// them decides, before FromNode is looked at.
func podMatches(l plan.LocalPods) ([]podMatch, error) {
	var out []podMatch
	add := func(s string) { out = append(out, podMatch{" " + s, " ! " + s}) }
	for _, p := range l.Prefixes {
		add("-s " + p.Masked().String())
	}
	for _, name := range []string{l.Interface, l.InterfacePrefix} {
		if strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\'' || r == '\\' }) {
			return nil, fmt.Errorf("interface %q of local Pods: not a name that a rule can hold", name)
		}
	}
	if l.Interface != "" {
		add("-i " + l.Interface)
	}
	if l.InterfacePrefix != "" {
		add("-i " + l.InterfacePrefix + "+")
	}
	return out, nil
}

// masqueradeChain marks traffic of origins where that takes the negation of
// several matches, which one rule cannot say.
func masqueradeChain(origins plan.TrafficSources) string {
	return fmt.Sprintf("%sMASQ-%d", clusterPrefix, origins)
}

// masquerade returns the rules that mark traffic of the origins, each limited
// by guard (empty or beginning with a blank). A packet marked twice is marked.
func masquerade(pods []podMatch, origins plan.TrafficSources, guard string) []string {
	const mark = " -j " + markMasqChain
	if len(pods) == 0 {
		origins = withoutPods(origins)
	}
	switch origins {
	case plan.NoSource:
		return nil
	case plan.AnySource:
		return []string{guard + mark}
	}
	var rules []string
	if origins&plan.FromPods != 0 {
		for _, p := range pods {
			rules = append(rules, p.is+guard+mark)
		}
		switch {
		case origins&plan.FromNode != 0:
			rules = append(rules, guard+fromNode+mark)
		case origins&plan.FromOutside != 0:
			rules = append(rules, guard+notFromNode+mark)
		}
		return rules
	}
	if len(pods) > 1 {
		return []string{guard + " -j " + masqueradeChain(origins)}
	}
	notPods := ""
	if len(pods) == 1 {
		notPods = pods[0].not
	}
	switch origins {
	case plan.FromNode:
		return []string{notPods + guard + fromNode + mark}
	case plan.FromOutside:
		return []string{notPods + guard + notFromNode + mark}
	}
	return []string{notPods + guard + mark}
}

// withoutPods is what origins mean where Pods cannot be told apart: nothing is
// FromPods, so that the other two are everything.
func withoutPods(o plan.TrafficSources) plan.TrafficSources {
	if o |= plan.FromPods; o == plan.AnySource {
		return o
	}
	return o &^ plan.FromPods
}

// masqueradeChains are what masquerade's rules jump to.
func masqueradeChains(pods []podMatch) []chain {
	if len(pods) < 2 {
		return nil
	}
	var out []chain
	for _, origins := range []plan.TrafficSources{plan.FromNode, plan.FromOutside, plan.FromNode | plan.FromOutside} {
		c := chain{name: masqueradeChain(origins), level: frameLevel + 1}
		for _, p := range pods {
			c.rules = append(c.rules, p.is+" -j RETURN")
		}
		c.rules = append(c.rules, masquerade(nil, origins, "")...)
		out = append(out, c)
	}
	return out
}
