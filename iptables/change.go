// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"slices"

	"signalbox/internal/xtables"
)

// transition is a change to a state. It ends with commit or rollback.
type transition struct {
	compiled
	totals // as they will be
	state  *state
	// steps are the chains to write in each section of the script.
	steps   [3][]chain
	written [tableCount]map[string]writtenChain // what changes
}

// stepTables are the tables of a transition's steps.
var stepTables = [3]table{filter, nat, filter}

// change compares what was compiled with the state, and changes the trees.
//
// With iptables-restore the two tables cannot change at the same time, and no
// packet may pass between them. So first the filter table refuses what the old or the new state
// refuses. Then the nat table changes. Then the filter table refuses what the
// new state refuses. Its rules take no packet that has an endpoint. Most changes
// need only one of the three steps.
func (s *state) change(to compiled) *transition {
	t := &transition{compiled: to, totals: s.totals, state: s}
	var d difference
	for name, next := range to.services {
		old := s.rulesOf(name)
		d.replace(old, next)
		for table := range tableCount {
			t.digests[table].replace(old.digests[table], next.digests[table])
		}
	}
	for table := range tableCount {
		t.written[table] = map[string]writtenChain{}
		if to.node != nil {
			d.replaceChains(table, s.static[table], to.node.static[table])
		}
	}
	if to.node != nil {
		s.setRootRules(&to.node.roots)
	} else {
		t.node = &s.nodeRules
	}
	for i, table := range stepTables {
		t.steps[i] = t.write(table, append(t.treeChains(table, &d.steps[i]), d.steps[i].chains...))
	}
	t.moveDigest(filter, &t.steps[0], &t.steps[2])
	t.moveDigest(nat, &t.steps[1])
	return t
}

// treeChains changes the entries of a table's trees and returns the chains that
// may have changed.
func (t *transition) treeChains(in table, s *step) (chains []chain) {
	for _, e := range s.drop {
		t.state.trees[e.tree].drop(e)
	}
	for _, e := range s.put {
		t.state.trees[e.tree].put(e)
	}
	for _, tree := range t.state.trees {
		if tree.table == in {
			chains = append(chains, tree.takeChanges()...)
		}
	}
	return chains
}

// write returns those of the chains that are not in the kernel like that.
func (t *transition) write(in table, chains []chain) []chain {
	return slices.DeleteFunc(chains, func(c chain) bool {
		old, changed := t.written[in][c.Name]
		if !changed {
			old = t.state.written[in][c.Name]
		}
		next := writtenAs(&c)
		if next == old {
			return true
		}
		t.written[in][c.Name] = next
		t.sizes[in].Rules += int(next.rules - old.rules)
		if next.exists && !old.exists {
			t.sizes[in].Chains++
		} else if old.exists && !next.exists {
			t.sizes[in].Chains--
		}
		return false
	})
}

// moveDigest removes a table's digest chain in the first step that writes to
// it, and adds the new one in the last.
func (t *transition) moveDigest(in table, steps ...*[]chain) {
	steps = slices.DeleteFunc(steps, func(s *[]chain) bool { return len(*s) == 0 })
	if len(steps) == 0 {
		return
	}
	first, last := steps[0], steps[len(steps)-1]
	old := t.digestChains[in]
	t.digestChains[in] = t.state.digestChain(in, t.digests[in], t.node.static[in])
	if first == last && t.digestChains[in] == old {
		return
	}
	*first = append(*first, t.write(in, []chain{xtables.Removal(old)})...)
	*last = append(*last, t.write(in, []chain{{Name: t.digestChains[in]}})...)
}

// script is the input of iptables-restore that makes the kernel take the change.
func (t *transition) script() *xtables.Script {
	var s xtables.Script
	for i, table := range stepTables {
		s.Add(table.String(), t.steps[i])
	}
	return &s
}

// rules are those of the chains that the transition writes, by table and chain.
func (t *transition) rules() (rules [tableCount]map[string][]string) {
	for table := range tableCount {
		rules[table] = map[string][]string{}
	}
	for i, table := range stepTables {
		for _, chain := range t.steps[i] {
			if !chain.Gone {
				rules[table][chain.Name] = chain.Rules
			}
		}
	}
	return rules
}

