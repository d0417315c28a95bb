// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"sync"
	"time"

	"signalbox/internal/wait"
	"signalbox/ipvs/internal/kernel"
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Proxier serves Services of one IP family in the network namespace in which it was made.
type Proxier struct {
	proxier.Defaults
	*nft.IPFamily
	mark   uint32
	tuning proxier.IPVSTuning
	// problems are those of the last Sync of everything. Only the goroutine that calls Sync
	// uses them.
	problems []*node.KernelProblem
	watch    *access.Watch

	// mu guards all fields below against the goroutine of drainLoop.
	mu         sync.Mutex
	table      *nft.Table
	ipvs       ipvsClient
	device     *kernel.Device
	schedulers schedulerChoice
	// state is nil before the first Sync and after Pause.
	state *state
	// stale: a failed write may have changed the kernel, so the next Sync reads it.
	stale bool
	// unrepaired: the kernel may differ from the state, and the Loop does not know it. Watch
	// reports it until Repair has compared.
	unrepaired bool
	// digest is the one of IPVS in the last comparison; 0 before the first.
	digest uint64
	now    func() time.Time

	wake chan struct{} // holds one token if something may drain
	stop chan struct{}
	done chan struct{}
}

var _ proxier.Proxier = (*Proxier)(nil)

// ipvsClient is kernel.IPVS, which tests replace.
type ipvsClient interface {
	Servers() (map[kernel.ServerKey]string, error)
	Destinations(kernel.ServerKey) ([]kernel.Destination, error)
	Listing() (map[kernel.ServerKey]kernel.Server, error)
	Digest() (uint64, error)
	Send(ops []kernel.Op, done func(kernel.Op)) error
	HasScheduler(name string) (bool, error)
	SetTimeouts(tcp, tcpFin, udp time.Duration) error
	Close()
}

// New opens the connections to the kernel. Nothing is written before Sync.
func New(opts proxier.Options) (*Proxier, error) {
	f := nft.FamilyOf(opts.Family)
	table, err := nft.Open(f, tableName, newSets())
	if err != nil {
		return nil, err
	}
	dev, err := kernel.OpenDevice(opts.Family)
	if err != nil {
		table.Close()
		return nil, err
	}
	ipvs, err := kernel.OpenIPVS(opts.Family)
	if err != nil {
		table.Close()
		dev.Close()
		return nil, err
	}
	p := &Proxier{
		IPFamily: f, mark: opts.MasqueradeMark, tuning: opts.IPVS, watch: access.NewWatch(table), table: table, ipvs: ipvs, device: dev,
		schedulers: newSchedulerChoice(opts.IPVS.Scheduler, ipvs.HasScheduler), now: time.Now,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}),
	}
	go p.drainLoop()
	if own := p.schedulers.own; !p.schedulers.has(own) {
		p.Close()
		return nil, fmt.Errorf("--ipvs-scheduler=%s: %w", own, kernel.ErrNoScheduler(own))
	}
	return p, nil
}

// Close ends drainLoop and closes the connections. Virtual servers and rules stay.
func (p *Proxier) Close() error {
	close(p.stop)
	<-p.done
	p.ipvs.Close()
	p.device.Close()
	return p.table.Close()
}

// Pause implements proxier.Proxier. Drained destinations stay. The Proxier forgets the
// kernel's state, because another process may change it.
func (p *Proxier) Pause() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state, p.unrepaired = nil, false
}

// TakenOver implements proxier.Proxier.
func (p *Proxier) TakenOver() proxier.TakenOver { return proxier.TakenOver{IPVS: true} }

// Sync implements proxier.Proxier.
func (p *Proxier) Sync(ctx context.Context, plan *plan.Plan, change plan.Change) error {
	if err := plan.Check(ctx, Mode, p.Family); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	defer wait.Wake(p.wake)
	switch {
	case change.All || p.current() == nil:
		return p.syncAll(plan)
	case change.Empty():
		return nil
	}
	return p.syncChange(plan, change)
}

// current is the state of the kernel, or nil if the next Sync must read it.
func (p *Proxier) current() *state {
	if p.stale {
		return nil
	}
	return p.state
}

