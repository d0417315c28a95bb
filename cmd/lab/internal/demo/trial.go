// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"signalbox/internal/cluster"
	"signalbox/internal/measure"
	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// The hosts of a lab that take part.
const (
	nodeUnderTest = "node1"
	clientPod     = "pod-x"
	outsideClient = "client1"
)

// trial is one mode at work in a lab of its own.
type trial struct {
	cfg  *Config
	mode Mode
	out  *printer

	bed    *testbed.Bed
	lab    *netlab.Lab // the bed's
	source *testbed.Directory
	daemon *cluster.Process
	began  time.Time // the daemon's start
	result *modeResult
	// undo holds what close does, in reverse order.
	undo []func() error
}

// runTrial shows a mode and leaves nothing behind, however it ends. The result is
// never nil and holds what had been found out by then.
func runTrial(ctx context.Context, cfg *Config, mode Mode, out *printer) (res *modeResult, err error) {
	t := &trial{cfg: cfg, mode: mode, out: out, result: &modeResult{mode: mode.Name}}
	defer func() { err = errors.Join(err, t.close()) }()
	out.heading(mode.Name)
	return t.result, t.run(ctx)
}

func (t *trial) run(ctx context.Context) error {
	if err := do(ctx,
		step{"making the lab", t.makeLab},
		step{"asking the kernel what it can", t.findFamilies},
		step{"writing the manifests", t.writeManifests},
		step{"starting signalbox", t.start},
		step{"waiting for the first answer", t.awaitServing},
	); err != nil {
		return err
	}
	for _, f := range t.result.families {
		over := " over " + f.family.String()
		if err := do(ctx,
			step{"connecting" + over, func(ctx context.Context) error { return t.probe(ctx, f) }},
			step{"changing a manifest" + over, func(ctx context.Context) error { return t.change(ctx, f) }},
			step{"timing connects" + over, func(ctx context.Context) error { return t.timeConnects(ctx, f) }},
		); err != nil {
			return err
		}
	}
	return do(ctx, step{"stopping signalbox", t.stop})
}

// step is one thing that a trial does.
type step struct {
	doing string // for messages: "<doing>: <error>"
	run   func(context.Context) error
}

// do takes the steps one after the other. After an interrupt it returns the context's
// error, because the interrupted step's own is a consequence of it.
func do(ctx context.Context, steps ...step) error {
	for _, s := range steps {
		err := s.run(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("%s: %w", s.doing, err)
		}
	}
	return nil
}

// close undoes what the steps did, the last one first.
func (t *trial) close() error {
	var failed []error
	for len(t.undo) > 0 {
		last := t.undo[len(t.undo)-1]
		t.undo = t.undo[:len(t.undo)-1]
		failed = append(failed, last())
	}
	return errors.Join(failed...)
}

func (t *trial) makeLab(context.Context) error {
	dir, err := os.MkdirTemp("", "signalbox-demo-")
	if err != nil {
		return err
	}
	t.undo = append(t.undo, func() error { return os.RemoveAll(dir) })
	if t.source, err = testbed.NewDirectory(dir); err != nil {
		return err
	}
	began := time.Now()
	if t.bed, err = testbed.NewFromDirectory(t.source, netlab.Options{}, dir); err != nil {
		return err
	}
	t.lab = t.bed.Lab
	t.undo = append(t.undo, t.bed.Close)
	t.out.line("a lab of %d network namespaces: node1 under test, node2, five Pods on them, clients outside (%s)",
		len(t.lab.Hosts()), measure.Brief(time.Since(began)))
	return nil
}

// findFamilies asks inside the node, since a feature may be switched off there.
func (t *trial) findFamilies(context.Context) error {
	for _, f := range t.cfg.Families {
		err := t.lab.Host(nodeUnderTest).Do(func() error { return recovered(func() error { return t.mode.Supported(f) }) })
		if unsupported := (*proxier.UnsupportedError)(nil); errors.As(err, &unsupported) {
			t.result.unsupported = append(t.result.unsupported, err)
			t.out.line("%s is left out: %v", f, err)
			continue
		} else if err != nil {
			return err
		}
		t.result.families = append(t.result.families, &familyResult{family: f})
	}
	if len(t.result.families) == 0 {
		return errNoFamily
	}
	return nil
}

