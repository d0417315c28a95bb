package proxier

import (
	"context"
	"errors"
	"fmt"
	"maps"
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

	all bool // the kernel's state is unknown
	// aside holds the Service ports that the mode refused. They are left out
	// of syncs until they change or are due again.
	aside   map[ServicePortName]refusal
	retryAt time.Time // zero: nothing is due
	backoff time.Duration
}

// refusal is a mode's answer to one Service port alone.
type refusal struct {
	err error
	// proven says that others went in at the same time, so that the fault is
	// in this Service port and not in the kernel's state.
	proven bool
}

const firstRetry = 100 * time.Millisecond

func newFamilyLoop(family Family, p Proxier, opts *LoopOptions) *familyLoop {
	return &familyLoop{family: family, proxier: p, planner: newPlanner(family), opts: opts, all: true, aside: map[ServicePortName]refusal{}}
}

// sync writes what changed, what failed before and is due, or everything.
// Unless it is urgent, a family whose kernel state is unknown waits for its
// next try however much changes in between.
func (f *familyLoop) sync(ctx context.Context, urgent bool) error {
	p := f.planner
	for name := range p.changed {
		delete(f.aside, name) // it is not what was refused any more
	}
	due := f.retryAt.IsZero() || urgent || !time.Now().Before(f.retryAt)
	if f.all && !due {
		return nil
	}
	if due {
		for name := range f.aside {
			p.changed[name] = struct{}{}
		}
	}
	change := Change{All: f.all, Node: p.node, Services: slices.SortedFunc(maps.Keys(p.changed), ServicePortName.Compare)}
	if change.Empty() {
		return nil
	}
	began := time.Now()
	err := f.write(ctx, change)
	f.schedule(err)
	if f.opts.Synced != nil {
		report := SyncReport{Family: f.family, Took: time.Since(began), Services: len(change.Services), All: change.All, SetAside: len(f.aside), Err: err}
		if change.All {
			report.Services = len(p.plan.Services)
		}
		f.opts.Synced(report)
	}
	return err
}

// schedule decides when what is left is tried again.
func (f *familyLoop) schedule(err error) {
	if err == nil && len(f.aside) == 0 {
		f.retryAt, f.backoff = time.Time{}, 0
		return
	}
	f.backoff = min(max(firstRetry, 2*f.backoff), f.opts.RetryPeriod)
	f.retryAt = time.Now().Add(f.backoff)
}

// write tries the change as a whole and, where the mode refuses it, finds out
// which Service ports it is about.
func (f *familyLoop) write(ctx context.Context, change Change) error {
	err := f.try(ctx, change)
	if err == nil {
		f.done(change)
		return nil
	}
	log := f.opts.Logger.With("family", f.family.String())
	if ctx.Err() != nil {
		return err
	}
	if errors.Is(err, ErrUnknownState) || len(change.Services) == 0 {
		f.all = true
		log.Error("sync failed, everything is written anew at the next try", "error", err, "tryAgainIn", max(firstRetry, 2*f.backoff))
		return fmt.Errorf("sync of %s: %w", f.family, err)
	}
	log.Warn("sync failed, looking for the Service it fails for", "services", len(change.Services), "error", err)
	if !f.isolate(ctx, change) {
		f.all = true
		log.Error("sync failed whichever Services it holds, everything is written anew at the next try", "error", err)
		return fmt.Errorf("sync of %s: %w", f.family, err)
	}
	return f.refused()
}

// isolate writes the change in ever smaller parts and sets aside what fails
// alone. It returns false, with nothing set aside, where no part went in: then
// the Services are not to blame.
//
// Where everything must be written anew, the frame without a Service goes in
// first: what the kernel held is unknown or refused, and from here on each
// Service that can be served comes back within milliseconds.
func (f *familyLoop) isolate(ctx context.Context, change Change) bool {
	names, proven := change.Services, false
	if frame := (Change{All: change.All, Node: change.Node}); !frame.Empty() {
		if err := f.tryFrame(ctx, frame); err != nil {
			return false
		}
		proven = true
	}
	if change.All {
		names = slices.SortedFunc(maps.Keys(f.planner.plan.Services), ServicePortName.Compare)
	}
	refused := map[ServicePortName]error{}
	if f.bisect(ctx, names, refused) > 0 {
		proven = true
	}
	if ctx.Err() != nil || !proven && len(names) > 1 {
		return false
	}
	for name, err := range refused {
		f.setAside(name, refusal{err, proven || f.aside[name].proven})
	}
	return true
}

// tryFrame writes everything but Services.
func (f *familyLoop) tryFrame(ctx context.Context, frame Change) error {
	plan := f.planner.plan
	services := plan.Services
	defer func() { plan.Services = services }()
	if frame.All {
		plan.Services = map[ServicePortName]*ServicePort{}
	}
	err := f.try(ctx, frame)
	if err == nil {
		f.done(frame)
	}
	return err
}

// setAside leaves a Service port out of further syncs. One that failed alone,
// with nothing beside it that went in, may only have been the first to meet a
// kernel state that somebody else changed: then everything is written anew.
func (f *familyLoop) setAside(name ServicePortName, r refusal) {
	f.aside[name] = r
	delete(f.planner.changed, name)
	if !r.proven {
		f.all = true
	}
	f.opts.Report(Problem{
		Kind: "Service", Object: name.ServiceName.String(), Field: fmt.Sprintf("port %q", name.Port),
		Reason: fmt.Sprintf("%s rules could not be written: %v; what was served there before still is, and it is tried again", f.family, r.err),
	})
}

// bisect returns how many Service ports it wrote; those that fail alone are in
// refused.
func (f *familyLoop) bisect(ctx context.Context, names []ServicePortName, refused map[ServicePortName]error) (written int) {
	if len(names) == 0 || ctx.Err() != nil {
		return 0
	}
	part := Change{Services: names}
	err := f.try(ctx, part)
	switch {
	case err == nil:
		f.done(part)
		return len(names)
	case errors.Is(err, ErrUnknownState):
		f.all = true
	}
	if len(names) == 1 {
		refused[names[0]] = err
		return 0
	}
	half := len(names) / 2
	written = f.bisect(ctx, names[:half], refused)
	if written == 0 && len(refused) > maxBlame {
		return 0 // the fault is not in the Services: do not try them all
	}
	return written + f.bisect(ctx, names[half:], refused)
}

// maxBlame is after how many failures in a row, with nothing written, a search
// for the Service to blame ends.
const maxBlame = 8

// try runs one Sync; a panic in a mode costs that sync, not the daemon.
func (f *familyLoop) try(ctx context.Context, change Change) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v: %w", r, ErrUnknownState)
		}
	}()
	return f.proxier.Sync(ctx, f.planner.plan, change)
}

// done notes what is in the kernel now.
func (f *familyLoop) done(change Change) {
	p := f.planner
	if change.All {
		f.all = false
	}
	if change.All || change.Node {
		p.node = false
	}
	for _, name := range change.Services {
		delete(p.changed, name)
		delete(f.aside, name)
	}
	if f.opts.Flows == nil {
		return
	}
	if owners := p.flowOwners(change.Services); len(owners) > 0 {
		f.opts.Flows.Clean(f.family, owners)
	}
}

// refused is the error of a sync that had to leave Service ports out.
func (f *familyLoop) refused() error {
	var failed []error
	for name, r := range f.aside {
		failed = append(failed, fmt.Errorf("Service %s: %w", name, r.err))
	}
	return errors.Join(failed...)
}
