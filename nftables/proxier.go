package nftables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"signalbox/internal/localhost"
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Mode is the name of this mode on the command line and in messages.
const Mode = "nftables"

// Proxier serves Services of one IP family. It keeps a connection to the
// kernel's nf_tables of the network namespace in which it was made.
type Proxier struct {
	proxier.Defaults
	*nft.IPFamily
	mark  uint32
	table *nft.Table
	state *state // nil until the first Sync
	size  size
	// localhost serves NodePorts on the loopback address.
	localhost *localhost.NodePorts
	counters  counterReader
}

var _ proxier.Proxier = (*Proxier)(nil)

// Supported says whether this node's kernel can do all that the mode needs, by
// asking it to. The error is a *proxier.UnsupportedError.
func Supported(f plan.Family) error {
	node := plan.Node{ // makes rules of every shape
		LocalPods:     plan.LocalPods{Interface: "probe0", InterfacePrefix: "probe"},
		NodePortAddrs: plan.NodePortAddrs{All: true},
	}
	rules, st := rulesetOf(nft.FamilyOf(f), proxier.DefaultMasqueradeMark, node), newState(nft.FamilyOf(f))
	for _, large := range []bool{false, true} {
		st.chains[pickChain{size: 2, timeout: time.Second, large: large}] = 0
	}
	return access.Supported(Mode, f, allSets, rules.chains(st))
}

// New opens the connection to the kernel. Nothing is written before Sync.
func New(opts proxier.Options) (*Proxier, error) {
	f := nft.FamilyOf(opts.Family)
	w, err := dial(f, tableName)
	if err != nil {
		return nil, fmt.Errorf("mode %s, %s: %w", Mode, opts.Family, err)
	}
	return &Proxier{IPFamily: f, mark: opts.MasqueradeMark, table: w, localhost: localhost.New(opts.Family, Mode)}, nil
}

// Close closes the connection and ends what is relayed on loopback. The table
// stays.
func (p *Proxier) Close() error {
	p.localhost.Close()
	return errors.Join(p.table.Close(), p.counters.close())
}

// Sync implements proxier.Proxier. Every call is one transaction. The listeners on
// loopback follow it: their failure is no failure of the Sync, see Problem.
func (p *Proxier) Sync(ctx context.Context, plan *plan.Plan, change plan.Change) error {
	if err := plan.For(ctx, Mode, p.Family); err != nil {
		return err
	}
	change.All = change.All || p.state == nil || change.Node && p.state.node.LocalhostNodePorts != plan.Node.LocalhostNodePorts
	if change.Empty() {
		return nil
	}
	write := p.syncChange
	if change.All {
		write = p.syncAll
	}
	if err := write(plan, change); err != nil {
		return err
	}
	p.localhost.Sync(plan, change)
	if plan.Node.LocalhostNodePorts {
		p.counters.open(p.IPFamily)
	}
	return nil
}

// Problem implements proxier.Proxier.
func (p *Proxier) Problem(name plan.ServicePortName) (plan.Problem, bool) {
	return p.localhost.Problem(name)
}

// Pause implements proxier.Proxier, for connections on loopback.
func (p *Proxier) Pause() { p.localhost.Pause() }

// Relays implements proxier.Proxier, for connections on loopback.
func (p *Proxier) Relays() bool { return p.localhost.Relays() }

// Drain implements proxier.Proxier, for connections on loopback.
func (p *Proxier) Drain(ctx context.Context) { p.localhost.Drain(ctx) }

// syncAll goes on with the table that an earlier process left, where it can be.
// Otherwise it replaces the table; the affinity map alone stays, with the clients
// in it. Where that is not possible, because somebody made something else of the
// old table, it goes too.
func (p *Proxier) syncAll(plan *plan.Plan, _ plan.Change) error {
	rules := rulesetOf(p.IPFamily, p.mark, plan.Node)
	if err := access.ValidateNode(rules.IPFamily, rules.Node); err != nil {
		return err
	}
	old, before, done, err := p.recall(rules, plan)
	if err != nil {
		p.warn("cannot read the old table, clients lose their session affinity", err)
		old = nil
	}
	if done {
		return nil
	}
	st, err := newStateOf(p.IPFamily, plan, stickyOnly(before), nil)
	if err != nil {
		return err
	}
	err = writeAll(p.table, rules, st, old)
	if err != nil && old != nil {
		p.warn("cannot keep a part of the old table, clients lose their session affinity", err)
		err = writeAll(p.table, rules, st, nil)
	}
	if err != nil {
		return fmt.Errorf("write table %s: %w", tableName, err)
	}
	st.node, p.state = plan.Node, st
	p.size = sizeOf(rules, st, p.table.Added)
	return nil
}

// stickyOnly leaves out what the affinity map does not speak of: the rest is
// numbered anew with the table.
func stickyOnly(ports map[plan.ServicePortName]*programmedPort) map[plan.ServicePortName]*programmedPort {
	sticky := make(map[plan.ServicePortName]*programmedPort)
	for name, r := range ports {
		if r.sticky() {
			sticky[name] = r
		}
	}
	return sticky
}

// recall finds out what table there is and which numbers mean what in it. What
// this Proxier wrote it remembers; only after a restart it has to read, and is
// done if it can go on with the table.
func (p *Proxier) recall(rules ruleset, plan *plan.Plan) (old *nft.Contents, before map[plan.ServicePortName]*programmedPort, done bool, err error) {
	old, err = p.table.Inspect()
	if err != nil || !p.table.HasDynamicMap(old, affinity) {
		return nil, nil, false, err
	}
	if p.state != nil {
		return old, p.state.ports, false, nil
	}
	st, fix, before, err := adopt(p.table, rules, plan, old)
	if err != nil || st == nil {
		return old, before, false, err
	}
	if err := writeTableDifference(p.table, fix); err != nil {
		p.warn("cannot go on with the old table and write it anew", err)
		return old, before, false, nil
	}
	st.digest, st.node, p.state = rules.digest(), plan.Node, st
	p.size = sizeOf(rules, st, fix.elements)
	return old, before, true, nil
}

