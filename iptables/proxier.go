// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-iptables/iptables"

	"signalbox/internal/wait"
	"signalbox/internal/xtables"
	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Mode is the name of this mode.
const Mode = "iptables"

// Dataplane is the iptables mode.
type Dataplane struct{ proxier.ModeDefaults }

var _ proxier.Mode = Dataplane{}

// Name implements proxier.Mode.
func (Dataplane) Name() string { return Mode }

// New implements proxier.Mode.
func (Dataplane) New(o proxier.Options) (proxier.Proxier, error) { return New(o) }

// Cleanup implements proxier.Mode. The rules can go: conntrack keeps connections.
func (Dataplane) Cleanup(f plan.Family, _ bool) (removed bool, draining int, err error) {
	removed, err = Cleanup(f)
	return removed, 0, err
}

// Written implements proxier.Mode.
func (Dataplane) Written(f plan.Family) (found bool, taken proxier.TakenOver, err error) {
	ctx := context.Background()
	t, _, err := xtables.Choose(ctx, f, "")
	if err != nil {
		return false, taken, err
	}
	found, err = wrote(ctx, t)
	return found, proxier.TakenOver{IPTables: string(t.Backend)}, err
}

// Render implements proxier.Mode. It returns the input of iptables-restore,
// without the jumps from built-in chains.
func (Dataplane) Render(opts proxier.Options, plan *plan.Plan) (string, error) {
	c, err := newCompiler(opts, &plan.Node, true)
	if err != nil {
		return "", err
	}
	return newState(opts.Family).change(c.compile(plan, everything(plan))).script().String(), nil
}

// Traits implements proxier.Mode.
func (Dataplane) Traits() proxier.Traits {
	return proxier.Traits{
		Automatic:   true,
		FileSection: "iptables",
		Series: []string{
			"sync_full_proxy_rules_duration_seconds", "sync_partial_proxy_rules_duration_seconds",
			"sync_proxy_rules_iptables_restore_failures_total", "sync_proxy_rules_iptables_partial_restore_failures_total",
			"sync_proxy_rules_iptables_total", "sync_proxy_rules_iptables_last",
		},
		Localhost: proxier.LocalhostByRoute,
	}
}

// Backend is the variant of the iptables tools.
type Backend = xtables.Backend

// The two variants.
const (
	Legacy = xtables.Legacy
	NFT    = xtables.NFT
)

// Tuning holds options of New that other modes do not have.
type Tuning struct {
	// Backend is the one that the node's other software uses if empty.
	Backend Backend
	// Logger is slog.Default() when nil.
	Logger *slog.Logger
}

// Proxier programs one family. The tools it runs work in the network namespace
// of the calling thread.
type Proxier struct {
	proxier.Defaults
	opts  proxier.Options
	tools *xtables.Tools
	log   *slog.Logger
	// state is what the kernel holds, and compiler makes rules for it; nil while
	// that is not known.
	state    *state
	compiler *compiler
	// written is the number of rules that the last Sync wrote.
	written [tableCount]int
	// problems are the kernel settings that could not be made; see
	// KernelProblems.
	problems []*node.KernelProblem
	// started says that this process has written, or found, its rules once.
	started bool
	// triedNetlink says that this process has found out whether netlink can write.
	triedNetlink bool
	// rulesDiffer says that nothing but a comparison of each rule has found a difference
	// since the last full write.
	rulesDiffer bool
	// unreadable says that the tools print rules in words that the comparison does not know:
	// see checkWords. suspects are differences that its last look found.
	unreadable bool
	suspects   []string
	// firewallSeen are the changes by other software after which Watch found firewallRule.
	firewallSeen int
	// loopbackOpen is opensLoopback of the last plan that was written. mu cannot guard it: Watch
	// may hold mu while it waits for a write.
	loopbackOpen atomic.Bool

	mu sync.Mutex // guards what follows against Watch
	// observer is nil until the kernel can be asked.
	observer *xtables.Observer
	// seen are the changes by other software that Watch has reported.
	seen int
	// compareTook is how long the last Repair took.
	compareTook time.Duration
	// intact is the answer of the last Intact, after so many changes by other software.
	intact      bool
	intactAfter int
}

