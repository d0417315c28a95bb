// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"slices"
	"strings"

	"signalbox/proxier/plan"
)

// This file decides who may connect: how rules recognise a traffic source,
// which source ranges a frontend allows, and what happens to a connection that
// no endpoint takes.

// podMatch recognises local Pods by one prefix or interface; is begins with a
// blank and not is its negation.
type podMatch struct{ is, not string }

const (
	fromNode    = " -m addrtype --src-type LOCAL"
	notFromNode = " -m addrtype ! --src-type LOCAL"
)

// podMatches are the ways to recognise a packet of a local Pod. Rules try them
// all before they look for FromNode.
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

// allowSources adds the nat chain that sends only the frontend's source ranges
// on to target.
func (b *builder) allowSources(f *plan.Frontend, name, target string) string {
	b.addChain(nat, sourcesLevel, name, eachSource(f, target))
	return name
}

func eachSource(f *plan.Frontend, target string) []string {
	rules := make([]string, 0, len(f.Sources)+1)
	for _, p := range f.Sources {
		rules = append(rules, " -s "+p.Masked().String()+" -j "+target)
	}
	return rules
}

// refuse adds what the filter table does with a connection that the nat table
// did not send to an endpoint: it still has the frontend's address there.
// ranges is the name for a chain of source ranges.
func (b *builder) refuse(f *plan.Frontend, key plan.FrontendKey, match, ranges string) {
	var rules []string
	if f.Sources != nil {
		b.addChain(filter, sourcesLevel, ranges, append(eachSource(f, "RETURN"), " -j DROP"))
		rule := match + comment(b.name+" source ranges") + " -j " + ranges
		if f.Kind == plan.NodePort {
			rules = append(rules, rule)
		} else {
			b.addEntry(firewallTree, key, rule)
		}
	}
	if f.Internal.Len() == 0 || f.External.Len() == 0 {
		if b.resetStrays && b.sp.Name.Protocol == plan.TCP {
			rules = append(rules, match+midStream+comment(b.name+" without a connection")+rejectReset)
		}
		rules = append(rules, b.withoutEndpoints(f, match))
	}
	if len(rules) == 0 {
		return
	}
	tree := externalTree
	switch f.Kind {
	case plan.ClusterIP:
		tree = emptyTree
	case plan.NodePort:
		tree = externalPortsTree
	}
	b.addEntry(tree, key, rules...)
}

// withoutEndpoints is the rule for a frontend without endpoints. If it lacks
// them for some traffic sources only, packets of the others may pass with this
// destination: an endpoint can be the node itself at the same port.
func (b *builder) withoutEndpoints(f *plan.Frontend, match string) string {
	verdict, why := " -j REJECT", " has no endpoints"
	if f.WhenEmpty == plan.Drop {
		verdict, why = " -j DROP", " has no local endpoints"
	}
	internalEmpty, externalEmpty := f.Internal.Len() == 0, f.External.Len() == 0
	if internalEmpty && externalEmpty {
		return match + comment(b.name+why) + verdict
	}
	target := verdict
	if externalEmpty {
		target = " -j RETURN"
	}
	var rules []string
	for _, p := range b.pods {
		rules = append(rules, p.is+target)
	}
	rules = append(rules, fromNode+target)
	if externalEmpty {
		rules = append(rules, verdict)
	}
	// The rules follow from the name, so the chain never changes: see replaceChains.
	ordinal := 0
	if internalEmpty {
		ordinal += 2
	}
	if f.WhenEmpty == plan.Reject {
		ordinal++
	}
	name := b.chainName(externalPrefix, ordinal)
	if !slices.ContainsFunc(b.partlyEmpty, func(c chain) bool { return c.Name == name }) {
		b.partlyEmpty = append(b.partlyEmpty, chain{Name: name, Level: dispatcherLevel, Owners: b.owners, Rules: rules})
	}
	return match + comment(b.name+why) + " -j " + name
}
