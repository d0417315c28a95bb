package iptables

import (
	"fmt"
	"maps"
	"slices"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// state is what the kernel holds, or is to hold. The rules of Services' own
// chains are not in it: they are compiled again from the ServicePort where
// they are needed.
type state struct {
	compiler compiler
	node     plan.Node
	frame    [tableCount][]chain
	// frameOf makes the frame of a node with the same local Pods.
	frameOf  func(*plan.Node) [tableCount][]chain
	trees    [treeCount]*tree
	services map[plan.ServicePortName]*plan.ServicePort
	own      counts // rules of Services' own chains
	// sums are digests of what Services have in each table, and marks the names
	// of the chains that say so in the kernel.
	sums  sums
	marks [tableCount]string
	// extents are those of the tables when all was written at once.
	extents [tableCount]extent
}

// newState is what plan asks for, without its Services.
func newState(opts proxier.Options, node plan.Node, facts facts) (*state, error) {
	pods, err := podMatches(node.LocalPods)
	if err != nil {
		return nil, err
	}
	if opts.MasqueradeMark == 0 {
		opts.MasqueradeMark = proxier.DefaultMasqueradeMark
	}
	s := &state{
		compiler: compiler{opts.Family, pods},
		node:     cloneNode(node),
		frameOf: func(node *plan.Node) [tableCount][]chain {
			return frameChains(opts.MasqueradeMark, node, pods, facts)
		},
		services: map[plan.ServicePortName]*plan.ServicePort{},
	}
	s.frame = s.frameOf(&node)
	ends := tails(opts.Family, &node)
	for id := range treeCount {
		s.trees[id] = newTree(id, opts.Family)
		s.trees[id].tail = ends[id]
	}
	return s, nil
}

func cloneNode(n plan.Node) plan.Node {
	n.LocalPods.Prefixes = slices.Clone(n.LocalPods.Prefixes)
	n.OwnPods = slices.Clone(n.OwnPods)
	n.NodePortAddrs.Addrs = slices.Clone(n.NodePortAddrs.Addrs)
	n.RouteSources = slices.Clone(n.RouteSources)
	n.ServiceCIDRs = nil // not looked at
	return n
}

// full fills a new state with the plan's Services and returns the script that
// makes the kernel hold it, with the missing jumps and none of the chains in
// stale.
//
// The filter table comes first. Its rules for Services take only packets that
// the nat table did not send to an endpoint, so that none of them can harm a
// Service that works; and a Service that lost its endpoints is refused before
// it is no longer sent to them.
func (s *state) full(desired *plan.Plan, stale [tableCount][]string, missing []jump) *script {
	var edits [tableCount][]edit
	for t := range tableCount {
		for _, c := range s.frame[t] {
			edits[t] = append(edits[t], c.edit(""))
		}
	}
	s.services = maps.Clone(desired.Services)
	for _, name := range slices.SortedFunc(maps.Keys(desired.Services), plan.ServicePortName.Compare) {
		p := s.compiler.compile(desired.Services[name])
		s.own.add(p.size())
		s.sums.add(p.sums())
		for i := range p.items {
			s.trees[p.items[i].tree].put(&p.items[i])
		}
		for t := range tableCount {
			for _, c := range p.chains[t] {
				edits[t] = append(edits[t], c.edit(name.String()))
			}
		}
	}
	for _, t := range s.trees {
		edits[t.table] = append(edits[t.table], t.all()...)
	}
	for t := range tableCount {
		s.marks[t] = s.mark(t, s.sums)
		edits[t] = append(edits[t], edit{name: s.marks[t]})
		s.extents[t] = extentOf(edits[t])
	}
	w := &script{}
	for _, t := range []table{filter, nat} {
		w.table(t, withoutStale(edits[t], stale[t]), missing...)
	}
	return w
}

// withoutStale adds the removal of those stale chains that are not written.
func withoutStale(edits []edit, stale []string) []edit {
	if len(stale) == 0 {
		return edits
	}
	written := make(map[string]struct{}, len(edits))
	for _, e := range edits {
		written[e.name] = struct{}{}
	}
	for _, name := range stale {
		if _, ok := written[name]; !ok {
			edits = append(edits, removal(name))
		}
	}
	return edits
}

func (c chain) edit(owner string) edit {
	e := edit{name: c.name, level: c.level, rules: make([]ownedRule, len(c.rules))}
	for i, rule := range c.rules {
		e.rules[i] = ownedRule{rule, owner}
	}
	return e
}

// transition is a change to a state that can be undone until it is known to be
// in the kernel.
type transition struct {
	state    *state
	services map[plan.ServicePortName]*plan.ServicePort // nil: removed
	node     plan.Node
	undo     []func()
	script   script
	own      counts // as it will be
	sums     sums
	marks    [tableCount]string
}

// change brings the trees to what plan says of the named Services and, where
// node is set, to its node addresses and routes (the local Pods being the same).
//
// The two tables cannot change at the same time. So that no packet passes
// between them, the filter table refuses before the nat table changes what
// either the old or the new state refuses, and only afterwards no more than
// the new one: its rules take no packet that has an endpoint. Most changes need
// only one of the three parts.
func (s *state) change(desired *plan.Plan, change plan.Change) *transition {
	t := &transition{state: s, node: s.node, services: map[plan.ServicePortName]*plan.ServicePort{}, own: s.own, sums: s.sums, marks: s.marks}
	var d difference
	for _, name := range change.Services {
		old, next := s.services[name], desired.Services[name]
		if old == next {
			continue
		}
		t.services[name] = next
		before, after := s.programOf(old), s.programOf(next)
		t.own.replace(before.size(), after.size())
		t.sums.replace(before.sums(), after.sums())
		d.compare(name.String(), before, after)
	}
	if change.Node {
		before := s.frame[nat]
		t.setNode(desired.Node)
		d.compareChains(nat, "", before, s.frame[nat])
	}
	before, during, after := t.part(filter, d.before), t.part(nat, d.during), t.part(filter, d.after)
	t.remark(filter, &before, &after)
	t.remark(nat, &during)
	t.script.table(filter, before)
	t.script.table(nat, during)
	t.script.table(filter, after)
	return t
}

// remark has a table say what it holds from its last part on, and from its first
// part to there nothing.
func (t *transition) remark(in table, parts ...*[]edit) {
	parts = slices.DeleteFunc(parts, func(p *[]edit) bool { return len(*p) == 0 })
	if len(parts) == 0 {
		return
	}
	first, last := parts[0], parts[len(parts)-1]
	t.marks[in] = t.state.mark(in, t.sums)
	if first == last && t.marks[in] == t.state.marks[in] {
		return
	}
	*first = append(*first, removal(t.state.marks[in]))
	*last = append(*last, edit{name: t.marks[in]})
}

// part returns the edits of one part, with the trees' share.
func (t *transition) part(in table, p part) []edit {
	for _, it := range p.drop {
		t.drop(it)
	}
	for _, it := range p.put {
		t.put(it)
	}
	return append(t.state.treeEdits(in), p.edits...)
}

func (s *state) programOf(sp *plan.ServicePort) program {
	if sp == nil {
		return program{}
	}
	return s.compiler.compile(sp)
}

func (s *state) treeEdits(in table) []edit {
	var edits []edit
	for _, t := range s.trees {
		if t.table == in && len(t.changed) > 0 {
			edits = append(edits, t.takeChanges()...)
		}
	}
	return edits
}

func (t *transition) setNode(node plan.Node) {
	before := map[treeID][]string{}
	for id, rules := range tails(t.state.compiler.family, &node) {
		before[id] = t.state.trees[id].tail
		t.state.trees[id].setTail(rules)
	}
	frame := t.state.frame
	t.state.frame = t.state.frameOf(&node)
	t.node = cloneNode(node)
	t.undo = append(t.undo, func() {
		t.state.frame = frame
		for id, rules := range before {
			t.state.trees[id].setTail(rules)
		}
	})
}

func (t *transition) put(it *item) {
	tree := t.state.trees[it.tree]
	old := tree.put(it)
	t.undo = append(t.undo, func() {
		if old != nil {
			tree.put(old)
		} else {
			tree.drop(it)
		}
	})
}

func (t *transition) drop(it *item) {
	tree := t.state.trees[it.tree]
	if old := tree.drop(it); old != nil {
		t.undo = append(t.undo, func() { tree.put(old) })
	}
}

// commit says that the kernel holds the change.
func (t *transition) commit() {
	for name, sp := range t.services {
		if sp == nil {
			delete(t.state.services, name)
		} else {
			t.state.services[name] = sp
		}
	}
	t.state.node, t.state.own = t.node, t.own
	t.state.sums, t.state.marks = t.sums, t.marks
}

// rollback says that the kernel holds nothing of the change.
func (t *transition) rollback() {
	for _, undo := range slices.Backward(t.undo) {
		undo()
	}
	for _, tree := range t.state.trees {
		tree.takeChanges()
	}
}

// difference is what turns programs into others, in three parts: in the filter
// table, the nat table and the filter table again.
type difference struct{ before, during, after part }

// part is a change to one table.
type part struct {
	edits     []edit // of Services' own chains
	put, drop []*item
}

type itemID struct {
	tree treeID
	key  plan.FrontendKey
}

func (d *difference) compare(owner string, old, next program) {
	for t := range tableCount {
		d.compareChains(t, owner, old.chains[t], next.chains[t])
	}
	items := make(map[itemID]*item, len(old.items))
	for i := range old.items {
		it := &old.items[i]
		items[itemID{it.tree, it.key}] = it
	}
	for i := range next.items {
		it := &next.items[i]
		id := itemID{it.tree, it.key}
		d.compareItem(items[id], it)
		delete(items, id)
	}
	for i := range old.items {
		it := &old.items[i]
		if items[itemID{it.tree, it.key}] == it {
			d.compareItem(it, nil)
		}
	}
}

func (d *difference) compareChains(t table, owner string, old, next []chain) {
	before := make(map[string][]string, len(old))
	for _, c := range old {
		before[c.name] = c.rules
	}
	for _, c := range next {
		rules, existed := before[c.name]
		delete(before, c.name)
		switch {
		case existed && slices.Equal(rules, c.rules):
		case t == nat:
			d.during.edits = append(d.during.edits, c.edit(owner))
		case !existed:
			d.before.edits = append(d.before.edits, c.edit(owner))
		default:
			d.narrow(owner, rules, c)
		}
	}
	end := &d.after
	if t == nat {
		end = &d.during
	}
	for _, name := range slices.Sorted(maps.Keys(before)) {
		end.edits = append(end.edits, removal(name))
	}
}

// narrow changes a chain that lets sources through: in between it lets those
// through that both states do.
func (d *difference) narrow(owner string, old []string, next chain) {
	both := next
	both.rules = slices.DeleteFunc(slices.Clone(next.rules), func(r string) bool { return !slices.Contains(old, r) })
	if !slices.Equal(both.rules, old) {
		d.before.edits = append(d.before.edits, both.edit(owner))
	}
	if !slices.Equal(both.rules, next.rules) {
		d.after.edits = append(d.after.edits, next.edit(owner))
	}
}

// compareItem replaces old by next, of which one may be nil. In the filter
// table the rules of both stand together in between.
func (d *difference) compareItem(old, next *item) {
	switch {
	case next == nil && treeShapes[old.tree].table == nat:
		d.during.drop = append(d.during.drop, old)
	case next == nil:
		d.after.drop = append(d.after.drop, old)
	case old != nil && slices.Equal(old.rules, next.rules):
	case treeShapes[next.tree].table == nat:
		d.during.put = append(d.during.put, next)
	case old == nil:
		d.before.put = append(d.before.put, next)
	default:
		both := *next
		both.rules = slices.Clone(next.rules)
		for _, rule := range old.rules {
			if !slices.Contains(next.rules, rule) {
				both.rules = append(both.rules, rule)
			}
		}
		if !slices.Equal(both.rules, old.rules) {
			d.before.put = append(d.before.put, &both)
		}
		if !slices.Equal(both.rules, next.rules) {
			d.after.put = append(d.after.put, next)
		}
	}
}

// Render returns the input of iptables-restore that makes a node do what plan
// says, on a kernel and with tools that can do all that rules may use. Only
// the jumps from built-in chains are not in it.
func Render(opts proxier.Options, plan *plan.Plan) (string, error) {
	s, err := newState(opts, plan.Node, facts{dropInvalid: true, randomFully: true})
	if err != nil {
		return "", fmt.Errorf("render %s rules: %w", Mode, err)
	}
	return s.full(plan, [tableCount][]string{}, nil).String(), nil
}