// New chooses the variant of the tools. It writes nothing.
func New(opts proxier.Options, tuning ...Tuning) (*Proxier, error) {
	var tune Tuning
	if len(tuning) > 0 {
		tune = tuning[0]
	}
	if tune.Logger == nil {
		tune.Logger = slog.Default()
	}
	t, why, err := xtables.Choose(context.Background(), opts.Family, tune.Backend)
	if err != nil {
		return nil, err
	}
	tune.Logger.Info("iptables backend", "family", opts.Family.String(), "backend", string(t.Backend), "reason", why, "program", t.Restore)
	p := &Proxier{opts: opts, tools: t, log: tune.Logger}
	if p.observer, err = t.Observe(); err != nil {
		tune.Logger.Warn("changes of the rules by other software are not noticed yet; signalbox tries again each second", "family", opts.Family.String(), "error", err)
	}
	return p, nil
}

// TakenOver implements proxier.Proxier.
func (p *Proxier) TakenOver() proxier.TakenOver {
	return proxier.TakenOver{IPTables: string(p.tools.Backend)}
}

// Intact implements proxier.Proxier. It reads the table again only after a change by other
// software.
func (p *Proxier) Intact(ctx context.Context) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	changes := p.changesLocked()
	if changes >= 0 && p.intact && changes == p.intactAfter {
		return true, nil
	}
	var err error
	p.intact, err = wrote(ctx, p.tools)
	p.intactAfter = changes
	return p.intact, err
}

// Close implements proxier.Proxier.
func (p *Proxier) Close() error {
	if p.observer == nil {
		return nil
	}
	return p.observer.Close()
}

// Sync implements proxier.Proxier. The rules of nearly every Service tell local
// Pods from others: a change of these writes everything anew, as change.All does.
func (p *Proxier) Sync(ctx context.Context, desired *plan.Plan, change plan.Change) error {
	if err := desired.Check(ctx, Mode, p.opts.Family); err != nil {
		return err
	}
	if change.All || p.state == nil || change.Node && needsFull(&p.state.node, &desired.Node) {
		return p.full(ctx, desired)
	}
	var node *plan.Node
	if change.Node {
		node = &desired.Node
	}
	t := p.state.change(p.compiler.compile(desired, change))
	if err := p.write(ctx, node, t.script()); err != nil {
		t.rollback()
		return err
	}
	t.commit()
	return nil
}

// full writes everything, removes what earlier proxies left, and inserts the
// missing jumps: existing ones keep their place. If an earlier process left the
// tables as they should be, it writes no chain.
func (p *Proxier) full(ctx context.Context, plan *plan.Plan) error {
	if !p.started {
		p.observe() // the listing has the changes so far, so Watch need not report them
	}
	client, err := p.tools.Client()
	if err != nil {
		return err
	}
	kernel, err := p.list(ctx)
	if err != nil {
		return err
	}
	missing, err := missingJumps(client, kernel)
	if err != nil {
		return err
	}
	compiler, err := newCompiler(p.opts, &plan.Node, dropInvalid())
	if err != nil {
		return err
	}
	before := p.changes()
	next := newState(p.opts.Family)
	t := next.change(compiler.compile(plan, everything(plan)))
	var script *xtables.Script
	if !p.started && len(p.differences(&t.totals, kernel, t.rules)) == 0 {
		script = &xtables.Script{}
		for table := range tableCount {
			script.Add(table.String(), nil, jumpLines(table, missing)...)
		}
	} else {
		if !slices.Contains(kernel[filter].Chains, servicesChain) {
			if err := p.writeMarker(ctx); err != nil {
				return err
			}
		}
		script = t.fullScript(kernel, missing)
	}
	if err := p.write(ctx, &plan.Node, script); err != nil {
		return err
	}
	t.commit()
	p.state, p.compiler, p.started = next, compiler, true
	if p.rulesDiffer || p.unreadable {
		p.checkWords(ctx, before)
	}
	p.rulesDiffer = false
	return nil
}

