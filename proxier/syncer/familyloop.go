// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"time"

	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer/internal/drift"
)

// familyLoop writes one family's plan into the kernel. What fails is tried again. A
// Service that the kernel refuses is quarantined. The search for it takes several
// turns, and each turn writes the other changes first.
type familyLoop struct {
	family  plan.Family
	proxier proxier.Proxier
	planner *planner
	opts    *LoopOptions
	log     *slog.Logger

	fullWriteDue bool
	// stateUnknown says that the kernel may not have what was written.
	stateUnknown bool
	// allFailed counts the full writes that failed in a row.
	allFailed int
	// suspects are groups of changes that failed together; the last is next.
	suspects [][]plan.ServicePortName
	// kernelAccepts says that the kernel accepted a change since the search began,
	// so its state is not the cause of a failure.
	kernelAccepts bool
	failedAlone   int       // suspects that failed alone since the search began
	fullWriteAt   time.Time // of the last full write that a failed suspect caused
	quarantine
	retryAt time.Time // zero: nothing is due
	backoff time.Duration
	// repairs are those of what other software changes.
	repairs *drift.Repairs

	// problemOf has what the mode last reported about each Service port. problems
	// has the reports of all families.
	problemOf map[plan.ServicePortName]plan.Problem
	problems  modeProblems

	everWritten        bool          // a full write has succeeded
	fullWriteRequested bool          // not after a failure
	repaired           bool          // in this sync; see SyncReport
	triedFullWrite     bool          // in this sync
	took               time.Duration // of the last try
	more               bool          // the next sync is due at once
	current            bool          // see SyncReport
	// failure is the error of the last turn, and failingSince the time of the first
	// failure in a row.
	failure      error
	failingSince time.Time
	// since is the time of the oldest update that is not in the kernel. triggers
	// are the trigger times of the EndpointSlices among these updates.
	since    time.Time
	triggers []time.Time
}

const (
	firstRetry = 100 * time.Millisecond
	// maxFullWriteFailures is how often in a row a full write may fail before
	// the search for a Service begins. Until then the kernel keeps what it has, and
	// a lock that another program holds for a moment costs no Service.
	maxFullWriteFailures = 3
)

func newFamilyLoop(family plan.Family, p proxier.Proxier, opts *LoopOptions, problems modeProblems, quarantined map[plan.ServiceName]int) *familyLoop {
	return &familyLoop{
		family: family, proxier: p, planner: newPlanner(family), opts: opts,
		log:          opts.Logger.With("family", family.String()),
		fullWriteDue: true, quarantine: newQuarantine(quarantined), repairs: drift.New(), problemOf: map[plan.ServicePortName]plan.Problem{}, problems: problems,
	}
}

// sync runs one turn: it writes the changes and the retries that are due, or
// everything. It says whether there was anything to write. Unless it is urgent, a
// family whose kernel state is unknown waits for its next try, however much changes.
func (f *familyLoop) sync(ctx context.Context, urgent bool) (worked bool, err error) {
	due := urgent || f.retryAt.IsZero() || !time.Now().Before(f.retryAt)
	if f.fullWriteDue && !due {
		return false, nil
	}
	f.prune()
	b := f.backlog()
	retry := due && len(f.quarantinedPorts) > 0
	worked = f.repair(ctx)
	if !worked && !f.fullWriteDue && !f.planner.node && b.empty() && len(f.suspects) == 0 && !retry {
		f.schedule(due, false)
		f.since, f.triggers = time.Time{}, nil // these events changed nothing in the plan
		f.ended(nil)
		f.checkBacklog()
		return false, nil
	}
	report := SyncReport{Family: f.family, ServicePorts: f.count(b)}
	if f.fullWriteDue {
		report.ServicePorts = len(f.planner.plan.Services)
	}
	began := time.Now()
	err = f.turn(ctx, b, due, retry)
	report.Took, report.Err = time.Since(began), err
	f.report(report)
	return true, err
}

// repair has the mode repair what other software changed, if that is due. It says whether
// something differed.
func (f *familyLoop) repair(ctx context.Context) (differed bool) {
	writer, due := f.repairs.Begin()
	if !due || f.fullWriteDue {
		return false
	}
	began := time.Now()
	found, err := f.tryRepair(ctx)
	if err != nil {
		f.fullWriteDue, f.stateUnknown = true, true
		if ctx.Err() == nil { // otherwise the daemon is stopping
			f.log.Error("what another program changed cannot be compared or repaired; a full write follows", "process", writer.String(), "error", err)
		}
		return true
	}
	if !found.NeedsFullWrite {
		f.repairs.Succeeded()
	}
	if len(found.Objects) == 0 {
		return false
	}
	f.fullWriteDue, f.stateUnknown, f.repaired = found.NeedsFullWrite, found.NeedsFullWrite, !found.NeedsFullWrite // try counts a full write
	f.logRepair(writer, found, time.Since(began))
	return true
}

