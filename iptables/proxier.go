package iptables

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/coreos/go-iptables/iptables"

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

// Render implements proxier.Mode. It returns the input of iptables-restore,
// without the jumps from built-in chains.
func (Dataplane) Render(opts proxier.Options, plan *plan.Plan) (string, error) {
	c, err := newCompiler(opts, plan.Node.LocalPods, true)
	if err != nil {
		return "", fmt.Errorf("render %s rules: %w", Mode, err)
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
	return &Proxier{opts: opts, tools: t}, nil
}

// TakenOver implements proxier.Proxier.
func (p *Proxier) TakenOver() proxier.TakenOver {
	return proxier.TakenOver{IPTables: string(p.tools.Backend)}
}

// Intact implements proxier.Proxier.
func (p *Proxier) Intact(ctx context.Context) (bool, error) { return wrote(ctx, p.tools) }

// Close implements proxier.Proxier.
func (p *Proxier) Close() error { return nil }

// Sync implements proxier.Proxier. The rules of nearly every Service tell local
// Pods from others: a change of these writes everything anew, as change.All does.
func (p *Proxier) Sync(ctx context.Context, plan *plan.Plan, change plan.Change) error {
	if err := plan.For(ctx, Mode, p.opts.Family); err != nil {
		return err
	}
	if change.All || p.state == nil || change.Node && needsFull(&p.state.node, &plan.Node) {
		return p.full(ctx, plan)
	}
	if change.Node {
		if err := p.prepareNode(&plan.Node); err != nil {
			return err
		}
	}
	t := p.state.change(p.compiler.compile(plan, change))
	if err := p.apply(ctx, t.script()); err != nil {
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
	client, err := p.tools.Client()
	if err != nil {
		return err
	}
	var kernel [tableCount]*xtables.Listing
	for t := range tableCount {
		if kernel[t], err = p.tools.List(ctx, t.String(), isOurs); err != nil {
			return err
		}
	}
	missing, err := missingJumps(client, kernel)
	if err != nil {
		return err
	}
	compiler, err := newCompiler(p.opts, plan.Node.LocalPods, dropInvalid())
	if err != nil {
		return err
	}
	if err := p.prepareNode(&plan.Node); err != nil {
		return err
	}
	next := newState(p.opts.Family)
	t := next.change(compiler.compile(plan, everything(plan)))
	var script *xtables.Script
	if !p.started && t.match(nat, kernel[nat]) && t.match(filter, kernel[filter]) {
		script = &xtables.Script{}
		for table := range tableCount {
			script.Add(table.String(), nil, jumpLines(table, missing)...)
		}
	} else {
		script = t.fullScript(kernel, missing)
	}
	if err := p.apply(ctx, script); err != nil {
		return err
	}
	t.commit()
	p.state, p.compiler, p.started = next, compiler, true
	return nil
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

// apply forgets the state if the kernel may hold another one.
func (p *Proxier) apply(ctx context.Context, s *xtables.Script) error {
	if err := p.tools.Apply(ctx, *s); err != nil {
		if errors.Is(err, proxier.ErrUnknownState) {
			p.state = nil
		}
		return fmt.Errorf("%s: %w", p.tools.Restore, err)
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