// recovered turns a panic into an error. What runs on another goroutine needs
// it: a panic there would end the demo without cleaning up.
func recovered(fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return fn()
}

func (t *trial) families() []plan.Family {
	var fs []plan.Family
	for _, r := range t.result.families {
		fs = append(fs, r.family)
	}
	return fs
}

func (t *trial) writeManifests(context.Context) error {
	began := time.Now()
	files := manifests(t.layout(), t.cfg.Services)
	for _, f := range files {
		if err := t.source.Publish(f.name, f.objects...); err != nil {
			return err
		}
	}
	t.out.line("%d manifests of %d Services, %d of them only to make it more (%s)",
		len(files), len(services)+t.cfg.Services, t.cfg.Services, measure.Brief(time.Since(began)))
	return nil
}

// layout describes the lab in the words of the manifests.
func (t *trial) layout() layout {
	l := layout{families: t.families(), nodes: map[string]netlab.Pair{}, pods: map[string]pod{}}
	for _, name := range []string{"node1", "node2"} {
		l.nodes[name] = t.lab.Host(name).Addr
	}
	for _, p := range netlab.DefaultPods {
		l.pods[p.Name] = pod{node: p.Node, addr: t.lab.Host(p.Name).Addr}
	}
	return l
}

func (t *trial) start(context.Context) (err error) {
	p := testbed.Signalbox(t.cfg.Binary, t.mode.Name, testbed.FromDirectory)
	t.began = time.Now()
	if t.daemon, err = t.bed.Start(p); err != nil {
		return err
	}
	t.undo = append(t.undo, func() error {
		_ = t.daemon.Stop(exitTimeout) // stop has reported what it says
		return nil
	})
	t.out.line("on node1, pid %d: signalbox %s", t.daemon.Pid(), strings.Join(p.Args("", t.source.Path)[1:], " "))
	return nil
}

// exitTimeout is how long the daemon may take to end by itself.
const exitTimeout = 10 * time.Second

// probeLimit bounds one connection of the table: what takes longer is lost.
const probeLimit = 5 * time.Second

// answerTimeout bounds what must happen soon; nothing waits for it to pass.
const answerTimeout = 30 * time.Second

// startTimeout bounds the start, which grows with the number of Services.
const startTimeout = 5 * time.Minute

// startResolution is the pause between two attempts while nothing is served.
const startResolution = time.Millisecond

// awaitServing asks over UDP, as what comes back before the rules are there (a
// routing loop's ICMP error) ends the attempt at once, and TCP would try again
// only after a second.
func (t *trial) awaitServing(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	waiting := append([]*familyResult(nil), t.result.families...)
	for len(waiting) > 0 {
		f := waiting[0]
		at := single.at(plan.ClusterIP, f.family, netip.Addr{})
		if _, err := t.ask(ctx, clientPod, "udp", at, 20*time.Millisecond); err != nil {
			if err := t.alive(ctx); err != nil {
				return fmt.Errorf("nobody answers at %s/udp yet (%v): %w", at, err, err)
			}
			waiting = append(waiting[1:], f) // its turn comes again after the others'
			time.Sleep(startResolution)      // leaves the machine to the daemon
			continue
		}
		f.serving = time.Since(t.began)
		t.out.line("%s: first answer through a ClusterIP %s after the start", f.family, measure.Brief(f.serving))
		waiting = waiting[1:]
	}
	return nil
}

// alive returns an error once there is no point in waiting any longer.
func (t *trial) alive(ctx context.Context) error {
	if err := t.daemon.Ended(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w; signalbox's log ends with\n%s", err, t.daemon.Tail(20))
	}
	return nil
}

func (t *trial) ask(ctx context.Context, from, network string, to netip.AddrPort, limit time.Duration) (netlab.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return t.lab.Host(from).AskAndReset(ctx, network, to)
}

func (t *trial) stop(ctx context.Context) error {
	if err := t.alive(ctx); err != nil {
		return err
	}
	used, err := measure.UsageOf(t.daemon.Pid())
	if err != nil {
		return err
	}
	if err := t.daemon.Stop(exitTimeout); err != nil {
		return fmt.Errorf("%w; its log ends with\n%s", err, t.daemon.Tail(20))
	}
	t.result.memory, t.result.processor = int64(used.Peak), used.Processor
	return nil
}