func (f *familyLoop) tryRepair(ctx context.Context) (found proxier.Difference, err error) {
	defer f.recoverPanic(&err)
	defer f.repairs.End()
	return f.proxier.Repair(ctx)
}

// recoverPanic makes an error of a panic in a mode, which ends a sync, not the daemon.
func (f *familyLoop) recoverPanic(err *error) {
	if r := recover(); r != nil {
		f.log.Error("a sync has panicked: this is a defect, please report it", "panic", r, "stack", string(debug.Stack()))
		*err = fmt.Errorf("panic: %v: %w", r, proxier.ErrUnknownState)
	}
}

// maxDifferences is how many differences one log line names.
const maxDifferences = 10

// logRepair logs each repair, and that repairs are slowed down. In a fight it does not
// log each repair.
func (f *familyLoop) logRepair(writer proxier.Writer, found proxier.Difference, took time.Duration) {
	pause, isNew := f.repairs.Repaired(writer)
	level := slog.LevelWarn
	if pause > 0 && !isNew {
		level = slog.LevelDebug
	}
	f.log.Log(context.Background(), level, "another program has changed what signalbox has in the kernel; it is repaired", "process", writer.String(),
		"differences", found.Objects[:min(len(found.Objects), maxDifferences)], "fullWrite", found.NeedsFullWrite, "took", took)
	if isNew {
		f.log.Error("a program undoes what signalbox writes again and again; repairs wait, at most 30s; stop the program, or exclude signalbox's tables from it",
			"program", writer.Program(), "pause", pause)
	}
}

// count returns the number of Service ports in a turn.
func (f *familyLoop) count(b backlog) int {
	n := len(b.small)
	for _, groups := range [][][]plan.ServicePortName{b.slices, b.altered, f.suspects} {
		for _, group := range groups {
			n += len(group)
		}
	}
	return n
}

// turn writes everything if that is due, then the small changes together, then a part
// of the rest. In this order nobody waits for a search or for a large Service.
func (f *familyLoop) turn(ctx context.Context, b backlog, due, retry bool) error {
	f.triedFullWrite, f.searchesPorts = false, false
	if len(f.suspects) == 0 {
		f.kernelAccepts, f.failedAlone = false, 0
	}
	if f.fullWriteDue {
		if err := f.writeAll(ctx); err != nil {
			f.schedule(due, false)
			return err
		}
		b = f.backlog()
	}
	if err := f.writeSmall(ctx, b.small); err != nil {
		f.schedule(due, false)
		return err
	}
	if retry && len(f.retries) == 0 {
		f.retries = [][]plan.ServicePortName{slices.SortedFunc(maps.Keys(f.quarantinedPorts), plan.ServicePortName.Compare)}
	}
	a, progress := newAllowance(), false
	f.writeGroups(ctx, a, b.slices[:min(1, len(b.slices))])
	f.search(ctx, a)
	f.writeGroups(ctx, a, b.altered)
	if retry || f.searchesPorts {
		progress = f.retry(ctx, a)
	}
	err := f.drainFailures()
	if f.fullWriteDue && ctx.Err() == nil { // the other Services need a known state
		err = errors.Join(err, f.writeAll(ctx))
	}
	f.schedule(due, progress)
	if ctx.Err() != nil {
		return f.failed(ctx, ctx.Err())
	}
	return err
}

// schedule sets the time of the next retry. Successes and failures of other Services
// do not delay it.
func (f *familyLoop) schedule(due, progress bool) {
	now := time.Now()
	switch {
	case !f.fullWriteDue && len(f.quarantinedPorts) == 0:
		f.retryAt, f.backoff = time.Time{}, 0
	case progress:
		f.backoff, f.retryAt = firstRetry, now.Add(firstRetry)
	case due:
		f.backoff = min(max(firstRetry, 2*f.backoff), f.opts.RetryPeriod)
		f.retryAt = now.Add(f.backoff)
	case (f.fullWriteDue || f.searchesPorts) && f.retryAt.After(now.Add(firstRetry)):
		f.retryAt = now.Add(firstRetry)
	}
}

// checkBacklog finds out whether changes wait after a sync.
func (f *familyLoop) checkBacklog() {
	b := f.backlog()
	waits := f.planner.node || len(f.suspects)+len(b.small)+len(b.altered) > 0
	f.current = !f.fullWriteDue && !waits
	f.more = !f.fullWriteDue && (waits || len(b.slices) > 0)
}

