// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"signalbox/internal/wait"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

// inbox is the part of a Loop that other goroutines may use. It queues their events
// until a sync reads them.
type inbox struct {
	wake chan struct{} // holds one token while events wait

	mu     sync.Mutex // guards what follows
	events []event
	// dropAt is the number of events at which outdated ones are dropped.
	dropAt int
	addrs  []netip.Addr
	routes []plan.RouteSource
	moved  bool // addrs or routes changed since the last sync read them
	// servers are the addresses and ports to which this process connects for the API
	// server.
	servers   []netip.AddrPort
	fullWrite bool
	synced    bool
	// progress counts no event as waiting before synced, because no sync runs
	// until then.
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
	wait.Wake(b.wake)
}

// SetLocalAddrs sets the addresses of the node's interfaces, of both families.
func (b *inbox) SetLocalAddrs(addrs []netip.Addr) {
	replace(b, &b.addrs, addrs, true)
}

// SetRouteSources sets the source addresses in the node's routes, of both families.
func (b *inbox) SetRouteSources(sources []plan.RouteSource) {
	replace(b, &b.routes, sources, true)
}

// SetAPIServers sets the addresses and ports to which this process connects for the API
// server. Services that have them must not get these connections.
func (b *inbox) SetAPIServers(servers []netip.AddrPort) {
	replace(b, &b.servers, servers, false)
}

// replace sets a list of an inbox. moved says that it is one of the node's addresses.
func replace[T comparable](b *inbox, list *[]T, to []T, moved bool) {
	b.mu.Lock()
	if !slices.Equal(*list, to) {
		*list, b.moved = slices.Clone(to), b.moved || moved
		b.queue()
	}
	b.mu.Unlock()
	wait.Wake(b.wake)
}

// LocalAddrs returns the addresses of the last SetLocalAddrs.
func (b *inbox) LocalAddrs() []netip.Addr {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.addrs)
}

// RequestFullWrite requests a full write, because another program may have changed the
// kernel's state.
func (b *inbox) RequestFullWrite() {
	b.mu.Lock()
	b.fullWrite = true
	b.mu.Unlock()
	wait.Wake(b.wake)
}

// fewestDrops is the least number of events at which an inbox drops outdated ones. Below
// it, each trigger time of an EndpointSlice counts.
const fewestDrops = 256

func (b *inbox) push(e event) {
	b.mu.Lock()
	if len(b.events) >= max(b.dropAt, fewestDrops) {
		b.dropOutdated()
	}
	b.events = append(b.events, e)
	b.progress.count(e.obj)
	b.queue()
	b.mu.Unlock()
	wait.Wake(b.wake)
}

// dropOutdated drops each event that a later one about the same object outdates. Without
// this, the queue of a Loop that is paused, or hangs in a sync, grows with each change. It
// is due again when the queue has doubled, so an event costs the same in a long queue.
func (b *inbox) dropOutdated() {
	type key struct {
		kind            reflect.Type
		namespace, name string
		gone            bool
	}
	later := make(map[key]bool, len(b.events))
	kept := len(b.events)
	for _, e := range slices.Backward(b.events) {
		k := key{kind: reflect.TypeOf(e.obj)}
		if o, ok := e.obj.(metav1.Object); ok {
			k.namespace, k.name = o.GetNamespace(), o.GetName()
		}
		if _, node := e.obj.(*corev1.Node); node {
			k.gone = e.delete // a Node that is gone keeps what was last known of it
		}
		if !later[k] {
			later[k] = true
			kept--
			b.events[kept] = e
		}
	}
	b.events = slices.Delete(b.events, 0, kept)
	b.dropAt = 2 * len(b.events)
}

func (b *inbox) queue() {
	if b.synced {
		b.progress.queue(time.Now())
	}
}

func (b *inbox) finish(held service.ObjectCounts, done []plan.Family) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.progress.finish(held, done)
}

// resume records that a family's Proxier continues with the unwritten slices.
// Each sync of slices is progress, so only one that hangs keeps the family pending.
func (b *inbox) resume(family plan.Family) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.progress.pending[family] = earliest(b.progress.pending[family], time.Now())
}

// batch is what an inbox had queued.
type batch struct {
	events    []event
	addrs     []netip.Addr
	routes    []plan.RouteSource
	moved     bool
	servers   []netip.AddrPort
	fullWrite bool
	synced    bool
	first     bool      // no batch before was synced
	since     time.Time // time of the oldest event; zero for none
}

func (b *inbox) drain() batch {
	b.mu.Lock()
	defer b.mu.Unlock()
	first := b.synced && !b.progress.synced
	d := batch{b.events, b.addrs, b.routes, b.moved, b.servers, b.fullWrite, b.synced, first, b.progress.startSync(b.synced)}
	b.events, b.dropAt, b.moved, b.fullWrite = nil, 0, false, false
	return d
}
