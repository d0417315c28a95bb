package proxier

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
)

// LoopOptions is what a Loop is made of.
type LoopOptions struct {
	NodeName string
	Settings Settings
	// Proxiers is the mode at work in each family that is served.
	Proxiers map[Family]Proxier
	// Flows may be nil: then no flow is removed.
	Flows FlowCleaner
	// MinSyncPeriod is the least time from the end of one sync to the begin of
	// the next; 0 for none (a sync is then followed by a pause as long as it
	// took, so that a storm of changes is taken in ever larger batches while a
	// single change never waits).
	MinSyncPeriod time.Duration
	// RetryPeriod bounds the wait before what failed is tried again; 30 s when
	// zero.
	RetryPeriod time.Duration
	// Logger is slog.Default() when nil.
	Logger *slog.Logger
	// Report is told what in an object cannot be served; by default it is
	// logged as a warning.
	Report func(Problem)
	// Synced is told of every Sync; may be nil.
	Synced func(SyncReport)
}

// SyncReport says what one sync of one family did.
type SyncReport struct {
	Family   Family
	Took     time.Duration
	Services int  // Service ports written or removed
	All      bool // everything was written anew
	SetAside int  // Service ports that the mode refuses, in all
	Err      error
}

// Loop feeds objects through Tracker and resolver into the Proxiers. It is a
// Sink: Apply, Delete, Synced and SetLocalAddrs may be called from any
// goroutine; everything else belongs to the one that calls Run or SyncNow.
type Loop struct {
	opts LoopOptions

	mu     sync.Mutex // guards what follows
	queue  []event
	addrs  []netip.Addr
	moved  bool // addrs changed since they were last taken
	synced bool
	wake   chan struct{} // holds one token while there is something to take

	tracker  *Tracker
	local    []netip.Addr
	settled  bool // the source has synced and its objects were taken
	families []*familyLoop
}

type event struct {
	obj    runtime.Object
	delete bool
}

// NewLoop returns a Loop that waits for its source's Synced.
func NewLoop(opts LoopOptions) *Loop {
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}
	if opts.Report == nil {
		opts.Report = func(p Problem) {
			opts.Logger.Warn("cannot serve part of an object", "kind", p.Kind, "object", p.Object, "field", p.Field, "reason", p.Reason)
		}
	}
	if opts.RetryPeriod == 0 {
		opts.RetryPeriod = 30 * time.Second
	}
	l := &Loop{opts: opts, tracker: NewTracker(opts.NodeName), wake: make(chan struct{}, 1)}
	for _, family := range Families {
		if p := opts.Proxiers[family]; p != nil {
			l.families = append(l.families, newFamilyLoop(family, p, &l.opts))
		}
	}
	return l
}

// Apply implements Sink.
func (l *Loop) Apply(obj runtime.Object) { l.push(event{obj: obj}) }

// Delete implements Sink.
func (l *Loop) Delete(obj runtime.Object) { l.push(event{obj: obj, delete: true}) }

// Synced implements Sink.
func (l *Loop) Synced() {
	l.mu.Lock()
	l.synced = true
	l.mu.Unlock()
	l.wakeUp()
}

// SetLocalAddrs tells the addresses that the node's interfaces have, of both
// families.
func (l *Loop) SetLocalAddrs(addrs []netip.Addr) {
	l.mu.Lock()
	l.addrs, l.moved = addrs, true
	l.mu.Unlock()
	l.wakeUp()
}

// LocalAddrs returns what SetLocalAddrs was last told. Any goroutine may ask.
func (l *Loop) LocalAddrs() []netip.Addr {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.addrs
}

func (l *Loop) push(e event) {
	l.mu.Lock()
	l.queue = append(l.queue, e)
	l.mu.Unlock()
	l.wakeUp()
}

func (l *Loop) wakeUp() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Run syncs until ctx is done and returns nil then. A change that arrives
// while nothing else happens is synced at once.
func (l *Loop) Run(ctx context.Context) error {
	retry := time.NewTimer(0)
	retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-l.wake:
		case <-retry.C:
		}
		began := time.Now()
		_ = l.sync(ctx, false) // each failure was reported where it happened
		retry.Stop()
		if due, ok := l.nextRetry(); ok {
			retry.Reset(time.Until(due))
		}
		if !pause(ctx, max(l.opts.MinSyncPeriod, min(time.Since(began), time.Second))) {
			return nil
		}
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// nextRetry is when something that failed is due again.
func (l *Loop) nextRetry() (due time.Time, ok bool) {
	for _, f := range l.families {
		if !f.retryAt.IsZero() && (!ok || f.retryAt.Before(due)) {
			due, ok = f.retryAt, true
		}
	}
	return due, ok
}

// SyncNow takes all that is queued and makes every family's Proxier do it,
// whatever waiting periods say. It returns what failed, joined; each failure
// was also reported, and stays due.
func (l *Loop) SyncNow(ctx context.Context) error { return l.sync(ctx, true) }

func (l *Loop) sync(ctx context.Context, urgent bool) error {
	if !l.take() {
		return nil
	}
	var failed []error
	for _, f := range l.families {
		failed = append(failed, f.sync(ctx, urgent))
	}
	return errors.Join(failed...)
}

// take brings the plans up to date with what is queued, and says whether they
// are complete: Services and EndpointSlices were listed.
func (l *Loop) take() bool {
	l.mu.Lock()
	queue, synced, moved := l.queue, l.synced, l.moved
	if moved {
		l.local = l.addrs
	}
	l.queue, l.moved = nil, false
	l.mu.Unlock()

	for _, e := range queue {
		if e.delete {
			l.tracker.Delete(e.obj)
			continue
		}
		for _, p := range l.tracker.Apply(e.obj) {
			l.opts.Report(p)
		}
	}
	if !synced {
		return false
	}
	first := !l.settled
	l.settled = true
	names, node := l.tracker.takeDirty()
	if node || moved || first {
		for _, f := range l.families {
			f.planner.setNode(l.tracker.nodeValue(&l.opts.Settings, f.family, l.local))
		}
		names = l.affectedByNode(names, node)
	}
	l.plan(names)
	return true
}

// affectedByNode adds the Services whose masquerade depends on whether local
// Pods can be told apart, where the answer to that may have changed.
func (l *Loop) affectedByNode(names []ServiceName, node bool) []ServiceName {
	if !node || l.opts.Settings.DetectLocal != DetectLocalNodeCIDR {
		return names
	}
	return l.tracker.serviceNames()
}

// plan resolves the named Services and those whose frontends they gain or
// lose, until nothing changes hands any more.
func (l *Loop) plan(names []ServiceName) {
	r := newResolver(l.opts.Settings, l.tracker)
	for _, f := range l.families {
		for todo := slices.Clone(names); len(todo) > 0; todo = todo[1:] {
			name := todo[0]
			svc := l.tracker.services[name]
			var since int64
			if svc != nil && !svc.created.IsZero() {
				since = svc.created.Unix()
			}
			again, found := f.planner.update(name, since, r.resolve(svc, l.tracker.slices[name], f.family))
			todo = append(todo, again...)
			for _, p := range found {
				l.opts.Report(p)
			}
		}
	}
}

// Plan returns the plan of a family as the last SyncNow left it, or nil for a
// family that is not served. It is the Loop's own: to be read between calls.
func (l *Loop) Plan(family Family) *Plan {
	for _, f := range l.families {
		if f.family == family {
			return f.planner.plan
		}
	}
	return nil
}
