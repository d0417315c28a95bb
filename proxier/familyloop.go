package proxier

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"time"
)

// familyLoop brings one family's kernel state to its plan. What fails stays
// due; a Service port that alone makes a sync fail is set aside so that the
// others go in.
type familyLoop struct {
	family  Family
	proxier Proxier
	planner *planner
	opts    *LoopOptions
	log     *slog.Logger

	all bool // the kernel's state is unknown
	// allFailed counts the tries in a row to write everything that failed.
	allFailed int
	// aside holds the Service ports that the mode refused. They are left out
	// of syncs until they change or are due again.
	aside   map[ServicePortName]refusal
	retryAt time.Time // zero: nothing is due
	backoff time.Duration

	// said is what the mode last said of Service ports, says what the modes of
	// all families do. See Reporter.
	said map[ServicePortName]Problem
	says sayings

	written  bool // everything was written at least once
	asked    bool // all is set because the Loop was asked to, not after a failure
	repaired bool // in this sync; see SyncReport
	// since is when the oldest update came in that is not in the kernel;
	// triggers are what the slices among them tell.
	since    time.Time
	triggers []time.Time
}

// refusal is a mode's answer to one Service port alone.
type refusal struct {
	port *ServicePort // what was refused; nil for its removal
	err  error
	// proven says that others went in at the same time, so that the fault is
	// in this Service port and not in the kernel's state.
	proven bool
}

const (
	firstRetry = 100 * time.Millisecond
	// patience is how often writing everything may fail before Services are
	// looked at for the reason. The kernel goes on with what it has in the
	// meantime, and a lock that somebody holds for a moment costs no Service.
	patience = 3
)

func newFamilyLoop(family Family, p Proxier, opts *LoopOptions, says sayings) *familyLoop {
	return &familyLoop{
		family: family, proxier: p, planner: newPlanner(family), opts: opts,
		log: opts.Logger.With("family", family.String()),
		all: true, aside: map[ServicePortName]refusal{}, said: map[ServicePortName]Problem{}, says: says,
	}
}

// sync writes what changed, what failed before and is due, or everything, and
// says whether there was anything to write. Unless it is urgent, a family
// whose kernel state is unknown waits for its next try however much changes in
// between.
func (f *familyLoop) sync(ctx context.Context, urgent bool) (worked bool, err error) {
	due := urgent || f.retryAt.IsZero() || !time.Now().Before(f.retryAt)
	if f.all && !due {
		return false, nil
	}
	names := f.pending(due)
	if !f.all && !f.planner.node && len(names) == 0 {
		if due {
			f.retryAt, f.backoff = time.Time{}, 0
		}
		f.since, f.triggers = time.Time{}, nil // these changed nothing that counts
		return false, nil
	}
	report := SyncReport{Family: f.family, Services: len(names), All: f.all}
	if f.all {
		report.Services = len(f.planner.plan.Services)
	}
	began := time.Now()
	err = f.write(ctx, names)
	f.schedule(due, err)
	report.Took, report.Err = time.Since(began), err
	f.report(report)
	return true, err
}

