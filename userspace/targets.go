// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"sync"
	"time"

	"signalbox/internal/tcprelay"
	"signalbox/proxier/plan"
)

// target is the relay's form of a frontend. It is immutable.
type target struct {
	id         frontendID
	name       plan.ServicePortName
	timeout    time.Duration // of affinity; 0 without
	internal   *plan.EndpointSet
	external   *plan.EndpointSet
	usable     *plan.EndpointSet
	masquerade plan.TrafficSources
}

// endpoints is the set for connections of a traffic source.
func (t *target) endpoints(o trafficSource) *plan.EndpointSet {
	if o.inside() {
		return t.internal
	}
	return t.external
}

// choice are the endpoints for a client of a traffic source.
func (t *target) choice(o trafficSource) tcprelay.Choice {
	return tcprelay.Choice{Name: t.name, Affinity: t.timeout, Endpoints: t.endpoints(o)}
}

// targets finds the frontend by its number.
type targets struct {
	mu   sync.RWMutex
	byID map[frontendID]*target
	gone map[frontendID]goneTarget
}

// goneTarget is a frontend that the kernel's rules no longer have.
type goneTarget struct {
	*target
	until time.Time
}

// handshakeTime is how long after the end of its frontend a connection may still
// arrive that was redirected before.
const handshakeTime = 30 * time.Second

// find returns the frontend's target, or nil. With late it also finds frontends
// that ended less than handshakeTime ago.
func (ts *targets) find(id frontendID, late bool) *target {
	ts.mu.RLock()
	defer ts.mu.RUnlock()
	if t := ts.byID[id]; t != nil || !late {
		return t
	}
	return ts.gone[id].target
}

// announce adds new targets before the kernel has their rules. put or replace
// follows when it has, withdraw when the change failed.
func (ts *targets) announce(list []*target) (added []frontendID) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for _, t := range list {
		if ts.byID[t.id] == nil {
			ts.byID[t.id] = t
			added = append(added, t.id)
		}
	}
	return added
}

func (ts *targets) withdraw(added []frontendID) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for _, id := range added {
		delete(ts.byID, id)
	}
}

func (ts *targets) put(list []*target, gone []frontendID, now time.Time) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for _, t := range list {
		ts.byID[t.id] = t
	}
	for _, id := range gone {
		if t := ts.byID[id]; t != nil {
			ts.gone[id] = goneTarget{t, now.Add(handshakeTime)}
			delete(ts.byID, id)
		}
	}
}

// replace is put for everything: what is not listed is gone.
func (ts *targets) replace(list []*target, now time.Time) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	old := ts.byID
	ts.byID = make(map[frontendID]*target, len(list))
	for _, t := range list {
		ts.byID[t.id] = t
		delete(old, t.id)
	}
	for id, t := range old {
		ts.gone[id] = goneTarget{t, now.Add(handshakeTime)}
	}
}

func (ts *targets) expire(now time.Time) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for id, t := range ts.gone {
		if now.After(t.until) {
			delete(ts.gone, id)
		}
	}
}
