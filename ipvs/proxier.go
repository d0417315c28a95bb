package ipvs

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"signalbox/ipvs/internal/kernel"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Mode is the name of this mode on the command line and in messages.
const Mode = "ipvs"

// Proxier serves Services of one IP family in the network namespace in which it
// was made.
type Proxier struct {
	proxier.Defaults
	*nft.IPFamily
	mark   uint32
	tuning proxier.IPVSTuning

	// mu guards what follows against the goroutine that ends what has drained.
	mu     sync.Mutex
	table  *nft.Table
	ipvs   ipvsClient
	device *kernel.Device
	// state is nil until the first Sync, after one that failed half-way, and
	// after Pause.
	state      *state
	schedulers schedulerChoice
	// last are the records of the last Sync that is known to have succeeded.
	last map[plan.ServicePortName]*record
	// deadlines are those of state, and of the next.
	deadlines *deadlines
	now       func() time.Time
	// problems are the kernel settings that could not be made.
	problems []*node.KernelProblem

	wake chan struct{} // holds one token when there is something to drain
	stop chan struct{}
	done chan struct{}
}

var _ proxier.Proxier = (*Proxier)(nil)

// New opens the connections to the kernel. Nothing is written before Sync.
func New(opts proxier.Options) (*Proxier, error) {
	fail := func(err error) (*Proxier, error) { return nil, fmt.Errorf("mode %s, %s: %w", Mode, opts.Family, err) }
	f := nft.FamilyOf(opts.Family)
	table, err := nft.Open(f, tableName, newSets())
	if err != nil {
		return fail(err)
	}
	dev, err := kernel.OpenDevice(opts.Family)
	if err != nil {
		table.Close()
		return fail(err)
	}
	ipvs, err := kernel.OpenIPVS(opts.Family)
	if err != nil {
		table.Close()
		dev.Close()
		return fail(err)
	}
	p := &Proxier{
		IPFamily: f, mark: opts.MasqueradeMark, tuning: opts.IPVS, table: table, ipvs: ipvs, device: dev,
		deadlines: newDeadlines(), now: time.Now,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}),
	}
	p.schedulers = newSchedulerChoice(opts.IPVS.Scheduler, ipvs.HasScheduler)
	if !p.schedulers.has(p.schedulers.own) {
		table.Close()
		dev.Close()
		ipvs.Close()
		return fail(fmt.Errorf("--ipvs-scheduler=%s: %w", p.schedulers.own, kernel.ErrNoScheduler(p.schedulers.own)))
	}
	go p.drainLoop()
	return p, nil
}

// Close ends the watch over what drains, and closes the connections. Virtual
// servers and rules stay.
func (p *Proxier) Close() error {
	close(p.stop)
	<-p.done
	p.ipvs.Close()
	p.device.Close()
	return p.table.Close()
}

// Pause implements proxier.Proxier. Destinations that have drained stay, and this
// process forgets what it knows of the kernel, because the other may change it.
func (p *Proxier) Pause() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state, p.last, p.deadlines = nil, nil, newDeadlines()
}

// TakenOver implements proxier.Proxier.
func (p *Proxier) TakenOver() proxier.TakenOver { return proxier.TakenOver{IPVS: true} }

// Sync implements proxier.Proxier. IPVS knows no transactions: what brings new
// connections to endpoints is written first, then in one transaction the rules
// that lead packets there, then what ends connections.
func (p *Proxier) Sync(ctx context.Context, plan *plan.Plan, change plan.Change) error {
	if err := plan.For(ctx, Mode, p.Family); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.wakeDrain()
	if change.All || p.state == nil {
		return p.syncAll(plan)
	}
	if change.Empty() {
		return nil
	}
	return p.syncChange(plan, change)
}

// syncAll reads what there is and makes of it what is wanted.
func (p *Proxier) syncAll(desired *plan.Plan) error {
	rules := rulesetOf(p.IPFamily, p.mark, desired.Node, timeoutsOf(desired))
	if err := access.ValidateNode(rules.IPFamily, rules.Node); err != nil {
		return err
	}
	if err := p.prepare(); err != nil {
		return err
	}
	p.schedulers.kernel.ForgetMissing()
	st, err := p.read(rules)
	if err != nil {
		return err
	}
	before, err := p.marksBefore()
	if err != nil {
		slog.Warn("ipvs: cannot read the old table: open connections and session affinity of some Services may be lost", "family", p.Family.String(), "error", err)
	}
	names := slices.SortedFunc(maps.Keys(desired.Services), plan.ServicePortName.Compare)
	b, err := st.stage(desired, names, p.compiler(st, before))
	if err != nil {
		return err
	}
	st.diffUnwanted(b)
	b.all = true
	if err := p.write(st, b); err != nil {
		p.state = nil
		return err
	}
	p.state, p.last = st, st.records
	return nil
}

// syncChange writes what change names.
func (p *Proxier) syncChange(desired *plan.Plan, change plan.Change) error {
	st := p.state
	if change.Node {
		rules := *st.rules
		rules.Node = desired.Node
		if err := access.ValidateNode(rules.IPFamily, rules.Node); err != nil {
			return err
		}
	}
	known := len(st.rules.timeouts)
	before := func(name plan.ServicePortName) func(markKey) uint32 {
		return func(k markKey) uint32 {
			if r := st.records[name]; r != nil {
				return r.marks[k]
			}
			return 0
		}
	}
	b, err := st.stage(desired, change.Services, p.compilerBy(st, before))
	if err != nil {
		st.rules.timeouts = st.rules.timeouts[:known]
		return err
	}
	b.knownTimeouts = known
	if change.Node {
		b.node, b.nodeBefore = true, st.rules.Node
		st.rules.Node = desired.Node
	}
	if err := p.write(st, b); err != nil {
		p.state = nil
		return err
	}
	return nil
}

