package iptables

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Mode is the name of this mode.
const Mode = "iptables"

// Tuning is what New may be told beyond what every mode needs.
type Tuning struct {
	// Backend is chosen as the node's other software has chosen when empty.
	Backend Backend
	// LockWait bounds the wait for other programs that change rules; 5 s when
	// zero, and never less than one second.
	LockWait time.Duration
	// Logger is slog.Default() when nil.
	Logger *slog.Logger
}

// Proxier programs one family. The tools it runs work in the network namespace
// of the calling thread.
type Proxier struct {
	proxier.Defaults
	opts  proxier.Options
	tools *tools
	// state is what the kernel holds; nil while that is not known.
	state *state
	// written is what the last Sync wrote.
	written counts
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
	if tune.LockWait == 0 {
		tune.LockWait = defaultWait
	}
	if tune.Logger == nil {
		tune.Logger = slog.Default()
	}
	t, why, err := pickTools(opts.Family, tune)
	if err != nil {
		return nil, err
	}
	tune.Logger.Info("iptables backend", "family", opts.Family.String(), "backend", string(t.backend), "reason", why, "program", t.restore)
	return &Proxier{opts: opts, tools: t}, nil
}

func pickTools(f plan.Family, tune Tuning) (t *tools, why string, err error) {
	if tune.Backend != "" {
		why = "asked for"
		if t, err = findTools(f, tune.Backend, tune.LockWait); err != nil {
			missing := missingTools(f, noteworthy(err))
			missing.Missing += "-" + string(tune.Backend)
			return nil, "", missing
		}
	} else if t, why, err = chooseTools(context.Background(), f, tune.LockWait); err != nil {
		return nil, "", err
	}
	if slices.Compare(t.version[:], oldestVersion[:]) < 0 {
		return nil, "", &proxier.UnsupportedError{
			Mode: Mode, Family: f, Missing: fmt.Sprintf("%s %s or newer", commandName(f), versionString(oldestVersion)),
			Remedy: "update the package iptables", Err: fmt.Errorf("%s is version %s", t.command, versionString(t.version)),
		}
	}
	return t, why, nil
}

func versionString(v [3]int) string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

// Backend is the variant that New chose.
func (p *Proxier) Backend() Backend { return p.tools.backend }

// TakenOver implements proxier.Proxier.
func (p *Proxier) TakenOver() proxier.TakenOver {
	return proxier.TakenOver{IPTables: string(p.tools.backend)}
}

// Intact implements proxier.Proxier.
func (p *Proxier) Intact(ctx context.Context) (bool, error) {
	t, err := findTools(p.opts.Family, p.tools.backend, defaultWait)
	if err != nil {
		return false, err
	}
	return t.signed(ctx)
}

// Close implements proxier.Proxier.
func (p *Proxier) Close() error { return nil }

// Sync implements proxier.Proxier. A change of what tells local Pods from
// others is in the rules of nearly every Service and writes everything anew,
// as change.All does.
func (p *Proxier) Sync(ctx context.Context, plan *plan.Plan, change plan.Change) error {
	if err := plan.For(ctx, Mode, p.opts.Family); err != nil {
		return err
	}
	if change.All || p.state == nil || change.Node && p.state.needsFull(&plan.Node) {
		return p.full(ctx, plan)
	}
	if change.Node {
		if err := p.prepareNode(&plan.Node); err != nil {
			return err
		}
	}
	t := p.state.change(plan, change)
	if err := p.apply(ctx, &t.script); err != nil {
		t.rollback()
		return err
	}
	t.commit()
	return nil
}

// needsFull says whether rules of Services, or the frame, depend on what changed.
func (s *state) needsFull(node *plan.Node) bool {
	a, b := &s.node.LocalPods, &node.LocalPods
	return !slices.Equal(a.Prefixes, b.Prefixes) || a.Interface != b.Interface || a.InterfacePrefix != b.InterfacePrefix ||
		!slices.Equal(s.node.OwnPods, node.OwnPods)
}

// full writes everything, removes what is left of earlier proxies, and puts in
// the jumps that are missing: those that are there stay where they are. What an
// earlier process wrote, and is as it should be, is not written again.
func (p *Proxier) full(ctx context.Context, plan *plan.Plan) error {
	client, err := p.tools.client()
	if err != nil {
		return err
	}
	var held [tableCount]*listing
	var stale [tableCount][]string
	for t := range tableCount {
		l, err := p.tools.list(ctx, t.String())
		if err != nil {
			return err
		}
		held[t], stale[t] = l, l.stale()
	}
	missing, err := missingJumps(client, held)
	if err != nil {
		return err
	}
	next, err := newState(p.opts, plan.Node, p.tools.facts())
	if err != nil {
		return err
	}
	if err := p.prepareNode(&plan.Node); err != nil {
		return err
	}
	script := next.full(plan, stale, missing)
	if !p.started && next.holds(nat, held[nat]) && next.holds(filter, held[filter]) {
		script = onlyJumps(missing)
	}
	if err := p.apply(ctx, script); err != nil {
		return err
	}
	p.state, p.started = next, true
	return nil
}

// onlyJumps puts in jumps that somebody removed; nothing where there are none.
func onlyJumps(missing []jump) *script {
	w := &script{}
	for t := range tableCount {
		if lines := jumpLines(t, missing); len(lines) > 0 {
			w.section(t.String(), nil, lines)
		}
	}
	return w
}

// apply forgets the state where it may have become another one.
func (p *Proxier) apply(ctx context.Context, s *script) error {
	err := p.tools.apply(ctx, s)
	if err == nil {
		p.written = s.rules
		return nil
	}
	if errors.Is(err, proxier.ErrUnknownState) {
		p.state = nil
	}
	return fmt.Errorf("%s: %w", p.tools.restore, err)
}

const routeLocalnet = "net/ipv4/conf/all/route_localnet"

// prepareNode makes the kernel route packets between NodePorts on 127.0.0.1
// and Pods, where these are wanted. It is never undone: other software may
// need it by then. Where the setting cannot be made, everything else is served.
func (p *Proxier) prepareNode(wanted *plan.Node) error {
	if !wanted.LocalhostNodePorts || p.opts.Family != plan.IPv4 {
		p.problems = nil
		return nil
	}
	client, err := p.tools.client()
	if err != nil {
		return err
	}
	// Before the kernel is opened.
	if err := addLocalnetFirewall(client); err != nil {
		return err
	}
	p.problems = nil
	if problem := node.SetSysctl(routeLocalnet, "1", "NodePorts are not served on 127.0.0.1"); problem != nil {
		p.problems = []*node.KernelProblem{problem}
	}
	return nil
}

// KernelProblems implements proxier.Proxier. The next Sync that writes everything
// tries again.
func (p *Proxier) KernelProblems() []*node.KernelProblem { return p.problems }
