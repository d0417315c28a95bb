// SPDX-License-Identifier: Apache-2.0

// Package bench measures service proxies side by side. Each proxy runs on node1 of a lab
// of its own and follows the same real API server, or a directory of manifests. The
// proxies take turns, so that all of them meet the same machine. Results are ratios of
// medians over the rounds, with their spread.
//
// The files follow a run: bench.go takes sizes, rounds and proxies; store.go has the
// objects, and objects.go makes and changes them; trial.go measures one proxy once, with
// connections.go; haproxy.go starts haproxy instead; floor.go measures what no proxy can
// avoid; results.go sums up; report.go and chart.go write it down. fleet.go asks what proxies and
// fleets of daemons cost the API server, and fleetreport.go writes that down.
package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"signalbox/internal/cluster"
	"signalbox/internal/measure"
	"signalbox/internal/testbed"
	"signalbox/proxier/plan"
)

// Config says what is measured.
type Config struct {
	Proxies  []testbed.Proxy
	Sizes    []Size
	Families []plan.Family
	// Directory says that the objects are in a directory of manifests, and not in an API
	// server.
	Directory bool
	// Rounds is how often each proxy is measured at each size, at most.
	Rounds int
	// Time is shared among the sizes. After the first round of a size, another one begins
	// only if it is likely to end within the size's share.
	Time time.Duration
	// Moves is how often an endpoint moves at rest in one round, at most.
	Moves int
	// Short makes every part short. It shows that everything works; the figures say little.
	Short bool
	// Audited is for Cluster.Requests.
	Audited bool
	// Log gets a line for each step.
	Log func(format string, args ...any)
}

// MaxServices is how many cluster IPs a lab has room for, besides the moving and the fixed
// Service.
const MaxServices = 1<<16 - firstService - 3

// Size is a number of Services with that many endpoints each.
type Size struct {
	Services  int `json:"services"`
	Endpoints int `json:"endpointsPerService"`
}

func (s Size) String() string { return fmt.Sprintf("%d x %d", s.Services, s.Endpoints) }

// Run measures every proxy at every size. A proxy that fails has the error in its result,
// and the others go on.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	report := newReport(cfg)
	if group, err := measure.NewMemoryGroup(); err != nil {
		report.NoKernelMemory = err.Error()
	} else if err := group.Remove(); err != nil {
		return report, err
	}
	end := time.Now().Add(cfg.Time)
	for i, size := range cfg.Sizes {
		share := time.Until(end) / time.Duration(len(cfg.Sizes)-i)
		result, err := runSize(ctx, cfg, size, time.Now().Add(share))
		if err != nil {
			return report, fmt.Errorf("%s: %w", size, err)
		}
		report.Sizes = append(report.Sizes, *result)
	}
	return report, nil
}

func runSize(ctx context.Context, cfg Config, size Size, end time.Time) (result *SizeResult, err error) {
	dir, err := cluster.MakeDir()
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	store, err := newStore(ctx, cfg, dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, store.close()) }()
	cfg.Log("%s: creating the objects", size)
	o := newObjects(store, cfg.Families, size)
	if err := prepare(ctx, o, dir); err != nil {
		return nil, err
	}
	result = &SizeResult{Size: size, Floors: map[string][]float64{}}
	for _, p := range cfg.Proxies {
		result.Proxies = append(result.Proxies, newProxyResult(p))
	}
	for result.Rounds < cfg.Rounds {
		cfg.Log("%s: round %d of at most %d", size, result.Rounds+1, cfg.Rounds)
		began := time.Now()
		if err := runRound(ctx, cfg, o, result); err != nil {
			return nil, err
		}
		if time.Now().Add(time.Since(began)).After(end) {
			cfg.Log("%s: another round would take too long", size)
			break
		}
	}
	return result, nil
}

// runRound measures each proxy once.
func runRound(ctx context.Context, cfg Config, o *objects, result *SizeResult) error {
	floor, err := measureFloor(ctx, o)
	if err != nil {
		return fmt.Errorf("floor: %w", err)
	}
	add(result.Floors, floor.figures())
	for i := range cfg.Proxies {
		at := (i + result.Rounds) % len(cfg.Proxies) // each comes first once
		r := &result.Proxies[at]
		if r.Failed != "" {
			continue
		}
		err := runTrial(ctx, cfg, o, floor, cfg.Proxies[at], r)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			cfg.Log("%v", err)
			r.Failed = err.Error()
		}
	}
	result.Rounds++
	return nil
}

// prepare creates the objects. Every lab has the addresses of this one.
func prepare(ctx context.Context, o *objects, dir string) error {
	bed, err := o.newBed(dir)
	if err != nil {
		return err
	}
	return errors.Join(o.create(ctx, bed.Lab), bed.Close())
}

// runTrial measures one proxy once, and adds what it finds to the result.
func runTrial(ctx context.Context, cfg Config, o *objects, f floor, p testbed.Proxy, result *ProxyResult) error {
	dir, err := os.MkdirTemp("", "signalbox-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	bed, err := o.newBed(dir)
	if err != nil {
		return err
	}
	t := &trial{
		objects: o, bed: bed, proxy: p, moves: cfg.Moves, times: usual, at: map[plan.Family]int{}, floor: f,
		figures: map[string]float64{}, floors: map[string]float64{}, log: cfg.Log,
	}
	if cfg.Short {
		t.times = short
	}
	t.memory, _ = measure.NewMemoryGroup() // the report says why there is none
	if err := errors.Join(t.run(ctx), bed.Close()); err != nil {
		return err
	}
	add(result.Figures, t.figures)
	add(result.Floors, t.floors)
	result.Moves = append(result.Moves, t.moved...)
	return nil
}

// Write writes the report: report.json, report.md and the charts.
func (r *Report) Write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := r.writeJSON(filepath.Join(dir, "report.json")); err != nil {
		return err
	}
	if err := r.writeCharts(dir); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "report.md"), []byte(r.markdown("")), 0o644)
}

// today is the date of a report.
func today() string { return time.Now().UTC().Format(time.DateOnly) }
