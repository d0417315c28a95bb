// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"

	"signalbox/internal/xtables"
	"signalbox/proxier/plan"
)

// state is what the kernel holds. A change to it is a transition.
type state struct {
	totals
	nodeRules
	trees [treeCount]*tree
	// services are the rules of each Service port. The text of nat chains is
	// not kept: what is written says whether they change.
	services map[plan.ServicePortName]*serviceRules
	written  [tableCount]map[string]writtenChain // by name
}

// totals are what a state says of each table as a whole.
type totals struct {
	sizes        [tableCount]xtables.Size
	digests      [tableCount]digest // of the Services' rules
	digestChains [tableCount]string
}

// writtenChain tells whether a chain is as it was written.
type writtenChain struct {
	exists bool
	rules  int32
	hash   uint64
}

var hashSeed = maphash.MakeSeed()

func writtenAs(c *chain) writtenChain {
	if c.Gone {
		return writtenChain{}
	}
	var h maphash.Hash
	h.SetSeed(hashSeed)
	for _, rule := range c.Rules {
		h.WriteString(rule)
		h.WriteByte('\n')
	}
	return writtenChain{true, int32(len(c.Rules)), h.Sum64()}
}

// newState is an empty kernel.
func newState(family plan.Family) *state {
	s := &state{services: map[plan.ServicePortName]*serviceRules{}}
	for id := range treeCount {
		s.trees[id] = newTree(id, family)
	}
	for t := range tableCount {
		s.written[t] = map[string]writtenChain{}
	}
	return s
}

func (s *state) setRootRules(roots *[treeCount]rootRules) {
	for id, rules := range roots {
		t := s.trees[id]
		t.rootRules = rules
		t.markDirty(t.top)
	}
}

func (s *state) rulesOf(name plan.ServicePortName) *serviceRules {
	if rules := s.services[name]; rules != nil {
		return rules
	}
	return noRules
}

// rules are those that the kernel should hold, by table and chain. They are compiled again,
// because a state has no text of them.
func (s *state) rules(c *compiler) [tableCount]map[string][]string {
	desired := &plan.Plan{Family: c.family, Node: s.node, Services: map[plan.ServicePortName]*plan.ServicePort{}}
	for name, r := range s.services {
		desired.Services[name] = r.port
	}
	return newState(c.family).change(c.compile(desired, everything(desired))).rules()
}

// subject is the part of the rules that packets to some Service ports meet: the own chains of
// these, the chains of the dispatch trees that lead there, the static chains, and the root
// chains of all trees.
type subject struct {
	rules [tableCount]map[string][]string // by chain
	// own are chains whose rules all concern the Service ports. Chains on the way, and root
	// chains, also have rules of other Services.
	own, way map[string]bool
	// matches are texts that a rule about a frontend has.
	matches [][]string
}

func (s *state) subject(c *compiler, about []plan.ServicePortName) *subject {
	out := &subject{own: map[string]bool{}, way: map[string]bool{}}
	addOwn := func(t table, chains []chain) {
		for _, chain := range chains {
			out.rules[t][chain.Name], out.own[chain.Name] = chain.Rules, true
		}
	}
	for t := range tableCount {
		out.rules[t] = map[string][]string{}
		addOwn(t, s.static[t])
	}
	for _, tree := range s.trees {
		out.rules[tree.table][tree.root] = tree.render(tree.top, true).Rules
	}
	for _, name := range about {
		r := s.services[name]
		if r == nil {
			continue
		}
		for t, chains := range c.servicePort(r.port).chains {
			addOwn(table(t), chains)
		}
		for _, e := range r.entries {
			tree := s.trees[e.tree]
			for chain := range tree.way(e.key) {
				out.rules[tree.table][chain.Name], out.way[chain.Name] = chain.Rules, true
			}
		}
		port := func(number uint16) string { return fmt.Sprintf(" -p %s -m %[1]s --dport %d ", name.Protocol, number) }
		for i := range r.port.Frontends {
			f := &r.port.Frontends[i]
			match := []string{port(f.Port)}
			if f.Kind != plan.NodePort {
				match = append(match, destination(f.Addr)+" ")
			}
			out.matches = append(out.matches, match)
		}
	}
	return out
}

// has says whether a rule that signalbox wrote is about the Service ports. The rule of a chain
// itself is "".
func (s *subject) has(chain, rule string) bool {
	if rule == "" {
		return s.own[chain] || s.way[chain]
	}
	rule = " " + strings.TrimSpace(rule) + " "
	target := xtables.JumpTarget(rule)
	return s.own[chain] || s.own[target] || s.way[target] || slices.ContainsFunc(s.matches, func(match []string) bool {
		return !slices.ContainsFunc(match, func(part string) bool { return !strings.Contains(rule, part) })
	})
}

// In each table an empty chain, the digest chain, has a name that is a digest of all that this
// mode has there. A new process that finds another digest need not compare rules.

// digest is a sum over things in any order, so that it can follow changes.
type digest [2]uint64

func (d *digest) replace(old, next digest) {
	d[0] += next[0] - old[0]
	d[1] += next[1] - old[1]
}

// digestText collects what a digest is of.
type digestText []byte

func (d *digestText) add(parts ...string) {
	for _, p := range parts {
		*d = append(append(*d, p...), 0)
	}
}

func (d digestText) digest() digest {
	if len(d) == 0 {
		return digest{}
	}
	h := sha256.Sum256(d)
	return digest{binary.BigEndian.Uint64(h[:]), binary.BigEndian.Uint64(h[8:])}
}

// digest is that of what a ServicePort has in each table.
func (r *serviceRules) digest() (digests [tableCount]digest) {
	var texts [tableCount]digestText
	for t := range tableCount {
		for _, c := range r.chains[t] {
			texts[t].add(c.Name)
			texts[t].add(c.Rules...)
		}
	}
	for _, e := range r.entries {
		shape := treeShapes[e.tree]
		texts[shape.table].add(e.key.String(), shape.root)
		texts[shape.table].add(e.rules...)
	}
	for t := range tableCount {
		digests[t] = texts[t].digest()
	}
	return digests
}

// treeFormat must be incremented when trees with the same entries get other
// chains.
const treeFormat = 2

// digestChain is the chain for a table with these Services and static chains.
func (s *state) digestChain(t table, services digest, static []chain) string {
	var text digestText
	text.add(fmt.Sprint(treeFormat, fanOut, leafSize, maxSizeClass))
	for _, c := range static {
		text.add(c.Name)
		text.add(c.Rules...)
	}
	for _, tree := range s.trees {
		if tree.table == t {
			text.add(tree.root, tree.prefix)
			text.add(tree.rootRules.first...)
			text.add(tree.rootRules.last...)
		}
	}
	whole := text.digest()
	whole.replace(digest{}, services)
	return fmt.Sprintf("%s%016x", digestPrefix, whole[0]^whole[1])
}

// match says whether a table that was listed is what the totals say: it has
// the digest chain, and no chain or rule came or went since.
func (s *totals) match(t table, l *xtables.Listing) bool {
	var digests []string
	for _, name := range l.Chains {
		if strings.HasPrefix(name, digestPrefix) {
			digests = append(digests, name)
		}
	}
	return slices.Equal(digests, s.digestChains[t:t+1]) && l.Own == s.sizes[t]
}
