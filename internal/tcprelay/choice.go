// SPDX-License-Identifier: Apache-2.0

package tcprelay

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"signalbox/proxier/plan"
)

// Choice are the endpoints for a client.
type Choice struct {
	Name      plan.ServicePortName
	Affinity  time.Duration // 0 without
	Endpoints *plan.EndpointSet
}

// clients holds the endpoint of each client of a Service port with session affinity.
type clients struct {
	mu      sync.Mutex
	entries map[clientKey]*clientEntry
}

type clientKey struct {
	service plan.ServicePortName
	addr    netip.Addr
}

type clientEntry struct {
	endpoint netip.AddrPort
	until    time.Time
}

// maxClients bounds the memory for clients. Beyond it, clients are served without
// affinity.
const maxClients = 1 << 18

// health holds the endpoints that fail.
type health struct {
	failing atomic.Int32 // length of records, readable without the lock
	mu      sync.Mutex
	records map[Peer]*failures
}

// Peer is an endpoint with the protocol. The same port of the other protocol may be
// healthy.
type Peer struct {
	Protocol plan.Protocol
	At       netip.AddrPort
}

type failures struct {
	count int
	until time.Time // unhealthy until then
	last  time.Time
}

// An endpoint that has failed UnhealthyAfter times in a row is unhealthy, first for
// firstUnhealthy, then after each failure for twice as long, up to MaxUnhealthy.
const (
	UnhealthyAfter = 3
	firstUnhealthy = time.Second
	MaxUnhealthy   = 30 * time.Second
	// forgetFailures is the time without a failure after which the record is removed.
	forgetFailures = 2 * time.Minute
)

// failed records that an endpoint did not answer.
func (h *health) failed(at Peer, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.records[at]
	if r == nil {
		r = &failures{}
		h.records[at] = r
		h.failing.Add(1)
	}
	r.count++
	r.last = now
	if over := r.count - UnhealthyAfter; over >= 0 {
		r.until = now.Add(min(firstUnhealthy<<min(over, 10), MaxUnhealthy))
	}
}

// answered removes the record of an endpoint.
func (h *health) answered(at Peer) {
	if h.failing.Load() == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.forget(at)
}

func (h *health) forget(at Peer) {
	if h.records[at] != nil {
		delete(h.records, at)
		h.failing.Add(-1)
	}
}

// unhealthy says whether to try other endpoints first.
func (h *health) unhealthy(at Peer, now time.Time) bool {
	if h.failing.Load() == 0 {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.records[at]
	return r != nil && now.Before(r.until)
}

func (h *health) expire(now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for at, r := range h.records {
		if now.Sub(r.last) > forgetFailures {
			h.forget(at)
		}
	}
}

// Chooser picks endpoints: at random, evenly among the healthy ones, and for clients
// with session affinity the same as before.
type Chooser struct {
	clients clients
	health  health
}

// NewChooser returns an empty Chooser.
func NewChooser() *Chooser {
	return &Chooser{
		clients: clients{entries: map[clientKey]*clientEntry{}},
		health:  health{records: map[Peer]*failures{}},
	}
}

// Choose picks an endpoint for a client, none of those that were tried.
// With session affinity it records the choice at once, so that simultaneous
// connections of a client go to the same endpoint.
func (c *Chooser) Choose(from Choice, client netip.Addr, tried []netip.AddrPort, now time.Time) (netip.AddrPort, bool) {
	if from.Affinity == 0 {
		return c.draw(from.Name.Protocol, from.Endpoints, tried, now)
	}
	c.clients.mu.Lock()
	defer c.clients.mu.Unlock()
	key := clientKey{from.Name, client}
	e := c.clients.entries[key]
	if e != nil && now.Before(e.until) && from.Endpoints.Contains(e.endpoint) && !slices.Contains(tried, e.endpoint) && !c.health.unhealthy(Peer{from.Name.Protocol, e.endpoint}, now) {
		e.until = now.Add(from.Affinity)
		return e.endpoint, true
	}
	at, ok := c.draw(from.Name.Protocol, from.Endpoints, tried, now)
	switch {
	case !ok:
	case e != nil:
		e.endpoint, e.until = at, now.Add(from.Affinity)
	case len(c.clients.entries) < maxClients:
		c.clients.entries[key] = &clientEntry{at, now.Add(from.Affinity)}
	}
	return at, ok
}

// draw picks at random, evenly among the healthy endpoints, or among all if none is.
func (c *Chooser) draw(p plan.Protocol, set *plan.EndpointSet, tried []netip.AddrPort, now time.Time) (netip.AddrPort, bool) {
	if set.Len() == 0 {
		return netip.AddrPort{}, false
	}
	if len(tried) == 0 && c.health.failing.Load() == 0 {
		return set.Endpoints[rand.IntN(set.Len())].AddrPort, true
	}
	var good, bad []netip.AddrPort
	for _, e := range set.Endpoints {
		switch {
		case slices.Contains(tried, e.AddrPort):
		case c.health.unhealthy(Peer{p, e.AddrPort}, now):
			bad = append(bad, e.AddrPort)
		default:
			good = append(good, e.AddrPort)
		}
	}
	if len(good) == 0 {
		good = bad
	}
	if len(good) == 0 {
		return netip.AddrPort{}, false
	}
	return good[rand.IntN(len(good))], true
}

// Expire removes expired failures and clients.
func (c *Chooser) Expire(now time.Time) {
	c.health.expire(now)
	c.clients.mu.Lock()
	defer c.clients.mu.Unlock()
	for k, e := range c.clients.entries {
		if !now.Before(e.until) {
			delete(c.clients.entries, k)
		}
	}
}

// Failed records that an endpoint did not answer.
func (c *Chooser) Failed(at Peer, now time.Time) { c.health.failed(at, now) }

// Answered records that an endpoint answered.
func (c *Chooser) Answered(at Peer) { c.health.answered(at) }
