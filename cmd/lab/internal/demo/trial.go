package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"signalbox/cmd/lab/internal/measure"
	"signalbox/internal/netlab"
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

	lab    *netlab.Lab
	dir    string // holds source, staging and the daemon's log
	daemon *process
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
	began := time.Now()
	lab, err := netlab.New(netlab.Options{})
	if err != nil {
		return err
	}
	t.lab = lab
	t.undo = append(t.undo, lab.Close)
	t.out.line("a lab of %d network namespaces: node1 under test, node2, five Pods on them, clients outside (%s)",
		len(lab.Hosts()), measure.Brief(time.Since(began)))
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

func (t *trial) families() []plan.Family {
	var fs []plan.Family
	for _, r := range t.result.families {
		fs = append(fs, r.family)
	}
	return fs
}

func (t *trial) writeManifests(context.Context) error {
	dir, err := os.MkdirTemp("", "signalbox-demo-")
	if err != nil {
		return err
	}
	t.dir = dir
	t.undo = append(t.undo, func() error { return os.RemoveAll(dir) })
	for _, d := range []string{t.sourceDir(), t.stagingDir()} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	began := time.Now()
	files := manifests(t.cluster(), t.cfg.Services)
	for _, f := range files {
		if err := f.publish(t.stagingDir(), t.sourceDir()); err != nil {
			return err
		}
	}
	t.out.line("%d manifests of %d Services, %d of them only to make it more (%s)",
		len(files), len(services)+t.cfg.Services, t.cfg.Services, measure.Brief(time.Since(began)))
	return nil
}

func (t *trial) sourceDir() string  { return filepath.Join(t.dir, "source") }
func (t *trial) stagingDir() string { return filepath.Join(t.dir, "staging") }

// cluster describes the lab in the words of the manifests.
func (t *trial) cluster() cluster {
	c := cluster{families: t.families(), nodes: map[string]netlab.Pair{}, pods: map[string]pod{}}
	for _, name := range []string{"node1", "node2"} {
		c.nodes[name] = t.lab.Host(name).Addr
	}
	for _, p := range netlab.DefaultPods {
		c.pods[p.Name] = pod{node: p.Node, addr: t.lab.Host(p.Name).Addr}
	}
	return c
}

func (t *trial) start(context.Context) error {
	args := []string{
		"run", "--mode=" + t.mode.Name, "--source=" + t.sourceDir(), "--hostname-override=" + nodeUnderTest,
		fmt.Sprintf("--cluster-cidr=%s,%s", netlab.PodNetwork.V4, netlab.PodNetwork.V6),
	}
	// The lock is for everybody who writes rules in a network namespace; the
	// lab's is this daemon's alone, and the machine's lock file is not made.
	env := append(os.Environ(), "XTABLES_LOCKFILE="+filepath.Join(t.dir, "xtables.lock"))
	p, err := startProcess(t.lab.Host(nodeUnderTest), filepath.Join(t.dir, "log"), env, t.cfg.Binary, args...)
	if err != nil {
		return err
	}
	t.daemon = p
	t.undo = append(t.undo, func() error { p.end(); return nil })
	t.out.line("on node1, pid %d: signalbox %s", p.pid, strings.Join(args, " "))
	return nil
}

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
		f.serving = time.Since(t.daemon.began)
		t.out.line("%s: first answer through a ClusterIP %s after the start", f.family, measure.Brief(f.serving))
		waiting = waiting[1:]
	}
	return nil
}

// alive returns an error once there is no point in waiting any longer.
func (t *trial) alive(ctx context.Context) error {
	select {
	case <-t.daemon.exited:
		return t.daemon.failure()
	default:
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w; signalbox's last words:\n%s", err, t.daemon.lastWords())
	}
	return nil
}

func (t *trial) ask(ctx context.Context, from, network string, to netip.AddrPort, limit time.Duration) (netlab.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return t.lab.Host(from).Ask(ctx, network, netip.AddrPort{}, to)
}

func (t *trial) stop(context.Context) error {
	memory, err := t.daemon.peakMemory()
	if err != nil {
		return err
	}
	t.daemon.end()
	if err := t.daemon.failure(); err != nil {
		return err
	}
	t.result.memory, t.result.processor = memory, t.daemon.processorTime()
	return nil
}