// pending returns the Service ports to write, sorted: those that changed, and
// of those set aside the ones that are due or are not what was refused.
func (f *familyLoop) pending(due bool) []ServicePortName {
	p := f.planner
	maps.DeleteFunc(f.aside, func(name ServicePortName, _ refusal) bool {
		_, changed := p.changed[name]
		return !changed
	})
	names := make([]ServicePortName, 0, len(p.changed))
	for name := range p.changed {
		if r, refused := f.aside[name]; !refused || due || r.port != p.plan.Services[name] {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, ServicePortName.Compare)
	return names
}

// schedule decides when what is left is tried again. Other Services' successes
// and failures do not put a retry off.
func (f *familyLoop) schedule(due bool, err error) {
	now := time.Now()
	switch {
	case err == nil && !f.all && len(f.aside) == 0:
		f.retryAt, f.backoff = time.Time{}, 0
	case due:
		f.backoff = min(max(firstRetry, 2*f.backoff), f.opts.RetryPeriod)
		f.retryAt = now.Add(f.backoff)
	case f.all && f.retryAt.After(now.Add(firstRetry)):
		f.retryAt = now.Add(firstRetry)
	}
}

// write writes everything or the given Service ports and, where the mode
// refuses that, finds out which of them it is about.
func (f *familyLoop) write(ctx context.Context, names []ServicePortName) error {
	proven := false
	if f.all {
		whole, err := f.writeAll(ctx)
		if err != nil || whole {
			return err
		}
		names, proven = f.changed(), true
	} else {
		err := f.try(ctx, f.planner.plan, Change{Node: f.planner.node, Services: names})
		if err == nil {
			f.planner.node = false
			f.done(names)
			return nil
		}
		if f.all || ctx.Err() != nil {
			return f.failed(ctx, err)
		}
		f.log.Warn("sync failed, looking for the Service it fails for", "services", len(names), "error", err)
		if f.planner.node {
			if err := f.try(ctx, f.planner.plan, Change{Node: true}); err != nil {
				f.all = true
				return f.failed(ctx, err)
			}
			f.planner.node, proven = false, true
		}
	}
	return f.isolate(ctx, names, proven)
}

// writeAll writes the whole plan, or after failures what the kernel last took
// of it: then whole is false and what changed since is still to be written.
// Before anything was ever taken, and where even that is refused now, this is
// no Service at all: whatever the kernel still had goes, and each Service that
// can be served comes back at once.
func (f *familyLoop) writeAll(ctx context.Context) (whole bool, err error) {
	p := f.planner
	f.allFailed++ // until it has not
	if len(f.aside) == 0 {
		err := f.try(ctx, p.plan, Change{All: true})
		if err == nil {
			p.node, f.allFailed = false, 0
			f.done(f.changed())
			return true, nil
		}
		if ctx.Err() != nil || f.allFailed < patience || len(p.changed) == 0 && f.allFailed < 2*patience {
			return false, f.failed(ctx, err)
		}
		f.log.Warn("writing everything failed again, looking for the Service it fails for", "services", len(p.changed), "error", err)
	}
	if f.allFailed >= 2*patience {
		p.forgetKernel()
	}
	if err := f.try(ctx, p.asWritten(nil), Change{All: true}); err != nil {
		return false, f.failed(ctx, err)
	}
	p.node, f.allFailed = false, 0
	return false, nil
}

// try runs one Sync; a panic in a mode costs that sync, not the daemon.
func (f *familyLoop) try(ctx context.Context, plan *Plan, change Change) (err error) {
	defer func() {
		if r := recover(); r != nil {
			f.opts.Logger.Error("a sync has panicked: this is a defect, please report it", "family", f.family.String(),
				"panic", r, "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v: %w", r, ErrUnknownState)
		}
		switch {
		case errors.Is(err, ErrUnknownState):
			f.all = true
		case err == nil && change.All:
			f.repaired = f.repaired || f.written && !f.asked
			f.all, f.asked, f.written = false, false, true
		}
	}()
	slow := time.AfterFunc(slowSync, func() {
		f.opts.Logger.Warn("a sync takes long; changes wait for it, what was served before still is",
			"family", f.family.String(), "servicePorts", len(change.Services), "everything", change.All, "for", slowSync)
	})
	defer slow.Stop()
	if err := f.proxier.Sync(ctx, plan, change); err != nil {
		return err
	}
	f.heed(plan, change)
	return nil
}

// slowSync is after how long a sync is worth a line in the log.
const slowSync = 10 * time.Second

// done notes what is in the kernel now.
func (f *familyLoop) done(names []ServicePortName) {
	owners := f.planner.flowOwners(names)
	f.planner.written(names)
	for _, name := range names {
		delete(f.aside, name)
	}
	if f.opts.Flows != nil && len(owners) > 0 {
		f.opts.Flows.Clean(f.family, owners)
	}
}

// changed returns every Service port that is not in the kernel as planned,
// sorted.
func (f *familyLoop) changed() []ServicePortName {
	return slices.SortedFunc(maps.Keys(f.planner.changed), ServicePortName.Compare)
}

func (f *familyLoop) failed(ctx context.Context, err error) error {
	err = fmt.Errorf("sync of %s: %w", f.family, err)
	if ctx.Err() == nil { // else it was told to stop
		f.log.Error("sync failed", "error", err, "everythingIsWrittenAnew", f.all)
	}
	return err
}
