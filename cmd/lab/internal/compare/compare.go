// SPDX-License-Identifier: Apache-2.0

// Package compare runs kube-proxy and signalbox side by side. Two identical labs follow
// one API server, which gets the same Services. Every client of a lab tries every
// address, port and protocol. Both labs must give the same answers, and the same
// failures. Deliberate differences are in differences.yaml, with their reasons.
package compare

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"

	"signalbox/internal/cluster"
	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
)

// Config says what is compared.
type Config struct {
	// Signalbox is the binary to run.
	Signalbox string
	// Kubernetes is a directory with etcd, kube-apiserver and kube-proxy, or "" to build them.
	Kubernetes string
	// Mode is one of testbed.Modes, KubeProxyMode one of testbed.KubeProxyModes.
	Mode, KubeProxyMode string
	Cases               []Case
	// OutDir is where failing cases are written.
	OutDir string
	// Verbose reports each step, and each difference that a repetition does not show.
	Verbose bool
	// Progress gets a line for each step.
	Progress func(format string, args ...any)
}

// batchSize is how many cases exist at the same time.
const batchSize = 100

// comparison is a run.
type comparison struct {
	cfg     Config
	rules   []Rule
	api     api
	sides   [2]*side // kube-proxy's and signalbox's
	markers int
	last    State // the present marker
	report  Report
}

// Run compares, writes the report to out, and returns an error if a difference is not
// deliberate.
func Run(ctx context.Context, cfg Config, out io.Writer) (err error) {
	dir, err := cluster.MakeDir()
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	control, err := startCluster(ctx, cfg, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, control.Stop()) }()
	rest.SetDefaultWarningHandler(rest.NoWarnings{}) // about deprecated fields, which are compared, too
	c := &comparison{cfg: cfg, api: api{control.Admin()}, report: Report{NoSCTP: netlab.SCTP()}}
	if c.rules, err = deliberate(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if err := c.setUp(ctx, control, dir); err != nil {
		return err
	}
	interrupted := c.runBatches(ctx)
	if interrupted != nil && ctx.Err() == nil {
		return interrupted
	}
	return errors.Join(interrupted, c.finish(out))
}

func startCluster(ctx context.Context, cfg Config, dir string) (*cluster.Cluster, error) {
	if cfg.Kubernetes != "" {
		return testbed.StartPrograms(ctx, cluster.BinariesIn(cfg.Kubernetes), dir, false, cfg.Progress)
	}
	return testbed.StartCluster(ctx, dir, false, cfg.Progress)
}

func (c *comparison) setUp(ctx context.Context, control *cluster.Cluster, dir string) error {
	c.cfg.Progress("building two labs")
	signalbox := testbed.Signalbox(c.cfg.Signalbox, c.cfg.Mode, testbed.FromAPIServer)
	signalbox.Command = append(signalbox.Command, "--nodeport-addresses=primary") // as testbed.KubeProxy
	if c.cfg.Mode == "ipvs" && c.cfg.KubeProxyMode == "ipvs" {
		// Otherwise most Services with a Local policy differ: see docs/ipvs.md.
		signalbox.Command = append(signalbox.Command, "--ipvs-kube-proxy-policies")
	}
	proxies := []testbed.Proxy{testbed.KubeProxy(control.Binaries().KubeProxy, c.cfg.KubeProxyMode), signalbox}
	for i, p := range proxies {
		var err error
		if c.sides[i], err = newSide(control, p, dir); err != nil {
			return err
		}
	}
	if err := testbed.CreateNodes(ctx, control, c.sides[0].bed.Lab, "node1", "node2"); err != nil {
		return err
	}
	if err := c.api.namespaces(ctx, c.cfg.Cases); err != nil {
		return err
	}
	for _, s := range c.sides {
		if err := s.start(); err != nil {
			return err
		}
	}
	if err := c.converge(ctx); err != nil {
		return err
	}
	for _, s := range c.sides {
		if err := s.forgetSoon(); err != nil {
			return err
		}
	}
	return nil
}

func (c *comparison) close() error {
	var failed []error
	for _, s := range c.sides {
		if s != nil {
			failed = append(failed, s.close())
		}
	}
	return errors.Join(failed...)
}

// detail is progress that only a verbose run shows.
func (c *comparison) detail(format string, args ...any) {
	if c.cfg.Verbose {
		c.cfg.Progress(format, args...)
	}
}

// both does something in both labs at the same time.
func (c *comparison) both(do func(i int, s *side) error) error {
	var all errgroup.Group
	for i, s := range c.sides {
		all.Go(func() error { return do(i, s) })
	}
	return all.Wait()
}

// converge waits until both proxies serve all that has been written.
func (c *comparison) converge(ctx context.Context) error {
	next := marker(c.markers)
	if err := c.api.move(ctx, State{}, next); err != nil {
		return err
	}
	if err := c.both(func(_ int, s *side) error { return s.awaitMarker(ctx, markerVIP(c.markers)) }); err != nil {
		return err
	}
	err := c.api.move(ctx, c.last, State{})
	c.last = next
	c.markers++
	return err
}

