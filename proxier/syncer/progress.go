package syncer

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

// Progress says what a Loop was told and how far it has come with it.
type Progress struct {
	// Held are the objects that count at present.
	Objects service.ObjectCounts
	// Services and EndpointSlices are what the source told of these kinds.
	Services, EndpointSlices EventCounts
	// LastQueued is when something to do last came in; zero for never.
	LastQueued time.Time
	// Pending is for each family that is served since when the oldest update
	// waits that is not in its kernel state; zero where none does. A Service
	// port that the mode refuses holds nothing up.
	Pending map[plan.Family]time.Time
}

// EventCounts counts what came in about objects of one kind.
type EventCounts struct {
	// Total counts additions, changes and deletions since the start.
	Total uint64
	// Pending are those of them that no sync has taken up and ended yet.
	Pending int
}

// progress is Progress as it is kept; its inbox's lock guards it.
type progress struct {
	objects       service.ObjectCounts
	services      EventCounts
	slices        EventCounts
	lastQueued    time.Time
	waitsSince    time.Time                 // the oldest that was not taken; zero for none
	pending       map[plan.Family]time.Time // of what was taken; a key for each family that is served
	takenServices int
	takenSlices   int
}

// told is called with each object that comes in.
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

// queue notes that there is something to do now.
func (p *progress) queue(now time.Time) {
	p.lastQueued = now
	p.waitsSince = earliest(p.waitsSince, now)
}

// take notes that all that waits is being worked on, and returns since when it
// has waited.
func (p *progress) take() (since time.Time) {
	since, p.waitsSince = p.waitsSince, time.Time{}
	for family, pending := range p.pending {
		p.pending[family] = earliest(pending, since)
	}
	p.takenServices, p.takenSlices = p.services.Pending, p.slices.Pending
	return since
}

// settle notes how a sync left things.
func (p *progress) finish(held service.ObjectCounts, done []plan.Family) {
	p.objects = held
	p.services.Pending -= p.takenServices
	p.slices.Pending -= p.takenSlices
	p.takenServices, p.takenSlices = 0, 0
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
		LastQueued: b.progress.lastQueued, Pending: make(map[plan.Family]time.Time, len(b.progress.pending)),
	}
	for family, pending := range b.progress.pending {
		p.Pending[family] = earliest(pending, b.progress.waitsSince)
	}
	return p
}