// differences says how the kernel differs from what was written. If the digest chains and the
// numbers of chains and rules do not differ, it compares each rule: another program may have
// replaced one.
func (p *Proxier) differences(written *totals, kernel [tableCount]*xtables.Listing, rules func() [tableCount]map[string][]string) (found []string) {
	p.rulesDiffer = false
	for t := range tableCount {
		if !written.match(t, kernel[t]) {
			found = append(found, "chains or rules of table "+t.String()+" differ")
		}
	}
	if len(found) > 0 || p.unreadable {
		return found
	}
	found = p.differentRules(kernel, rules())
	p.rulesDiffer = len(found) > 0
	return found
}

func (p *Proxier) differentRules(kernel [tableCount]*xtables.Listing, rules [tableCount]map[string][]string) []string {
	var c proxier.Comparison
	for t, wanted := range rules {
		p.tools.Compare(&c, table(t).String(), wanted, kernel[t].OwnRules, nil)
	}
	return c.Differences
}

// maxSuspects bounds the memory for the differences that two looks of checkWords compare.
const maxSuspects = 100

// checkWords compares each rule after a full write for which such a comparison was the only
// reason. Before the write there were so many changes by other software. If two such looks
// find the same difference, the tools print rules in words that the comparison does not know.
// Then rules are no longer compared: each comparison would lead to a full write. The first
// full write without a difference ends that.
func (p *Proxier) checkWords(ctx context.Context, changes int) {
	kernel, err := p.list(ctx)
	if err != nil {
		return // the next comparison leads here again
	}
	found := p.differentRules(kernel, p.state.rules(p.compiler))
	if changes < 0 || p.changes() != changes {
		return // other software may have made the differences
	}
	again := slices.ContainsFunc(found, func(difference string) bool { return slices.Contains(p.suspects, difference) })
	p.suspects = slices.Clone(found[:min(len(found), maxSuspects)])
	switch {
	case len(found) == 0:
		p.unreadable = false
	case again && !p.unreadable:
		p.unreadable = true
		p.log.Warn("the iptables tools print rules in a form that signalbox does not know; a rule that another program replaces by another one is not noticed",
			"family", p.opts.Family.String(), "program", p.tools.Save, "differences", len(found), "first", found[0])
	}
}

// writeMarker comes before all other rules on a node without any. If the process is
// killed before it has written these, cleanup knows whose chains it finds.
func (p *Proxier) writeMarker(ctx context.Context) error {
	var s xtables.Script
	s.Add(filter.String(), []chain{{Name: externalServicesChain}, {Name: servicesChain, Level: 1, Rules: []string{toExternalServices}}})
	return p.write(ctx, nil, &s)
}

// list reads the tables.
func (p *Proxier) list(ctx context.Context) (kernel [tableCount]*xtables.Listing, err error) {
	for t := range tableCount {
		if kernel[t], err = p.tools.List(ctx, t.String(), isOurs, markerRules...); err != nil {
			return kernel, err
		}
	}
	return kernel, nil
}

// observePeriod is the time between two looks at whether the tables may have changed.
const observePeriod = time.Second

// Watch implements proxier.Proxier. After a change by other software it leaves them alone
// for 20 times as long as the comparison took: some software writes all the time. Only the
// rules that keep other hosts from 127.0.0.1 do not wait.
func (p *Proxier) Watch(ctx context.Context, drifted func(proxier.Writer)) {
	for pauseEnd := time.Now(); wait.For(ctx, observePeriod); {
		if time.Now().Before(pauseEnd) && !p.losesFirewall() {
			continue
		}
		if by, changed, took := p.observe(); changed {
			drifted(by)
			pauseEnd = time.Now().Add(20 * took)
		}
	}
}

// losesFirewall says whether a change by other software since the last call removed what
// keeps other hosts from 127.0.0.1. Only Watch calls it.
func (p *Proxier) losesFirewall() bool {
	if !p.loopbackOpen.Load() {
		return false
	}
	changes := p.changes()
	if changes < 0 || changes == p.firewallSeen {
		return false
	}
	client, err := p.tools.Client()
	if err != nil {
		return false // the next call tries again
	}
	complete, err := hasLocalnetFirewall(client)
	if err == nil && complete {
		p.firewallSeen = changes
	}
	return err == nil && !complete
}