// writeSmall writes the changes of small Services, and of the node.
func (f *familyLoop) writeSmall(ctx context.Context, names []plan.ServicePortName) error {
	p := f.planner
	if len(names) == 0 && !p.node {
		return nil
	}
	err := f.try(ctx, p.plan, plan.Change{Node: p.node, Services: names})
	if err == nil {
		p.node, f.kernelAccepts = false, true
		f.commit(names)
		return nil
	}
	if ctx.Err() != nil {
		return f.failed(ctx, err)
	}
	if p.node && !f.fullWriteDue {
		if err := f.try(ctx, p.plan, plan.Change{Node: true}); err != nil {
			f.fullWriteDue = true
			return f.failed(ctx, err)
		}
		p.node, f.kernelAccepts = false, true
	}
	if len(names) > 0 {
		f.failedTogether(names, err)
	}
	return nil
}

// writeAll writes the whole plan. Quarantined and suspect Service ports keep the form
// that the kernel last accepted. After some failures it writes only what the kernel
// accepted before. If the kernel refuses even that, it writes a plan without Services,
// and the next turns add each Service that the kernel accepts.
func (f *familyLoop) writeAll(ctx context.Context) error {
	p := f.planner
	names := f.unsuspected()
	f.triedFullWrite = true
	err := f.try(ctx, p.asWritten(names), plan.Change{All: true})
	if err == nil {
		f.acceptedAll()
		f.commit(names)
		return nil
	}
	f.allFailed++
	if ctx.Err() != nil || f.allFailed < maxFullWriteFailures || len(names) == 0 && f.allFailed < 2*maxFullWriteFailures {
		return f.failed(ctx, err)
	}
	if f.allFailed >= 2*maxFullWriteFailures {
		p.forgetKernel()
	}
	f.log.Warn("a full write failed again; looking for the Service that causes it", "servicePorts", len(p.changed), "error", err)
	if err := f.try(ctx, p.asWritten(nil), plan.Change{All: true}); err != nil {
		return f.failed(ctx, err)
	}
	f.acceptedAll()
	return nil
}

func (f *familyLoop) acceptedAll() {
	f.planner.node, f.allFailed, f.kernelAccepts = false, 0, true
}

// unsuspected returns the changes that are neither suspect nor quarantined, sorted.
func (f *familyLoop) unsuspected() []plan.ServicePortName {
	names := f.changed()
	if len(f.suspects)+len(f.quarantinedPorts) == 0 {
		return names
	}
	out := map[plan.ServicePortName]struct{}{}
	for _, group := range f.suspects {
		for _, name := range f.withLinked(group) {
			out[name] = struct{}{}
		}
	}
	for _, name := range f.withLinked(slices.Collect(maps.Keys(f.quarantinedPorts))) {
		out[name] = struct{}{}
	}
	return slices.DeleteFunc(names, func(name plan.ServicePortName) bool { _, left := out[name]; return left })
}

// try runs one Sync.
func (f *familyLoop) try(ctx context.Context, plan *plan.Plan, change plan.Change) (err error) {
	defer func() {
		switch {
		case errors.Is(err, proxier.ErrUnknownState):
			f.fullWriteDue, f.stateUnknown = true, true
		case err == nil && change.All:
			f.repaired = f.repaired || f.everWritten && !f.fullWriteRequested
			f.fullWriteDue, f.stateUnknown, f.fullWriteRequested, f.everWritten = false, false, false, true
			f.repairs.Succeeded()
		}
	}()
	defer f.recoverPanic(&err)
	slow := time.AfterFunc(slowSync, func() {
		f.log.Warn("a sync takes long; changes wait for it, what was served before still is",
			"servicePorts", len(change.Services), "fullWrite", change.All, "for", slowSync)
	})
	defer slow.Stop()
	if change.All {
		f.repairs.Cancel()
	}
	began := time.Now()
	defer func() { f.took = time.Since(began) }()
	if err := f.proxier.Sync(ctx, plan, change); err != nil {
		return err
	}
	f.collectProblems(plan, change)
	return nil
}

// slowSync is the time after which the log reports that a sync still runs.
const slowSync = 10 * time.Second

// commit records that the kernel has these Service ports as planned.
func (f *familyLoop) commit(names []plan.ServicePortName) {
	owners := f.planner.flowOwners(names)
	f.planner.markWritten(names, f.took)
	for _, name := range names {
		f.release(name)
	}
	if f.opts.Flows != nil && len(owners) > 0 {
		f.opts.Flows.Clean(f.family, owners)
	}
}

// changed returns the Service ports whose planned form is not in the kernel, sorted.
func (f *familyLoop) changed() []plan.ServicePortName {
	return slices.SortedFunc(maps.Keys(f.planner.changed), plan.ServicePortName.Compare)
}

func (f *familyLoop) failed(ctx context.Context, err error) error {
	err = fmt.Errorf("sync of %s: %w", f.family, err)
	if ctx.Err() == nil { // otherwise the daemon is stopping
		f.log.Error("sync failed", "error", err, "fullWrite", f.fullWriteDue)
	}
	return err
}
