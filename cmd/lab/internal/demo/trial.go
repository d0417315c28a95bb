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

	"signalbox/internal/netlab"
	"signalbox/proxier"
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

// step is one thing that a trial does.
type step struct {
	doing string // for messages: "<doing>: <error>"
	run   func(*trial, context.Context) error
}

// plan is what happens in a trial, in this order.
func plan(families []proxier.Family) []step {
	steps := []step{
		{"making the lab", (*trial).makeLab},
		{"asking the kernel what it can", (*trial).findFamilies},
		{"writing the manifests", (*trial).writeManifests},
		{"starting signalbox", (*trial).start},
		{"waiting for the first answer", (*trial).awaitServing},
	}
	for _, f := range families {
		steps = append(steps,
			forFamily(f, "connecting", (*trial).probe),
			forFamily(f, "changing a manifest", (*trial).change),
			forFamily(f, "timing connects", (*trial).timeConnects),
		)
	}
	return append(steps, step{"stopping signalbox", (*trial).stop})
}

// forFamily makes a step that is left out where the mode cannot serve the
// family.
func forFamily(f proxier.Family, doing string, run func(*trial, context.Context, *familyResult) error) step {
	return step{fmt.Sprintf("%s over %s", doing, f), func(t *trial, ctx context.Context) error {
		for _, r := range t.result.families {
			if r.family == f {
				return run(t, ctx, r)
			}
		}
		return nil
	}}
}

// runTrial goes through the plan and leaves nothing behind, however it ends.
// The result is never nil and holds what had been found out by then.
func runTrial(ctx context.Context, cfg *Config, mode Mode, out *printer) (res *modeResult, err error) {
	t := &trial{cfg: cfg, mode: mode, out: out, result: &modeResult{mode: mode.Name}}
	defer func() { err = errors.Join(err, t.close()) }()
	out.heading(mode.Name)
	for _, s := range plan(cfg.Families) {
		if err := ctx.Err(); err != nil {
			return t.result, err
		}
		if err := s.run(t, ctx); ctx.Err() != nil {
			return t.result, ctx.Err() // what the step met then is no news
		} else if err != nil {
			return t.result, fmt.Errorf("%s: %w", s.doing, err)
		}
	}
	return t.result, nil
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
		len(lab.Hosts()), brief(time.Since(began)))
	return nil
}

// findFamilies asks inside the node, since a feature may be switched off there.
func (t *trial) findFamilies(context.Context) error {
	for _, f := range t.cfg.Families {
		err := t.lab.Host(nodeUnderTest).Do(func() error { return recovered(func() error { return t.mode.Supported(f) }) })
		if unsupported := (*proxier.UnsupportedError)(nil); errors.As(err, &unsupported) {
			t.result.lost = append(t.result.lost, err)
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

func (t *trial) families() []proxier.Family {
	var fs []proxier.Family
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
		len(files), len(services)+t.cfg.Services, t.cfg.Services, brief(time.Since(began)))
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
	t.undo = append(t.undo, p.end)
	t.out.line("on node1, pid %d: signalbox %s", p.pid, strings.Join(args, " "))
	return nil
}

// probeLimit bounds one connection of the table: what takes longer is lost.
const probeLimit = 5 * time.Second

// patience bounds what must happen soon; nothing waits for it to pass.
const patience = 30 * time.Second

// startPatience bounds the start, which grows with the number of Services.
const startPatience = 5 * time.Minute

// startResolution is the pause between two attempts while nothing is served.
const startResolution = time.Millisecond

// awaitServing asks over UDP, as what comes back before the rules are there (a
// routing loop's ICMP error) ends the attempt at once, and TCP would try again
// only after a second.
func (t *trial) awaitServing(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	waiting := append([]*familyResult(nil), t.result.families...)
	for len(waiting) > 0 {
		f := waiting[0]
		at := single.at(proxier.ClusterIP, f.family, netip.Addr{})
		if _, err := t.ask(ctx, clientPod, "udp", at, 20*time.Millisecond); err != nil {
			if err := t.alive(ctx); err != nil {
				return fmt.Errorf("nobody answers at %s/udp yet (%v): %w", at, err, err)
			}
			waiting = append(waiting[1:], f) // its turn comes again after the others'
			time.Sleep(startResolution)      // leaves the machine to the daemon
			continue
		}
		f.serving = time.Since(t.daemon.began)
		t.out.line("%s: first answer through a ClusterIP %s after the start", f.family, brief(f.serving))
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
	if err := errors.Join(t.daemon.end(), t.daemon.failure()); err != nil {
		return err
	}
	t.result.memory, t.result.processor = memory, t.daemon.processorTime()
	return nil
}