// observe says whether other software may have changed the tables since the last call, or
// before the kernel could be asked.
func (p *Proxier) observe() (by proxier.Writer, changed bool, compareTook time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.observer == nil {
		var err error
		if p.observer, err = p.tools.Observe(); err != nil {
			return by, false, 0
		}
		changed = true
	}
	if n, last, err := p.observer.Changes(); err == nil && n != p.seen {
		p.seen, by, changed = n, last, true
	}
	return by, changed, p.compareTook
}

// changes is the number of changes by other software so far, and -1 if the kernel cannot be
// asked.
func (p *Proxier) changes() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changesLocked()
}

func (p *Proxier) changesLocked() int {
	if p.observer == nil {
		return -1
	}
	n, _, err := p.observer.Changes()
	if err != nil {
		return -1
	}
	return n
}

// Repair implements proxier.Proxier. It first writes what keeps other hosts from 127.0.0.1. All
// else it only compares: a full write is one restore.
func (p *Proxier) Repair(ctx context.Context) (found proxier.Difference, err error) {
	if p.state == nil {
		return found, nil
	}
	began := time.Now()
	client, err := p.tools.Client()
	if err != nil {
		return found, err
	}
	if found.Objects, err = p.repairFirewall(client); err != nil {
		return found, err
	}
	kernel, err := p.list(ctx)
	if err != nil {
		return found, err
	}
	missing, err := missingJumps(client, kernel)
	if err != nil {
		return found, err
	}
	if !kernel[filter].Marked {
		// If another proxy wrote the chain, the daemon decides who serves.
		if rules, err := client.List(filter.String(), servicesChain); err == nil && len(rules) > 1 {
			return found, nil
		}
	}
	differ := p.differences(&p.state.totals, kernel, func() [tableCount]map[string][]string { return p.state.rules(p.compiler) })
	for _, j := range missing {
		differ = append(differ, fmt.Sprintf("table %s: the jump from %s to %s is missing", j.table, j.from, j.target))
	}
	found.Objects = append(found.Objects, differ...)
	found.NeedsFullWrite = len(differ) > 0
	p.mu.Lock()
	defer p.mu.Unlock()
	p.compareTook = time.Since(began)
	return found, nil
}

// repairFirewall writes what keeps other hosts from 127.0.0.1, and says so if it was missing.
func (p *Proxier) repairFirewall(client *iptables.IPTables) ([]string, error) {
	exposed, err := p.exposesLoopback(client)
	if err != nil || len(exposed) == 0 {
		return nil, err
	}
	return exposed, p.tools.Unobserved(func() error { return p.prepareNode(&p.state.node) })
}

// exposesLoopback says so if the rules are missing that keep other hosts from 127.0.0.1.
func (p *Proxier) exposesLoopback(client *iptables.IPTables) ([]string, error) {
	if !p.opensLoopback(&p.state.node) {
		return nil, nil
	}
	if complete, err := hasLocalnetFirewall(client); err != nil || complete {
		return nil, err
	}
	return []string{"the chain " + firewallChain + " does not keep other hosts from 127.0.0.1"}, nil
}

// Compare implements proxier.Proxier.
func (p *Proxier) Compare(ctx context.Context, about ...plan.ServicePortName) (c proxier.Comparison, err error) {
	if p.state == nil {
		return c, proxier.ErrNothingWritten
	}
	client, err := p.tools.Client()
	if err != nil {
		return c, err
	}
	kernel, err := p.compare(ctx, &c, about)
	if err != nil {
		return c, err
	}
	missing, err := missingJumps(client, kernel)
	if err != nil {
		return c, err
	}
	for _, j := range missing {
		c.Differences = append(c.Differences, fmt.Sprintf("-%s -t %s -A %s%s", xtables.CommandName(p.opts.Family), j.table, j.from, j.rule()))
	}
	every, some := preceding(kernel[nat])
	line := func(rule string) string { return xtables.CommandName(p.opts.Family) + " -t nat " + rule }
	for _, rule := range every {
		c.Differences = append(c.Differences, fmt.Sprintf("%s comes before the jump to %s, and takes every packet", line(rule), servicesChain))
	}
	for _, rule := range some {
		c.Before = append(c.Before, line(rule))
	}
	exposed, err := p.exposesLoopback(client)
	c.Differences = append(c.Differences, exposed...)
	return c, err
}