func (p *Proxier) warn(message string, err error) {
	slog.Warn("nftables: "+message, "family", p.Family.String(), "table", tableName, "error", err)
}

// writeAll writes the whole table in one transaction. Rules go before elements:
// a rule that is bound to a map makes the kernel walk all its elements.
func writeAll(w *nft.Table, rules ruleset, st *state, old *nft.Contents) error {
	w.Added = 0
	if old != nil {
		w.ReplaceContents(old, affinity)
		setCounters(w, rules, old)
	} else {
		w.ReplaceTable()
		setCounters(w, rules, nil)
	}
	w.AddChains(rules.chains(st))
	buckets := make([][]nft.Element, setCount)
	emit := func(e nft.Element) {
		buckets[e.Set] = append(buckets[e.Set], e)
		if len(buckets[e.Set]) == nft.BatchElements {
			w.AddElements(buckets[e.Set])
			buckets[e.Set] = buckets[e.Set][:0]
		}
	}
	for _, e := range rules.NodeElements() {
		emit(e)
	}
	st.elements = st.emitAll(emit)
	for _, bucket := range buckets {
		w.AddElements(bucket)
	}
	st.digest = rules.digest()
	return access.Commit(w)
}

// syncChange writes what change names.
func (p *Proxier) syncChange(plan *plan.Plan, change plan.Change) error {
	rules := rulesetOf(p.IPFamily, p.mark, plan.Node)
	if change.Node {
		if err := access.ValidateNode(rules.IPFamily, rules.Node); err != nil {
			return err
		}
	}
	s, err := p.state.prepare(plan, change.Services)
	if err != nil {
		return err
	}
	digest := p.state.digest
	if change.Node {
		digest = rules.digest()
	}
	if err := writeChange(p.table, rules, s, change.Node, digest); err != nil {
		s.undo()
		return fmt.Errorf("write %s to table %s: %w", changeText(change), tableName, err)
	}
	s.commit()
	p.state.digest, p.state.node = digest, plan.Node
	p.size.change(rules, s, change.Node)
	return nil
}

// writeStage writes a change in one transaction.
func writeChange(w *nft.Table, rules ruleset, s *pendingChange, node bool, digest string) error {
	if node {
		rewriteNode(w, rules, s.state.node)
	}
	if digest != s.state.digest {
		w.AddChain(nft.Chain{Name: digest})
		w.DeleteChain(s.state.digest)
	}
	chains := make([]nft.Chain, len(s.newChains))
	for i, c := range s.newChains {
		chains[i] = c.chain(w.IPFamily)
	}
	w.AddChains(chains)
	w.RemoveElements(s.Remove)
	w.AddElements(s.Add)
	for _, c := range s.oldChains {
		w.DeleteChain(c.name())
	}
	return access.Commit(w)
}

// rewriteNode replaces the rules and sets that depend on the node.
func rewriteNode(w *nft.Table, rules ruleset, before plan.Node) {
	access.RewriteNodeChains(w, append(rules.nodeChains(), rules.postrouting()), before, rules.Node)
	rules.RewriteNodeElements(w)
}

func changeText(change plan.Change) string {
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
func (r ruleset) chains(st *state) []nft.Chain {
	chains := r.fixedChains()
	for _, c := range st.sortedChains() {
		chains = append(chains, c.chain(r.IPFamily))
	}
	chains = append(append(chains, r.nodeChains()...), r.baseChains()...)
	return append(chains, nft.Chain{Name: cmp.Or(st.digest, r.digest())})
}

// tableName is not kube-proxy's, so that a takeover can write this table first
// and remove the other afterwards, with no moment without rules.
const tableName = "signalbox"

func dial(f *nft.IPFamily, table string) (*nft.Table, error) { return nft.Open(f, table, allSets) }

// size is how much the table holds.
type size struct {
	chains, rules int
	elements      int // that do not depend on the node
	nodeElements  int
}

// sizeOf is the size of a table into which that many elements were written.
func sizeOf(rules ruleset, st *state, elements int) (n size) {
	n.countRules(rules, st)
	n.elements = elements - n.nodeElements
	return n
}

func (n *size) countRules(rules ruleset, st *state) {
	n.chains, n.rules, n.nodeElements = 0, 0, 0
	for _, c := range rules.chains(st) {
		n.chains++
		n.rules += len(c.Rules)
	}
	n.nodeElements = len(rules.NodeElements())
}

// change counts what was written.
func (n *size) change(rules ruleset, s *pendingChange, node bool) {
	n.elements += len(s.Add) - len(s.Remove)
	if node || len(s.newChains)+len(s.oldChains) > 0 {
		n.countRules(rules, s.state)
	}
}

// Counts implements proxier.Proxier. The clients that session affinity
// remembers are not counted.
func (p *Proxier) Counts() []proxier.KernelObjects {
	if p.state == nil {
		return nil
	}
	return []proxier.KernelObjects{
		{Table: tableName, Kind: "chain", Count: p.size.chains},
		{Table: tableName, Kind: "rule", Count: p.size.rules},
		{Table: tableName, Kind: "element", Count: p.size.elements + p.size.nodeElements},
	}
}