// syncAll reads the kernel and writes the difference from the whole plan.
func (p *Proxier) syncAll(desired *plan.Plan) error {
	p.watch.RulesChanged() // this write corrects them
	if err := access.ValidateNode(p.IPFamily, desired.Node); err != nil {
		return err
	}
	if err := p.prepare(); err != nil {
		return err
	}
	p.schedulers.kernel.ForgetMissing()
	st, others, err := p.read(newRuleset(p.IPFamily, p.mark, desired.Node, affinityTimeouts(nil, desired.Services)), desired)
	if err != nil {
		return err
	}
	oldMarks, err := p.oldMarks()
	if err != nil {
		slog.Warn("ipvs: cannot read the old table: open connections and session affinity of some Services may be lost", "family", p.Family.String(), "error", err)
	}
	c := p.compiler(st, st.rules, oldMarks, func(a netip.Addr) bool { return others[a] })
	names := desired.Names()
	records, err := c.compile(desired, names)
	if err != nil {
		return err
	}
	b := st.compare(names, records)
	st.compareUnknown(b)
	b.all, b.rules = true, st.rules
	if err := p.write(st, b); err != nil {
		p.stale = true
		return err
	}
	p.state, p.stale, p.unrepaired = st, false, false
	return nil
}

// syncChange writes the changed Service ports.
func (p *Proxier) syncChange(desired *plan.Plan, change plan.Change) error {
	st := p.state
	rules := *st.rules
	if change.Node {
		rules.Node = desired.Node
		if err := access.ValidateNode(p.IPFamily, rules.Node); err != nil {
			return err
		}
	}
	changed := make(map[plan.ServicePortName]*plan.ServicePort, len(change.Services))
	oldMarks := make(map[markKey]uint32)
	for _, name := range change.Services {
		if sp := desired.Services[name]; sp != nil {
			changed[name] = sp
		}
		if r := st.records[name]; r != nil {
			maps.Copy(oldMarks, r.marks)
		}
	}
	rules.timeouts = affinityTimeouts(rules.timeouts, changed)
	records, err := p.compiler(st, &rules, oldMarks, p.device.IsLocal).compile(desired, change.Services)
	if err != nil {
		return err
	}
	b := st.compare(change.Services, records)
	b.node, b.rules = change.Node, &rules
	if err := p.write(st, b); err != nil {
		p.stale = true
		return err
	}
	return nil
}

// compiler makes a compiler of one batch. foreign says whether another device than the mode's
// has an address.
func (p *Proxier) compiler(st *state, rules *ruleset, oldMarks map[markKey]uint32, foreign func(netip.Addr) bool) *compiler {
	return &compiler{
		IPFamily: p.IPFamily, schedulers: p.schedulers, rules: rules, marks: st.marks,
		oldMarks: oldMarks, endpointMarks: st.endpointMarks,
		foreign: func(a netip.Addr) bool { return !st.onDevice[a] && foreign(a) },
	}
}

// prepare makes the device and the kernel settings. Most Services work without the settings,
// so a setting that cannot be made is only reported.
func (p *Proxier) prepare() error {
	if err := p.device.Ensure(); err != nil {
		return err
	}
	p.problems = kernel.SetSysctls(p.Family, p.tuning.StrictARP)
	t := &p.tuning
	if t.TCPTimeout == 0 && t.TCPFinTimeout == 0 && t.UDPTimeout == 0 {
		return nil
	}
	return p.ipvs.SetTimeouts(t.TCPTimeout, t.TCPFinTimeout, t.UDPTimeout)
}

// KernelProblems implements proxier.Proxier.
func (p *Proxier) KernelProblems() []*node.KernelProblem { return p.problems }

// Problem implements proxier.Proxier: a Service may ask for a scheduler that the kernel lacks.
func (p *Proxier) Problem(name plan.ServicePortName) (plan.Problem, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.current()
	if st == nil || st.records[name] == nil || st.records[name].missingScheduler == "" {
		return plan.Problem{}, false
	}
	reason := fmt.Sprintf("%v, or choose another; the Service has the scheduler of --ipvs-scheduler, %s, and the next full write asks the kernel again",
		kernel.ErrNoScheduler(st.records[name].missingScheduler), p.schedulers.own)
	return plan.Problem{
		Kind: "Service", Object: name.ServiceName.String(), Field: plan.AnnotationField(plan.AnnotationScheduler), Reason: reason,
	}, true
}

// Counts implements proxier.Proxier. Draining objects count until they are removed.
func (p *Proxier) Counts() []proxier.KernelObjects {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current().counts()
}
