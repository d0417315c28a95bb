// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"k8s.io/client-go/rest"

	"signalbox/cmd/lab/internal/follower"
	"signalbox/internal/cluster"
	"signalbox/internal/measure"
	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
	"signalbox/internal/wait"
	"signalbox/proxier/plan"
)

// FleetConfig says which fleets follow one API server.
type FleetConfig struct {
	// Fleets are numbers of daemons.
	Fleets []int
	// Proxies are measured one at a time, as programs on a node of a lab.
	Proxies  []testbed.Proxy
	Size     Size
	Families []plan.Family
	// Rate is how many EndpointSlices change in a second.
	Rate int
	// Time is how long they change.
	Time time.Duration
	// Log gets a line for each step.
	Log func(format string, args ...any)
}

// FleetResult is what a number of daemons cost the API server. Times are in seconds.
type FleetResult struct {
	Daemons int `json:"daemons"`
	// StartWall ends when the last daemon has all Services. All start together.
	StartWall float64 `json:"startWall"`
	// StartCPU is the API server's processor time until then.
	StartCPU float64 `json:"startProcessor"`
	// StartRequests and StartBytes are of one daemon. Bytes are what the API server sends
	// on the connection, encrypted and compressed.
	StartRequests float64 `json:"startRequests"`
	StartBytes    float64 `json:"startBytes"`
	// ChangeCPU is the API server's processor time for one change, the write included.
	ChangeCPU float64 `json:"changeProcessor"`
	// ChangeBytes is what one change sends to one daemon.
	ChangeBytes float64 `json:"changeBytes"`
	// LastP50 and LastP99 are from a write until the last daemon has its change.
	LastP50 float64 `json:"lastP50"`
	LastP99 float64 `json:"lastP99"`
}

// RunFleet measures each proxy on one node, and then one fleet after another, on the same
// objects.
func RunFleet(ctx context.Context, cfg FleetConfig) (report *FleetReport, err error) {
	dir, err := cluster.MakeDir()
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	s, err := newStore(ctx, Config{Audited: true, Log: cfg.Log}, dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	cfg.Log("%s: creating the objects", cfg.Size)
	o := newObjects(s, cfg.Families, cfg.Size)
	if err := prepare(ctx, o, dir); err != nil {
		return nil, err
	}
	report = newFleetReport(cfg)
	for _, p := range cfg.Proxies {
		cfg.Log("%s", p.Name())
		cost, err := cfg.askOfOne(ctx, o, p)
		if err != nil {
			return report, fmt.Errorf("%s: %w", p.Name(), err)
		}
		report.Proxies = append(report.Proxies, *cost)
	}
	for _, n := range cfg.Fleets {
		cfg.Log("%d daemons", n)
		result, err := cfg.runOne(ctx, o, n)
		if err != nil {
			return report, fmt.Errorf("%d daemons: %w", n, err)
		}
		report.Fleets = append(report.Fleets, result)
	}
	return report, nil
}

func (cfg *FleetConfig) runOne(ctx context.Context, o *objects, daemons int) (FleetResult, error) {
	config, err := o.cluster.Config(cluster.ProxyUser)
	if err != nil {
		return FleetResult{}, err
	}
	f := &fleet{objects: o, config: config, server: o.cluster.APIServerPid(), cfg: *cfg, result: FleetResult{Daemons: daemons}}
	err = f.run(ctx, daemons)
	return f.result, err
}

// fleet is a number of daemons at work.
type fleet struct {
	*objects
	cfg     FleetConfig
	config  *rest.Config
	server  int // process id
	daemons []*follower.Follower
	result  FleetResult
}

func (f *fleet) run(ctx context.Context, n int) error {
	ctx, cancel := context.WithCancel(ctx)
	for i := range n {
		d, err := follower.New(f.config, fmt.Sprintf("fleet-%d", i), f.movingServicePort(), f.families)
		if err != nil {
			cancel()
			return err
		}
		f.daemons = append(f.daemons, d)
	}
	defer func() {
		cancel()
		for _, d := range f.daemons {
			d.Wait()
		}
	}()
	if err := f.start(ctx); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	if err := f.change(ctx); err != nil {
		return fmt.Errorf("changes: %w", err)
	}
	return nil
}

// movingServicePort names the Service port whose endpoint moves.
func (f *fleet) movingServicePort() plan.ServicePortName {
	return plan.ServicePortName{
		ServiceName: plan.ServiceName{Namespace: namespace, Name: serviceName(f.services)}, Port: "http", Protocol: plan.TCP,
	}
}

// start starts all daemons at the same time.
func (f *fleet) start(ctx context.Context) (err error) {
	f.result.StartCPU, err = processorTimeOf(f.server, func() error {
		began := time.Now()
		for _, d := range f.daemons {
			d.Run(ctx)
		}
		for _, d := range f.daemons {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-d.Synced():
			}
		}
		f.result.StartWall = time.Since(began).Seconds()
		return nil
	})
	if err != nil {
		return err
	}
	requests, bytes := f.received()
	f.result.StartRequests, f.result.StartBytes = f.share(requests), f.share(bytes)
	return nil
}

