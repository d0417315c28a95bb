// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/measure"
	"signalbox/proxier/plan"
)

// Mode is a way to serve Services.
type Mode struct {
	// Name is what --mode takes.
	Name string
	// Supported says why the mode cannot serve a family in the network
	// namespace of the calling thread, or returns nil.
	Supported func(plan.Family) error
}

// Config says what is shown.
type Config struct {
	// Binary is the path of the signalbox to run.
	Binary   string
	Modes    []Mode
	Families []plan.Family
	// Services is the number of Services beside those that are probed.
	Services int
	// Changes is how often a manifest is changed to measure how soon packets
	// obey it.
	Changes int
}

// Defaults and limits of a Config.
const (
	DefaultServices = 100
	DefaultChanges  = 15
	// MaxServices is how many cluster IPs there are for further Services.
	MaxServices = 65000
)

func (c *Config) check() error {
	switch {
	case len(c.Modes) == 0:
		return errors.New("no mode to show")
	case len(c.Families) == 0:
		return errors.New("no IP family to show")
	case c.Services < 0 || c.Services > MaxServices:
		return fmt.Errorf("%d Services: must be 0 to %d, the cluster IPs there are", c.Services, MaxServices)
	case c.Changes < 1:
		return errors.New("nothing to measure: there must be at least 1 change")
	}
	return nil
}

// errNoFamily says that a mode can serve none of the wanted families here.
var errNoFamily = errors.New("the mode cannot be used on this machine")

// Run shows the modes one after the other and writes to out as it goes. The
// error names everything that came out wrong, or why nothing could be shown.
func Run(ctx context.Context, cfg Config, out io.Writer) error {
	if err := cfg.check(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := &printer{out: out, stop: cancel}
	p.opening(&cfg, connections)
	var results []*modeResult
	var failed []error
	for _, mode := range cfg.Modes {
		res, err := runTrial(ctx, &cfg, mode, p)
		results = append(results, res)
		switch {
		case p.err != nil:
			return fmt.Errorf("writing the results: %w", p.err)
		case ctx.Err() != nil:
			return fmt.Errorf("interrupted: %w", err)
		case errors.Is(err, unix.EPERM):
			return fmt.Errorf("the demo makes network namespaces, for which it needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN): %w", err)
		case err != nil && !errors.Is(err, errNoFamily):
			err = fmt.Errorf("mode %s: %w", mode.Name, err)
			p.line("%v", err)
			failed = append(failed, err)
		}
	}
	p.comparison(results)
	if p.err != nil {
		return fmt.Errorf("writing the results: %w", p.err)
	}
	return errors.Join(append(failed, verdict(results))...)
}

// verdict is an error that names everything that came out wrong.
func verdict(results []*modeResult) error {
	var wrong []string
	shown := 0
	for _, m := range results {
		for _, f := range m.families {
			shown++
			for _, w := range f.wrong() {
				wrong = append(wrong, fmt.Sprintf("%s, %s: %s", m.mode, f.family, w))
			}
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("%d results are not what they must be:\n  %s", len(wrong), strings.Join(wrong, "\n  "))
	}
	if shown == 0 {
		return errors.New("no mode could be shown on this machine")
	}
	return nil
}

// modeResult is what was found out about one mode.
type modeResult struct {
	mode string
	// unsupported says for each family that the mode cannot serve here why not.
	unsupported []error
	families    []*familyResult
	// memory is the most that the daemon held in bytes, processor the time it
	// and the programs it ran were computing.
	memory    int64
	processor time.Duration
}

// familyResult is what was found out about one mode in one family.
type familyResult struct {
	family plan.Family
	// serving is the time from the daemon's start to the first answer through
	// a ClusterIP, with all manifests there.
	serving time.Duration
	rows    []row
	// changes are the times from a changed manifest to the first answer that
	// obeys it; changeFails names what went wrong with connections meanwhile.
	changes     []time.Duration
	changeFails []string
	connects    measure.Latencies
}

// wrong names everything that is not as it must be.
func (f *familyResult) wrong() []string {
	var all []string
	for i := range f.rows {
		all = append(all, f.rows[i].wrong()...)
	}
	return append(all, f.changeFails...)
}
