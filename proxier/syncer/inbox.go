package syncer

import (
	"net/netip"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime"

	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

// inbox is the side of a Loop that other goroutines see: what they told it,
// until it is taken.
type inbox struct {
	wake chan struct{} // holds one token while there is something to take

	mu     sync.Mutex // guards what follows
	events []event
	addrs  []netip.Addr
	routes []plan.RouteSource
	moved  bool // addrs or routes changed since they were last taken
	resync bool
	synced bool
	// progress has nothing wait before synced: until then there is nothing to
	// do.
	progress progress
}

type event struct {
	obj    runtime.Object
	delete bool
}

// Apply implements Sink.
func (b *inbox) Apply(obj runtime.Object) { b.push(event{obj: obj}) }

// Delete implements Sink.
func (b *inbox) Delete(obj runtime.Object) { b.push(event{obj: obj, delete: true}) }

// Synced implements Sink.
func (b *inbox) Synced() {
	b.mu.Lock()
	b.synced = true
	b.progress.queue(time.Now())
	b.mu.Unlock()
	b.wakeUp()
}

// SetLocalAddrs tells the addresses that the node's interfaces have, of both
// families.
func (b *inbox) SetLocalAddrs(addrs []netip.Addr) {
	b.mu.Lock()
	if !slices.Equal(b.addrs, addrs) {
		b.addrs, b.moved = slices.Clone(addrs), true
		b.queue()
	}
	b.mu.Unlock()
	b.wakeUp()
}

// SetRouteSources tells the sources that the node's routes name, of both families.
func (b *inbox) SetRouteSources(sources []plan.RouteSource) {
	b.mu.Lock()
	if !slices.Equal(b.routes, sources) {
		b.routes, b.moved = slices.Clone(sources), true
		b.queue()
	}
	b.mu.Unlock()
	b.wakeUp()
}

// LocalAddrs returns what SetLocalAddrs was last told.
func (b *inbox) LocalAddrs() []netip.Addr {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.addrs)
}

// Resync has everything written anew: somebody else may have changed what is
// in the kernel.
func (b *inbox) Resync() {
	b.mu.Lock()
	b.resync = true
	b.mu.Unlock()
	b.wakeUp()
}

func (b *inbox) push(e event) {
	b.mu.Lock()
	b.events = append(b.events, e)
	b.progress.count(e.obj)
	b.queue()
	b.mu.Unlock()
	b.wakeUp()
}

func (b *inbox) queue() {
	if b.synced {
		b.progress.queue(time.Now())
	}
}

func (b *inbox) wakeUp() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

func (b *inbox) finish(held service.ObjectCounts, done []plan.Family) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.progress.finish(held, done)
}

// resume notes that a family's Proxier goes on with what its last sync has left.
// Each sync of slices is progress: only one that hangs keeps the family pending.
func (b *inbox) resume(family plan.Family) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.progress.pending[family] = earliest(b.progress.pending[family], time.Now())
}

// delivery is what an inbox held.
type batch struct {
	events []event
	addrs  []netip.Addr
	routes []plan.RouteSource
	moved  bool
	resync bool
	synced bool
	since  time.Time // when the oldest of it came in; zero for nothing
}

func (b *inbox) drain() batch {
	b.mu.Lock()
	defer b.mu.Unlock()
	d := batch{b.events, b.addrs, b.routes, b.moved, b.resync, b.synced, b.progress.take()}
	b.events, b.moved, b.resync = nil, false, false
	return d
}
