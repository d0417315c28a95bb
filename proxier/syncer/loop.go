// SPDX-License-Identifier: Apache-2.0

// Package syncer keeps each IP family's plan up to date and has a Proxier write it. It
// decides who owns a frontend, quarantines Services that the kernel refuses, and
// reports each sync.
package syncer

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"signalbox/internal/budget"
	"signalbox/internal/wait"
	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
	"signalbox/proxier/syncer/internal/drift"
)

// LoopOptions is what a Loop is made of.
type LoopOptions struct {
	NodeName string
	Settings service.Settings
	// Proxiers is the mode at work in each family that is served.
	Proxiers map[plan.Family]proxier.Proxier
	// Flows may be nil: then no flow is removed.
	Flows FlowCleaner
	// MinSyncPeriod is the least time from the end of one sync to the begin of
	// the next; 0 for none (a sync is then followed by a pause as long as it
	// took, or by stormPause in a storm, so that a storm of changes is taken in
	// batches while a single change never waits).
	MinSyncPeriod time.Duration
	// MaxProcessor is the share of one processor that the process may take on average;
	// 0 for no limit. Syncs then wait, and take more changes each.
	MaxProcessor float64
	// FullWritePeriod is the time between two full writes, whatever is known to
	// have changed; 0 for never.
	FullWritePeriod time.Duration
	// RetryPeriod bounds the wait before what failed is tried again; 30 s when
	// zero.
	RetryPeriod time.Duration
	// Logger is slog.Default() when nil.
	Logger *slog.Logger
	// Report gets each part of an object that cannot be served. By default it is
	// logged as a warning.
	Report func(plan.Problem)
	// Synced gets the report of every Sync; it may be nil.
	Synced func(SyncReport)
	// NodeMissing is called when the Node object of NodeName begins or ceases to be
	// missing after the source has synced. It gets the sorted names of other Node
	// objects. It may be nil.
	NodeMissing func(missing bool, others []string)
	// NodeOptional says that no Node object need exist: it is missing only where
	// the source has Node objects of other names.
	NodeOptional bool
}

// SyncReport says what one sync of one family did.
type SyncReport struct {
	Family       plan.Family
	Took         time.Duration
	ServicePorts int  // to write or remove
	All          bool // a full write
	Quarantined  int  // Service ports in quarantine: the mode refuses them, or their Service is too large
	// Current says that the kernel now does what the plan asks for, but for
	// quarantined Services and for slices of large ones that are still to come.
	Current bool
	// Repaired says that the kernel's state had become unknown, or was not
	// what had been written, and that it is now.
	Repaired bool
	// Queued is when the oldest update came in that is in the kernel now; zero
	// where none is, as after a failure or where nothing but a retry was due.
	Queued time.Time
	// Triggers are the times of the changes, as the EndpointSlices' annotation
	// endpoints.kubernetes.io/last-change-trigger-time tells them, that are in
	// the kernel now.
	Triggers []time.Time
	Totals   Totals
	// HealthChecks are those of the whole plan. Nil: they are what they were.
	HealthChecks map[plan.ServiceName]plan.HealthCheck
	// NodePortAddrs are the addresses at which they are asked for.
	NodePortAddrs plan.NodePortAddrs
	// Kernel is what the mode keeps in the kernel; nil for a mode that does
	// not count it.
	Kernel []proxier.KernelObjects
	Err    error
}

// Loop feeds objects through Tracker and resolver into the Proxiers. It is a
// Sink: Apply, Delete, Synced, SetLocalAddrs, SetRouteSources, SetAPIServers, LocalAddrs,
// RequestFullWrite, RepairNow, Progress, Drift, Fights and Ask may be called from any
// goroutine; everything else belongs to the one that calls Run or SyncNow.
type Loop struct {
	*inbox
	opts LoopOptions

	tracker         *service.Tracker
	local           []netip.Addr
	routes          []plan.RouteSource
	resolved        int                           // how often a Service was resolved, over all families
	warnedOfWeights map[plan.ServiceName]struct{} // see warnOfIgnoredWeights
	families        []*familyLoop
	problems        modeProblems // of all families

	nodeMissing bool // as in the last call of NodeMissing
	processor   *budget.Budget

	questions chan func() // see Ask
}

// NewLoop returns a Loop that waits for its source's Synced.
func NewLoop(opts LoopOptions) *Loop {
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}
	if opts.Report == nil {
		opts.Report = LogProblems(opts.Logger)
	}
	if opts.RetryPeriod == 0 {
		opts.RetryPeriod = 30 * time.Second
	}
	l := &Loop{inbox: &inbox{wake: make(chan struct{}, 1)}, opts: opts, tracker: service.NewTracker(opts.NodeName, &opts.Settings), warnedOfWeights: map[plan.ServiceName]struct{}{}, questions: make(chan func()), processor: budget.New(opts.MaxProcessor), problems: modeProblems{}}
	l.progress.pending = map[plan.Family]time.Time{}
	quarantined := map[plan.ServiceName]int{}
	for _, family := range plan.Families {
		if p := opts.Proxiers[family]; p != nil {
			l.progress.pending[family] = time.Time{}
			l.families = append(l.families, newFamilyLoop(family, p, &l.opts, l.problems, quarantined))
		}
	}
	return l
}

