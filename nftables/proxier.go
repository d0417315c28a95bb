package nftables

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"

	"signalbox/proxier"
)

// Mode is the name of this mode on the command line and in messages.
const Mode = "nftables"

// Proxier serves Services of one IP family. It keeps a connection to the
// kernel's nf_tables of the network namespace in which it was made.
type Proxier struct {
	*family
	mark  uint32
	wire  *wire
	state *state // nil until the first Sync
	size  size
}

var _ proxier.Proxier = (*Proxier)(nil)

// New opens the connection to the kernel. Nothing is written before Sync.
func New(opts proxier.Options) (*Proxier, error) {
	f := familyOf(opts.Family)
	w, err := dial(f, tableName)
	if err != nil {
		return nil, fmt.Errorf("mode %s, %s: %w", Mode, opts.Family, err)
	}
	return &Proxier{family: f, mark: opts.MasqueradeMark, wire: w}, nil
}

// Close closes the connection. The table stays.
func (p *Proxier) Close() error { return p.wire.close() }

// Sync implements proxier.Proxier. Every call is one transaction.
func (p *Proxier) Sync(ctx context.Context, plan *proxier.Plan, change proxier.Change) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if plan.Family != p.Family {
		return fmt.Errorf("mode %s: a plan for %s given to the proxier of %s", Mode, plan.Family, p.Family)
	}
	if change.All || p.state == nil {
		return p.syncAll(plan)
	}
	if change.Empty() {
		return nil
	}
	return p.syncChange(plan, change)
}

// syncAll replaces the table; the affinity map alone stays, with the clients in
// it. Where that is not possible, because somebody made something else of the
// old table, it goes too.
func (p *Proxier) syncAll(plan *proxier.Plan) error {
	rules := ruleset{p.family, p.mark, plan.Node}
	if err := rules.ValidateNode(rules.node); err != nil {
		return err
	}
	old, before, err := p.recall(plan)
	if err != nil {
		p.warn("cannot read the old table, clients lose their session affinity", err)
		old = nil
	}
	st, err := newStateOf(p.family, plan, before)
	if err != nil {
		return err
	}
	err = p.wire.writeAll(rules, st, old)
	if err != nil && old != nil && old.keeps {
		p.warn("cannot keep a part of the old table, clients lose their session affinity", err)
		err = p.wire.writeAll(rules, st, nil)
	}
	if err != nil {
		return fmt.Errorf("write table %s: %w", tableName, err)
	}
	p.state = st
	p.size = sizeOf(rules, st, p.wire.added)
	return nil
}

// recall finds out what table there is and which numbers mean what in it. What
// this Proxier wrote it remembers; only after a restart it has to read.
func (p *Proxier) recall(plan *proxier.Plan) (*legacy, map[proxier.ServicePortName]*record, error) {
	old, err := p.wire.survey()
	if err != nil || old == nil || !old.keeps {
		return old, nil, err
	}
	if p.state != nil {
		return old, p.state.records, nil
	}
	before, err := p.wire.readRecords(plan)
	return old, before, err
}

func (p *Proxier) warn(message string, err error) {
	slog.Warn("nftables: "+message, "family", p.Family.String(), "table", tableName, "error", err)
}

// writeAll writes the whole table in one transaction. Rules go before elements:
// a rule that is bound to a map makes the kernel walk all its elements.
func (w *wire) writeAll(rules ruleset, st *state, old *legacy) error {
	w.added = 0
	if old != nil && old.keeps {
		w.clear(old)
		w.addSets(affinity)
	} else {
		w.replaceTable()
		w.addSets()
	}
	w.addChains(rules.chains(st))
	buckets := make([][]element, setCount)
	emit := func(e element) {
		buckets[e.set] = append(buckets[e.set], e)
		if len(buckets[e.set]) == batchElements {
			w.add(buckets[e.set])
			buckets[e.set] = buckets[e.set][:0]
		}
	}
	rules.compileNode(emit)
	st.emitAll(emit)
	for _, bucket := range buckets {
		w.add(bucket)
	}
	return w.flush()
}

// syncChange writes what change names.
func (p *Proxier) syncChange(plan *proxier.Plan, change proxier.Change) error {
	rules := ruleset{p.family, p.mark, plan.Node}
	if change.Node {
		if err := rules.ValidateNode(rules.node); err != nil {
			return err
		}
	}
	s, err := p.state.stage(plan, change.Services)
	if err != nil {
		return err
	}
	if err := p.wire.writeStage(rules, s, change.Node); err != nil {
		s.undo()
		return fmt.Errorf("write %s to table %s: %w", changeText(change), tableName, err)
	}
	s.commit()
	p.size.change(rules, s, change.Node)
	return nil
}

// writeStage writes a change in one transaction.
func (w *wire) writeStage(rules ruleset, s *stage, node bool) error {
	if node {
		w.rewriteNode(rules)
	}
	chains := make([]chain, len(s.newChains))
	for i, c := range s.newChains {
		chains[i] = c.chain(w.family)
	}
	w.addChains(chains)
	bySet := func(a, b element) int { return cmp.Compare(a.set, b.set) }
	slices.SortStableFunc(s.remove, bySet)
	slices.SortStableFunc(s.add, bySet)
	w.remove(s.remove)
	w.add(s.add)
	for _, c := range s.oldChains {
		w.deleteChain(c)
	}
	return w.flush()
}

// rewriteNode replaces the rules and sets that depend on the node.
func (w *wire) rewriteNode(rules ruleset) {
	w.rewriteChains(rules.nodeChains())
	var list []element
	rules.compileNode(func(e element) { list = append(list, e) })
	for _, set := range []setID{localPods, nodePortAddrs, serviceCIDRs} {
		w.flushSet(set)
	}
	w.add(list)
}

func changeText(change proxier.Change) string {
	what := fmt.Sprintf("%d changed Service ports", len(change.Services))
	if len(change.Services) == 1 {
		what = change.Services[0].String()
	}
	if change.Node {
		what += " and the node's facts"
	}
	return what
}

// chains are all chains of the table.
func (r ruleset) chains(st *state) []chain {
	chains := r.fixedChains()
	for _, c := range st.sizedChains() {
		chains = append(chains, c.chain(r.family))
	}
	return append(append(chains, r.nodeChains()...), r.baseChains()...)
}