func (c *comparison) runBatches(ctx context.Context) error {
	var before []Case
	for batch := range slices.Chunk(c.cfg.Cases, batchSize) {
		// A batch is removed together with the creation of the next: both proxies
		// have removed it when they serve the next marker.
		err := each(before, func(old Case) error { return c.api.move(ctx, old.States[len(old.States)-1], State{}) })
		if err != nil {
			return err
		}
		if err := c.runBatch(ctx, batch); err != nil {
			return err
		}
		c.report.Cases += len(batch)
		c.cfg.Progress("%d of %d cases: %s", c.report.Cases, len(c.cfg.Cases), c.report.counts())
		before = batch
	}
	return nil
}

// runBatch goes through the states of a batch.
func (c *comparison) runBatch(ctx context.Context, batch []Case) error {
	steps := 0
	for _, one := range batch {
		steps = max(steps, len(one.States))
	}
	for n := range steps {
		var present []Case
		for _, one := range batch {
			if n < len(one.States) {
				present = append(present, one)
			}
		}
		err := each(present, func(one Case) error {
			from := State{}
			if n > 0 {
				from = one.States[n-1]
			}
			return c.api.move(ctx, from, one.States[n])
		})
		if err != nil {
			return err
		}
		c.detail("state %d: %d Services are written", n, len(present))
		if err := c.converge(ctx); err != nil {
			return err
		}
		if err := c.compare(ctx, present, n); err != nil {
			return err
		}
	}
	return nil
}

// compare probes the cases in state n.
func (c *comparison) compare(ctx context.Context, cases []Case, n int) error {
	var probes []Probe
	var of []Case // of each probe
	for _, one := range cases {
		for _, p := range one.probes(n) {
			if p.Network != "sctp" || c.report.NoSCTP == nil {
				probes, of = append(probes, p), append(of, one)
			}
		}
	}
	c.detail("state %d: %d probes", n, len(probes))
	outcomes := c.ask(ctx, probes, quick)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	c.report.Probes += len(probes)
	var open []Difference
	confirmed := map[string]int{}
	for i, p := range probes {
		if slices.Equal(outcomes[0][i], outcomes[1][i]) {
			continue
		}
		d := Difference{Case: of[i], State: n, Probe: p, KubeProxy: outcomes[0][i], Signalbox: outcomes[1][i]}
		if d.Rule = c.explain(d); d.Rule != nil {
			c.report.add(d)
			continue
		}
		if confirmed[d.Case.Name]++; confirmed[d.Case.Name] <= maxConfirmed {
			open = append(open, d)
		} else {
			c.report.Unconfirmed++
		}
	}
	c.detail("state %d: %d differences to confirm", n, len(open))
	open = c.confirm(ctx, open)
	if ctx.Err() != nil {
		return ctx.Err() // an interrupt ends probes early, and makes differences
	}
	for _, d := range open {
		c.cfg.Progress("%s in state %d: %s: kube-proxy: %s; signalbox: %s", d.Case.Name, d.State, d.Probe, d.KubeProxy, d.Signalbox)
		c.report.add(d)
	}
	return nil
}

// maxConfirmed is how many differences of a case in one state are confirmed.
const maxConfirmed = 40

func (c *comparison) explain(d Difference) *Rule {
	for i := range c.rules {
		if c.rules[i].explains(c.cfg, d) {
			return &c.rules[i]
		}
	}
	return nil
}

// confirm repeats probes in both labs. A difference remains if it shows in each
// repetition.
func (c *comparison) confirm(ctx context.Context, open []Difference) []Difference {
	for round := 1; round <= confirmations && len(open) > 0; round++ {
		e := careful
		e.round = round
		probes := make([]Probe, len(open))
		for i, d := range open {
			probes[i] = d.Probe
		}
		outcomes := c.ask(ctx, probes, e)
		if ctx.Err() != nil {
			return nil
		}
		var still []Difference
		for i, d := range open {
			if slices.Equal(outcomes[0][i], outcomes[1][i]) {
				c.report.Fleeting++
				c.detail("not repeated: %s in state %d: %s: kube-proxy: %s; signalbox: %s", d.Case.Name, d.State, d.Probe, d.KubeProxy, d.Signalbox)
				continue
			}
			d.KubeProxy, d.Signalbox = outcomes[0][i], outcomes[1][i]
			if d.Rule = c.explain(d); d.Rule != nil {
				c.report.add(d)
				continue
			}
			still = append(still, d)
		}
		open = still
	}
	return open
}

// ask runs the probes in both labs.
func (c *comparison) ask(ctx context.Context, probes []Probe, e effort) (outcomes [2][]Outcome) {
	var all sync.WaitGroup
	for i, s := range c.sides {
		all.Go(func() { outcomes[i] = s.asker.askAll(ctx, probes, e) })
	}
	all.Wait()
	return outcomes
}

// finish writes the report and the failing cases.
func (c *comparison) finish(out io.Writer) error {
	failing := c.report.unexplained()
	if err := c.report.write(out, c.cfg); err != nil {
		return err
	}
	var names []string
	for _, one := range failing {
		path := filepath.Join(c.cfg.OutDir, fmt.Sprintf("compare-%s-%s.yaml", c.cfg.Mode, one.Name))
		if err := writeCaseFile(path, one); err != nil {
			return err
		}
		names = append(names, path)
	}
	if len(failing) > 0 {
		return fmt.Errorf("%d cases differ without a known reason; replay one with: lab compare --mode=%s --kube-proxy-mode=%s --replay %s",
			len(failing), c.cfg.Mode, c.cfg.KubeProxyMode, names[0])
	}
	return nil
}

func writeCaseFile(path string, one Case) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(WriteCase(f, one), f.Close())
}