// write puts a batch into the kernel and the state.
func (p *Proxier) write(st *state, b *batch) error {
	unknown := func(err error) error { return fmt.Errorf("%w: %w", proxier.ErrUnknownState, err) }
	if err := p.ipvs.Send(b.grow, st.note); err != nil {
		return unknown(err)
	}
	if err := p.writeTable(st, b); err != nil {
		return unknown(fmt.Errorf("write table %s: %w", tableName, err))
	}
	if err := p.device.Add(b.newVIPs, func(a netip.Addr) { st.held[a] = true }); err != nil {
		return unknown(err)
	}
	if err := p.device.AwaitLocal(b.newVIPs); err != nil {
		return unknown(err)
	}
	if err := p.ipvs.Send(b.shrink, st.note); err != nil {
		return unknown(err)
	}
	st.commit(b, p.now())
	return nil
}

// writeTable writes the table's part in one transaction.
func (p *Proxier) writeTable(st *state, b *batch) error {
	t := p.table
	if b.all {
		old, err := t.Inspect()
		if err != nil {
			return err
		}
		if t.HasDynamicMap(old, affinity) {
			t.ReplaceContents(old, affinity)
		} else {
			t.ReplaceTable()
		}
		t.AddChains(st.rules.chains())
		list := append(st.rules.NodeElements(), b.add...)
		for a := range st.held {
			list = append(list, vipElement(a))
		}
		for _, a := range b.newVIPs {
			list = append(list, vipElement(a))
		}
		t.AddElements(bySet(list))
		return access.Commit(t)
	}
	if b.knownTimeouts < len(st.rules.timeouts) {
		chains := st.rules.affinityChains()
		last := len(chains) - 2
		t.AddChains(chains[b.knownTimeouts*(maxVariants+1) : last])
		t.RewriteChains(chains[last:])
	}
	add := b.add
	if b.node {
		access.RewriteNodeChains(t, append(st.rules.nodeChains(), st.rules.postrouting()), b.nodeBefore, st.rules.Node)
		st.rules.RewriteNodeElements(t)
	}
	for _, a := range b.newVIPs {
		add = append(add, vipElement(a))
	}
	if len(add)+len(b.remove) == 0 && !b.node && b.knownTimeouts == len(st.rules.timeouts) {
		return nil // as when an endpoint comes or goes
	}
	t.RemoveElements(bySet(b.remove))
	t.AddElements(bySet(add))
	return access.Commit(t)
}

func vipElement(a netip.Addr) nft.Element {
	return nft.Element{Set: vips, Key: addrBytes(a)}
}

func bySet(list []nft.Element) []nft.Element {
	slices.SortStableFunc(list, func(a, b nft.Element) int { return cmp.Compare(a.Set, b.Set) })
	return list
}

// compiler makes records for a state whose marks come from elsewhere.
func (p *Proxier) compiler(st *state, before func(markKey) uint32) func(plan.ServicePortName) *compiler {
	return p.compilerBy(st, func(plan.ServicePortName) func(markKey) uint32 { return before })
}

func (p *Proxier) compilerBy(st *state, before func(plan.ServicePortName) func(markKey) uint32) func(plan.ServicePortName) *compiler {
	return func(name plan.ServicePortName) *compiler {
		return &compiler{
			IPFamily: p.IPFamily, schedulers: p.schedulers, pool: st.pool,
			before: before(name), numbered: st.numbered, class: st.class,
			foreign: func(a netip.Addr) bool {
				switch {
				case st.held[a]:
					return false
				case st.others != nil:
					return st.others[a]
				}
				return p.device.IsLocal(a)
			},
		}
	}
}

// marksBefore finds which marks frontends have had so far: this process knows,
// or else the table does.
func (p *Proxier) marksBefore() (func(markKey) uint32, error) {
	found := make(map[markKey]uint32)
	before := func(k markKey) uint32 { return found[k] }
	if p.last != nil {
		for _, r := range p.last {
			maps.Copy(found, r.marks)
		}
		return before, nil
	}
	for set, internal := range map[nft.SetID]bool{marks: false, nodePortMarks: false, internalMarks: true, internalNodePortMarks: true} {
		elements, err := p.table.Read(set)
		if err != nil {
			return before, err
		}
		for _, e := range elements {
			if len(e.Val) == 4 {
				fe := access.FrontendOfBytes(p.IPFamily, e.Key, set == nodePortMarks || set == internalNodePortMarks)
				found[markKey{fe, internal}] = nft.MarkOfData(e.Val)
			}
		}
	}
	return before, nil
}

func timeoutsOf(plan *plan.Plan) []time.Duration {
	distinct := make(map[time.Duration]bool)
	for _, sp := range plan.Services {
		if sp.AffinityTimeout > 0 {
			distinct[sp.AffinityTimeout] = true
		}
	}
	return slices.Sorted(maps.Keys(distinct))
}

// Counts implements proxier.Proxier. What drains counts until it is gone.
func (p *Proxier) Counts() []proxier.KernelObjects {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counts()
}

func (p *Proxier) counts() []proxier.KernelObjects {
	if p.state == nil {
		return nil
	}
	dests := 0
	for _, s := range p.state.servers {
		dests += len(s.dests)
	}
	return []proxier.KernelObjects{
		{Kind: "virtual-server", Count: len(p.state.servers)},
		{Kind: "real-server", Count: dests},
		{Kind: "address", Count: len(p.state.held)},
		{Table: tableName, Kind: "element", Count: len(p.state.uses) + len(p.state.held) + len(p.state.rules.NodeElements())},
	}
}