// compare compares the chains, or with about those of some Service ports.
func (p *Proxier) compare(ctx context.Context, c *proxier.Comparison, about []plan.ServicePortName) (kernel [tableCount]*xtables.Listing, err error) {
	if len(about) == 0 {
		wanted := p.state.rules(p.compiler)
		for t := range tableCount {
			if kernel[t], err = p.tools.List(ctx, t.String(), isOurs); err != nil {
				return kernel, err
			}
			p.tools.Compare(c, t.String(), wanted[t], kernel[t].OwnRules, nil)
		}
		return kernel, nil
	}
	s := p.state.subject(p.compiler, about)
	for t := range tableCount {
		if kernel[t], err = p.tools.ListOf(ctx, t.String(), slices.Collect(maps.Keys(s.rules[t])), jumpsOf(t)); err != nil {
			return kernel, err
		}
		p.tools.Compare(c, t.String(), s.rules[t], kernel[t].OwnRules, s.has)
	}
	return kernel, nil
}

// jumpsOf are the jumps of a table: the chains to which they lead, by built-in chain.
func jumpsOf(t table) map[string][]string {
	targets := map[string][]string{}
	for _, j := range jumps {
		if j.table == t {
			targets[j.from] = append(targets[j.from], j.target)
		}
	}
	return targets
}

// missingJumps are those of jumps that the kernel does not have. Versions of the
// tools write different texts: if the listing lacks the text of a jump, the
// tools are asked.
func missingJumps(client *iptables.IPTables, kernel [tableCount]*xtables.Listing) ([]jump, error) {
	var missing []jump
	for _, j := range jumps {
		l := kernel[j.table]
		exists := slices.Contains(l.Builtin, "-A "+j.from+j.rule())
		if !exists && slices.Contains(l.Chains, j.target) {
			args := []string{"-m", "comment", "--comment", j.comment, "-j", j.target}
			if j.newOnly {
				args = append([]string{"-m", "conntrack", "--ctstate", "NEW"}, args...)
			}
			var err error
			if exists, err = client.Exists(j.table.String(), j.from, args...); err != nil {
				return nil, fmt.Errorf("jump from %s %s to %s: %w", j.table, j.from, j.target, err)
			}
		}
		if !exists {
			missing = append(missing, j)
		}
	}
	return missing, nil
}

// write makes the node's settings, unless node is nil, and applies a script. Watch does not
// report that.
func (p *Proxier) write(ctx context.Context, node *plan.Node, s *xtables.Script) error {
	return p.tools.Unobserved(func() error {
		if node != nil {
			if err := p.prepareNode(node); err != nil {
				return err
			}
		}
		return p.apply(ctx, s)
	})
}

// apply forgets the state if the kernel may hold another one.
func (p *Proxier) apply(ctx context.Context, s *xtables.Script) error {
	if len(*s) > 0 && !p.triedNetlink && p.tools.Backend == NFT {
		p.triedNetlink = true // not before: a restart without a change writes nothing
		p.tryNetlink(ctx)
	}
	if err := p.tools.Apply(ctx, *s); err != nil {
		if errors.Is(err, proxier.ErrUnknownState) {
			p.state = nil
		}
		return err
	}
	for t := range tableCount {
		p.written[t] = s.Rules(t.String())
	}
	return nil
}

// Counts implements proxier.Proxier.
func (p *Proxier) Counts() []proxier.KernelObjects {
	if p.state == nil {
		return nil
	}
	var out []proxier.KernelObjects
	for t := range tableCount {
		count := p.state.sizes[t].Rules
		for _, j := range jumps {
			if j.table == t {
				count++
			}
		}
		out = append(out, proxier.KernelObjects{Table: t.String(), Kind: "rule", Count: count, Written: p.written[t]})
	}
	return out
}