// In a storm there is one sync for each stormPause: most of what a change costs is the
// transaction, not what is in it. A sync belongs to a storm if it begins within stormPause
// after the Loop could have begun it. So two changes in a row do not wait, and the third does.
const stormPause = 50 * time.Millisecond

// Run syncs until ctx is done and returns nil then. A change that arrives
// while nothing else happens is synced at once.
func (l *Loop) Run(ctx context.Context) error {
	retry := time.NewTimer(0)
	retry.Stop()
	defer retry.Stop()
	fullWrite, stop := every(l.opts.FullWritePeriod)
	defer stop()
	defer l.watch(ctx)()
	var pauseEnded time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-l.wake:
		case <-retry.C:
		case <-fullWrite:
			l.RequestFullWrite()
		case answer := <-l.questions:
			answer()
			continue
		}
		began := time.Now()
		worked, _ := l.sync(ctx, false) // each failure was reported where it happened
		retry.Stop()
		if due, ok := l.nextRetry(); ok {
			retry.Reset(time.Until(due))
		}
		if worked && !l.pauseFor(ctx, l.pause(began, began.Sub(pauseEnded) <= stormPause)) {
			return nil
		}
		pauseEnded = time.Now()
	}
}

// pauseFor answers questions for the time of a pause. It returns false as soon as ctx ends.
func (l *Loop) pauseFor(ctx context.Context, pause time.Duration) bool {
	over := time.NewTimer(pause)
	defer over.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-over.C:
			return true
		case answer := <-l.questions:
			answer()
		}
	}
}

// pause is how long the Loop waits after a sync. The slices of a large Service are no storm.
func (l *Loop) pause(began time.Time, storm bool) time.Duration {
	pause := max(l.opts.MinSyncPeriod, min(time.Since(began), time.Second), l.processor.Pause())
	if storm && !l.more() {
		pause = max(pause, stormPause)
	}
	return pause
}

// watch has the modes report what other software changes. It returns what ends that.
func (l *Loop) watch(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var watches sync.WaitGroup
	for _, f := range l.families {
		watches.Go(func() {
			f.proxier.Watch(ctx, func(w proxier.Writer) {
				f.repairs.Request(w)
				wait.Wake(l.wake)
			})
		})
	}
	return func() {
		cancel()
		watches.Wait()
	}
}

// every ticks, or with no period never does.
func every(period time.Duration) (<-chan time.Time, func()) {
	if period == 0 {
		return nil, func() {}
	}
	t := time.NewTicker(period)
	return t.C, t.Stop
}

// nextRetry is the time of the next retry, or now if unwritten slices remain.
func (l *Loop) nextRetry() (due time.Time, ok bool) {
	for _, f := range l.families {
		if f.more {
			return time.Time{}, true
		}
		if !f.retryAt.IsZero() && (!ok || f.retryAt.Before(due)) {
			due, ok = f.retryAt, true
		}
		if at, pending := f.repairs.Due(); pending && !f.fullWriteDue && (!ok || at.Before(due)) {
			due, ok = at, true
		}
	}
	return due, ok
}

// more says whether unwritten slices remain, which are due at once.
func (l *Loop) more() bool {
	return slices.ContainsFunc(l.families, func(f *familyLoop) bool { return f.more })
}

// SyncNow syncs all queued events in every family at once, whatever the waiting
// periods are. It returns the joined failures. Each was also reported and is tried
// again.
func (l *Loop) SyncNow(ctx context.Context) error {
	_, err := l.sync(ctx, true)
	for l.more() && ctx.Err() == nil {
		_, next := l.sync(ctx, false)
		err = errors.Join(err, next)
	}
	return err
}

func (l *Loop) sync(ctx context.Context, urgent bool) (worked bool, err error) {
	var done []plan.Family
	defer func() { l.finish(l.tracker.Counts(), done) }()
	for _, f := range l.families {
		if f.more {
			l.resume(f.family)
		}
	}
	if !l.update() {
		return false, nil
	}
	var failed []error
	for _, f := range l.families {
		wrote, err := f.sync(ctx, urgent)
		worked = worked || wrote
		failed = append(failed, err)
		if f.current {
			done = append(done, f.family)
		}
	}
	return worked, errors.Join(failed...)
}