// fullScript also inserts the missing jumps, and removes the chains of earlier
// proxies that the change does not write.
func (t *transition) fullScript(kernel [tableCount]*xtables.Listing, missing []jump) *xtables.Script {
	var s xtables.Script
	for i, table := range stepTables[:2] {
		chains := t.steps[i]
		for _, name := range staleChains(kernel[table]) {
			if !t.written[table][name].exists {
				chains = append(chains, xtables.Removal(name))
			}
		}
		s.Add(table.String(), chains, jumpLines(table, missing)...)
	}
	return &s
}

// jumpLines insert the jumps of one table.
func jumpLines(t table, jumps []jump) (lines []string) {
	for _, j := range jumps {
		if j.table == t {
			lines = append(lines, "-I "+j.from+j.rule())
		}
	}
	return lines
}

// commit makes the state what the kernel holds after the change.
func (t *transition) commit() {
	s := t.state
	s.totals, s.nodeRules = t.totals, *t.node
	for name, rules := range t.services {
		if rules == noRules {
			delete(s.services, name)
			continue
		}
		for i := range rules.chains[nat] {
			rules.chains[nat][i].Rules = nil
		}
		s.services[name] = rules
	}
	for table := range tableCount {
		for name, c := range t.written[table] {
			if c.exists {
				s.written[table][name] = c
			} else {
				delete(s.written[table], name)
			}
		}
	}
}

// rollback makes the trees what they were: the kernel has nothing of the change.
func (t *transition) rollback() {
	s := t.state
	for name, rules := range t.services {
		for _, e := range rules.entries {
			s.trees[e.tree].drop(e)
		}
		for _, e := range s.rulesOf(name).entries {
			s.trees[e.tree].put(e)
		}
	}
	s.setRootRules(&s.roots)
	for _, tree := range s.trees {
		clear(tree.dirty)
	}
}

// difference is what turns rules into others, in three steps: in the filter
// table, the nat table and the filter table again.
type difference struct{ steps [3]step }

// step is a change to one table.
type step struct {
	chains    []chain // without those of trees
	put, drop []*entry
}

// firstAndLast are the steps in which a table changes.
func (d *difference) firstAndLast(t table) (first, last *step) {
	if t == nat {
		return &d.steps[1], &d.steps[1]
	}
	return &d.steps[0], &d.steps[2]
}

// replace replaces the rules of a Service port.
func (d *difference) replace(old, next *serviceRules) {
	for t := range tableCount {
		d.replaceChains(t, old.chains[t], next.chains[t])
	}
	former := make(map[entryID]*entry, len(old.entries))
	for _, e := range old.entries {
		former[e.entryID] = e
	}
	for i, e := range next.entries {
		before := former[e.entryID]
		delete(former, e.entryID)
		if before != nil && slices.Equal(before.rules, e.rules) {
			next.entries[i] = before
			continue
		}
		d.putEntry(before, e)
	}
	for _, e := range former {
		_, last := d.firstAndLast(treeShapes[e.tree].table)
		last.drop = append(last.drop, e)
	}
}

// putEntry replaces old, which may be nil. In the filter table the rules of
// both stand together in between.
func (d *difference) putEntry(old, next *entry) {
	first, last := d.firstAndLast(treeShapes[next.tree].table)
	if old != nil && first != last {
		both := *next
		both.rules = slices.Clone(next.rules)
		for _, rule := range old.rules {
			if !slices.Contains(next.rules, rule) {
				both.rules = append(both.rules, rule)
			}
		}
		first.put, first = append(first.put, &both), last
	}
	first.put = append(first.put, next)
}

// replaceChains replaces chains. One of the filter table allows sources; in
// between it allows those that both states allow.
func (d *difference) replaceChains(t table, old, next []chain) {
	first, last := d.firstAndLast(t)
	former := make(map[string][]string, len(old))
	for _, c := range old {
		former[c.Name] = c.Rules
	}
	for _, c := range next {
		rules, existed := former[c.Name]
		delete(former, c.Name)
		if existed && first != last {
			both := c
			both.Rules = slices.DeleteFunc(slices.Clone(c.Rules), func(r string) bool { return !slices.Contains(rules, r) })
			first.chains = append(first.chains, both)
			last.chains = append(last.chains, c)
			continue
		}
		first.chains = append(first.chains, c)
	}
	for name := range former {
		last.chains = append(last.chains, xtables.Removal(name))
	}
}
