// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

// Progress says what a Loop got from its source, and what of it is synced.
type Progress struct {
	// Objects counts the objects that exist now.
	Objects service.ObjectCounts
	// Services and EndpointSlices count the events of these kinds.
	Services, EndpointSlices EventCounts
	// LastQueued is the time of the last event; zero for never.
	LastQueued time.Time
	// Pending has, for each served family, the time of the oldest update that is
	// not in the kernel; zero if all are. A quarantined Service port does not
	// count.
	Pending map[plan.Family]time.Time
	// Synced says that the source has told all objects that exist, and that a sync has
	// read them. Before, nothing is written.
	Synced bool
}

// EventCounts counts the events about objects of one kind.
type EventCounts struct {
	// Total counts additions, changes and deletions since the start.
	Total uint64
	// Pending counts the events that no finished sync has read.
	Pending int
}

// progress is the state behind Progress. The inbox's lock guards it.
type progress struct {
	objects        service.ObjectCounts
	services       EventCounts
	slices         EventCounts
	lastQueued     time.Time
	waitsSince     time.Time                 // the oldest event that no sync has read; zero for none
	pending        map[plan.Family]time.Time // of the events that a sync has read; a key for each served family
	servicesInSync int
	slicesInSync   int
	synced         bool
}

// count counts an event.
func (p *progress) count(obj runtime.Object) {
	switch obj.(type) {
	case *corev1.Service:
		p.services.Total++
		p.services.Pending++
	case *discoveryv1.EndpointSlice:
		p.slices.Total++
		p.slices.Pending++
	}
}

// queue records that an event waits for a sync.
func (p *progress) queue(now time.Time) {
	p.lastQueued = now
	p.waitsSince = earliest(p.waitsSince, now)
}

// startSync records that a sync has read all events, and whether these are about all
// objects. It returns the time of the oldest.
func (p *progress) startSync(synced bool) (since time.Time) {
	p.synced = synced
	since, p.waitsSince = p.waitsSince, time.Time{}
	for family, pending := range p.pending {
		p.pending[family] = earliest(pending, since)
	}
	p.servicesInSync, p.slicesInSync = p.services.Pending, p.slices.Pending
	return since
}

// finish records the result of a sync.
func (p *progress) finish(held service.ObjectCounts, done []plan.Family) {
	p.objects = held
	p.services.Pending -= p.servicesInSync
	p.slices.Pending -= p.slicesInSync
	p.servicesInSync, p.slicesInSync = 0, 0
	for _, family := range done {
		p.pending[family] = time.Time{}
	}
}

// earliest of two times, where zero is no time.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// Progress may be called by any goroutine, also while a sync hangs.
func (b *inbox) Progress() Progress {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := Progress{
		Objects: b.progress.objects, Services: b.progress.services, EndpointSlices: b.progress.slices,
		LastQueued: b.progress.lastQueued, Pending: make(map[plan.Family]time.Time, len(b.progress.pending)), Synced: b.progress.synced,
	}
	for family, pending := range b.progress.pending {
		p.Pending[family] = earliest(pending, b.progress.waitsSince)
	}
	return p
}