// update brings the plans up to date with what is queued, and says whether
// they are complete: Services and EndpointSlices were listed.
func (l *Loop) update() bool {
	got := l.drain()
	for _, e := range got.events {
		if e.delete {
			l.tracker.Delete(e.obj)
			continue
		}
		for _, p := range l.tracker.Apply(e.obj) {
			l.opts.Report(p)
		}
	}
	l.local, l.routes = got.addrs, got.routes
	l.tracker.SetAPIServers(got.servers, got.addrs)
	if !got.synced {
		return false
	}
	l.checkNode()
	if got.first {
		l.tracker.WarnOfUnknowns(l.opts.Logger, &l.opts.Settings, slices.Sorted(maps.Keys(l.opts.Proxiers)))
	}
	names, node := l.tracker.TakeChanges()
	l.warnOfIgnoredWeights(names)
	triggers := l.tracker.TakeTriggerTimes()
	for _, f := range l.families {
		f.queued(got.since, triggers[f.family])
		if got.fullWrite && !f.fullWriteDue {
			f.fullWriteDue, f.fullWriteRequested, f.retryAt = true, true, time.Time{}
		}
		todo := names
		if node || got.moved || got.first {
			if f.planner.setNode(l.tracker.Node(&l.opts.Settings, f.family, l.local, l.routes)) {
				todo = l.tracker.ServiceNames(names)
			}
		}
		if len(todo) > 0 {
			l.plan(f, todo)
		}
		l.setBypass(f)
	}
	return true
}

// setBypass also reports API servers in ServiceCIDRs.
func (l *Loop) setBypass(f *familyLoop) {
	for _, at := range f.planner.setBypass(l.tracker.APIServersInServiceCIDRs(f.family)) {
		found := plan.Problems{Kind: "ServiceCIDR", Object: l.tracker.ServiceCIDROf(at.Addr())}
		found.Add("spec.cidrs", "an API server is at %s, and no Service has that address and port; processes of this node connect to it as if it were outside the range", at)
		for _, p := range found.All() {
			l.opts.Report(p)
		}
	}
}

// checkNode reports a change of whether this node's Node object is missing.
func (l *Loop) checkNode() {
	exists, others := l.tracker.NodeExists()
	missing := !exists && (!l.opts.NodeOptional || len(others) > 0)
	if l.opts.NodeMissing != nil && missing != l.nodeMissing {
		l.opts.NodeMissing(missing, others)
	}
	l.nodeMissing = missing
}

// plan resolves the named Services, and those that gain or lose a frontend then.
func (l *Loop) plan(f *familyLoop, names []plan.ServiceName) {
	r := service.NewResolver(&l.opts.Settings, l.tracker, f.family)
	for len(names) > 0 {
		affected := map[plan.ServiceName]struct{}{}
		for _, name := range names {
			delete(affected, name)
			l.resolved++
			s := r.Resolve(name)
			others, found := f.planner.update(name, s.Created, s.Ports)
			for _, other := range others {
				affected[other] = struct{}{}
			}
			for _, p := range append(found, f.checkSize(name, s.DeclaredPorts, s.TooLarge)...) {
				l.opts.Report(p)
			}
		}
		names = slices.SortedFunc(maps.Keys(affected), plan.ServiceName.Compare)
	}
}

// Plan returns the plan of a family after the last SyncNow, or nil for a family that
// is not served. It belongs to the Loop: read it only between calls.
func (l *Loop) Plan(family plan.Family) *plan.Plan {
	for _, f := range l.families {
		if f.family == family {
			return f.planner.plan
		}
	}
	return nil
}

// Drift says of each family, if other software has changed what signalbox has in the
// kernel, what happens about it.
func (l *Loop) Drift() []string { return l.repairTexts((*drift.Repairs).Condition) }

// Fights is Drift without changes that are repaired at once.
func (l *Loop) Fights() []string { return l.repairTexts((*drift.Repairs).Fight) }

func (l *Loop) repairTexts(of func(*drift.Repairs) string) (texts []string) {
	for _, f := range l.families {
		if text := of(f.repairs); text != "" {
			texts = append(texts, f.family.String()+": "+text)
		}
	}
	return texts
}

// RepairNow has the modes compare what the kernel has, and repair it, before they write
// further changes.
func (l *Loop) RepairNow() {
	for _, f := range l.families {
		f.repairs.RequestNow()
	}
	wait.Wake(l.wake)
}

// LogProblems returns a function for LoopOptions.Report, which logs each Problem as a
// warning.
func LogProblems(log *slog.Logger) func(plan.Problem) {
	return func(p plan.Problem) {
		log.Warn("cannot serve part of an object", "kind", p.Kind, "object", p.Object, "field", p.Field, "reason", p.Reason)
	}
}

// warnOfIgnoredWeights warns once for each Service whose annotations have no effect in
// this mode.
func (l *Loop) warnOfIgnoredWeights(names []plan.ServiceName) {
	if l.opts.Settings.HasSchedulers {
		return
	}
	for _, name := range names {
		if _, told := l.warnedOfWeights[name]; told == l.tracker.SpreadsUnevenly(name) {
			continue
		} else if told {
			delete(l.warnedOfWeights, name)
			continue
		}
		l.warnedOfWeights[name] = struct{}{}
		l.opts.Logger.Warn("annotations for a scheduler or weights have no effect in this mode: new connections are spread evenly; only the mode ipvs has schedulers, and the weight 0 counts everywhere",
			"service", name.String())
	}
}