// received sums what the daemons have asked for and received.
func (f *fleet) received() (requests, bytes int64) {
	for _, d := range f.daemons {
		r, b := d.Received()
		requests, bytes = requests+r, bytes+b
	}
	return requests, bytes
}

func (f *fleet) share(n int64) float64 { return float64(n) / float64(len(f.daemons)) }

// change changes EndpointSlices at the rate. Each tenth change moves the Service for which
// the daemons wait.
func (f *fleet) change(ctx context.Context) error {
	_, received := f.received()
	var took []time.Duration
	used, err := f.cfg.changes(ctx, f.server, func(i int) error {
		if i%10 > 0 {
			return f.churn(ctx)
		}
		d, err := f.moveAll(ctx)
		took = append(took, d)
		return err
	})
	if err != nil {
		return err
	}
	_, now := f.received()
	f.result.ChangeCPU = used
	f.result.ChangeBytes = f.share(now-received) / f.cfg.number()
	f.result.LastP50, f.result.LastP99 = measure.Quantile(took, 0.5).Seconds(), measure.Quantile(took, 0.99).Seconds()
	return nil
}

// number is how many changes there are.
func (cfg *FleetConfig) number() float64 { return float64(cfg.Rate) * cfg.Time.Seconds() }

// changes calls one at the rate, and returns a server's processor time for each call.
func (cfg *FleetConfig) changes(ctx context.Context, server int, one func(i int) error) (float64, error) {
	used, err := processorTimeOf(server, func() error {
		tick := time.NewTicker(time.Second / time.Duration(cfg.Rate))
		defer tick.Stop()
		for i := range int(cfg.number()) {
			if err := one(i); err != nil {
				return err
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-tick.C:
			}
		}
		return nil
	})
	return used / cfg.number(), err
}

// processorTimeOf returns the processor time in seconds that a process takes meanwhile.
func processorTimeOf(pid int, do func() error) (float64, error) {
	before, err := measure.UsageOf(pid)
	if err != nil {
		return 0, err
	}
	if err := do(); err != nil {
		return 0, err
	}
	after, err := measure.UsageOf(pid)
	return (after.Processor - before.Processor).Seconds(), err
}

// moveAll moves the Service and waits until each daemon has the change.
func (f *fleet) moveAll(ctx context.Context) (time.Duration, error) {
	family := f.families[0]
	f.spare++
	to := netlab.Nth(endpointRanges[family], f.services*f.perSlice+f.spare)
	began := time.Now()
	if err := f.move(ctx, family, to); err != nil {
		return 0, err
	}
	want := netip.AddrPortFrom(to, movingPort)
	for _, d := range f.daemons {
		for !d.LeadsTo(want) {
			if !wait.For(ctx, time.Millisecond) {
				return 0, ctx.Err()
			}
		}
	}
	return time.Since(began), nil
}

// lateRequests is how long requests may follow the first sync.
const lateRequests = 2 * time.Second

// ProxyCost is what one proxy on one node asks of the API server. Times are in seconds.
type ProxyCost struct {
	Program       string  `json:"program"`
	Mode          string  `json:"mode"`
	StartCPU      float64 `json:"startProcessor"`
	StartRequests int     `json:"startRequests"`
	StartBytes    float64 `json:"startBytes"`
	ChangeCPU     float64 `json:"changeProcessor"`
	ChangeBytes   float64 `json:"changeBytes"`
}

// askOfOne runs a proxy on a node of a lab.
func (cfg *FleetConfig) askOfOne(ctx context.Context, o *objects, p testbed.Proxy) (cost *ProxyCost, err error) {
	dir, err := os.MkdirTemp("", "signalbox-fleet-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	bed, err := o.newBed(dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, bed.Close()) }()
	t := &trial{objects: o, bed: bed, proxy: p, log: cfg.Log}
	cost = &ProxyCost{Program: p.Program, Mode: p.Mode}
	defer func() {
		if t.process != nil {
			err = errors.Join(err, t.stop())
		}
	}()
	if err := cost.start(ctx, t, o.cluster); err != nil {
		return nil, err
	}
	received := bed.Relay.Answered()
	cost.ChangeCPU, err = cfg.changes(ctx, o.cluster.APIServerPid(), func(int) error { return t.churn(ctx) })
	cost.ChangeBytes = float64(bed.Relay.Answered()-received) / cfg.number()
	return cost, err
}

func (cost *ProxyCost) start(ctx context.Context, t *trial, c *cluster.Cluster) error {
	earlier, err := c.Requests()
	if err != nil {
		return err
	}
	cost.StartCPU, err = processorTimeOf(c.APIServerPid(), func() error {
		if _, err := t.start(); err != nil {
			return err
		}
		if err := t.synced(ctx); err != nil {
			return err
		}
		if !wait.For(ctx, lateRequests) {
			return ctx.Err()
		}
		return nil
	})
	if err != nil {
		return err
	}
	requests, err := c.Requests()
	cost.StartRequests = len(requests) - len(earlier)
	cost.StartBytes = float64(t.bed.Relay.Answered())
	return err
}
