package userspace

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"signalbox/proxier"
)

// target is what the relay knows of a frontend. It is never changed, only
// replaced.
type target struct {
	id         frontendID
	name       proxier.ServicePortName
	timeout    time.Duration // of affinity; 0 without
	internal   *proxier.EndpointSet
	external   *proxier.EndpointSet
	serving    *proxier.EndpointSet
	masquerade proxier.Origins
}

// endpoints is the set for connections of an origin.
func (t *target) endpoints(o origin) *proxier.EndpointSet {
	if o.inside() {
		return t.internal
	}
	return t.external
}

// has says whether an endpoint is one of a set.
func has(s *proxier.EndpointSet, at netip.AddrPort) bool {
	if s == nil {
		return false
	}
	_, found := slices.BinarySearchFunc(s.Endpoints, at, func(e proxier.Endpoint, at netip.AddrPort) int { return e.AddrPort.Compare(at) })
	return found
}

// targets finds the frontend by its number.
type targets struct {
	mu   sync.RWMutex
	byID map[frontendID]*target
	gone map[frontendID]goneTarget
}

// goneTarget is a frontend that is not in the kernel's rules any more.
type goneTarget struct {
	*target
	until time.Time
}

// handshakeTime is how long after its frontend has gone a connection may still
// arrive that was captured before.
const handshakeTime = 30 * time.Second

// find returns the frontend's target, or nil. With late it looks also among
// those that are gone, but not for long.
func (ts *targets) find(id frontendID, late bool) *target {
	ts.mu.RLock()
	defer ts.mu.RUnlock()
	if t := ts.byID[id]; t != nil || !late {
		return t
	}
	return ts.gone[id].target
}

// announce adds targets that are new. The rest is for put, after the kernel has
// taken the change.
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

// clients remembers which endpoint each client of a Service port with session
// affinity has.
type clients struct {
	mu      sync.Mutex
	entries map[clientKey]*clientEntry
}

type clientKey struct {
	service proxier.ServicePortName
	addr    netip.Addr
}

type clientEntry struct {
	endpoint netip.AddrPort
	until    time.Time
}

// maxClients bounds the memory that clients can take up. One that finds no room
// is served as though there were no affinity.
const maxClients = 1 << 18

// health knows which endpoints fail.
type health struct {
	failing atomic.Int32 // endpoints that are passed over, or were of late
	mu      sync.Mutex
	records map[peer]*failures
}

// peer is an endpoint as one protocol reaches it. What listens at the same port
// of the other may be well.
type peer struct {
	protocol proxier.Protocol
	at       netip.AddrPort
}

type failures struct {
	count int
	until time.Time // passed over
	since time.Time // of the last failure
}

// An endpoint that has failed failuresToPass times in a row is passed over,
// first for firstPass, and after each further failure for twice as long.
const (
	failuresToPass = 3
	firstPass      = time.Second
	longestPass    = 30 * time.Second
	// forgetFailures is after how long without a failure all is forgotten.
	forgetFailures = 2 * time.Minute
)

// failed notes that an endpoint did not answer.
func (h *health) failed(at peer, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.records[at]
	if r == nil {
		r = &failures{}
		h.records[at] = r
		h.failing.Add(1)
	}
	r.count++
	r.since = now
	if over := r.count - failuresToPass; over >= 0 {
		r.until = now.Add(min(firstPass<<min(over, 10), longestPass))
	}
}

// answered notes that an endpoint did answer.
func (h *health) answered(at peer) {
	if h.failing.Load() == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.forget(at)
}

func (h *health) forget(at peer) {
	if h.records[at] != nil {
		delete(h.records, at)
		h.failing.Add(-1)
	}
}

// passedOver says whether others are to be preferred to the endpoint.
func (h *health) passedOver(at peer, now time.Time) bool {
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
		if now.Sub(r.since) > forgetFailures {
			h.forget(at)
		}
	}
}

// chooser picks endpoints.
type chooser struct {
	clients clients
	health  health
}

func newChooser() *chooser {
	return &chooser{
		clients: clients{entries: map[clientKey]*clientEntry{}},
		health:  health{records: map[peer]*failures{}},
	}
}

// choose picks an endpoint of set for a client, none of those that were tried.
// With session affinity the choice is remembered at once, so that two
// connections that a client opens at a time go to the same.
func (c *chooser) choose(t *target, set *proxier.EndpointSet, client netip.Addr, tried []netip.AddrPort, now time.Time) (netip.AddrPort, bool) {
	if t.timeout == 0 {
		return c.draw(t.name.Protocol, set, tried, now)
	}
	c.clients.mu.Lock()
	defer c.clients.mu.Unlock()
	key := clientKey{t.name, client}
	e := c.clients.entries[key]
	if e != nil && now.Before(e.until) && has(set, e.endpoint) && !slices.Contains(tried, e.endpoint) && !c.health.passedOver(peer{t.name.Protocol, e.endpoint}, now) {
		e.until = now.Add(t.timeout)
		return e.endpoint, true
	}
	at, ok := c.draw(t.name.Protocol, set, tried, now)
	switch {
	case !ok:
	case e != nil:
		e.endpoint, e.until = at, now.Add(t.timeout)
	case len(c.clients.entries) < maxClients:
		c.clients.entries[key] = &clientEntry{at, now.Add(t.timeout)}
	}
	return at, ok
}

// draw picks at random, evenly among those that do not fail.
func (c *chooser) draw(p proxier.Protocol, set *proxier.EndpointSet, tried []netip.AddrPort, now time.Time) (netip.AddrPort, bool) {
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
		case c.health.passedOver(peer{p, e.AddrPort}, now):
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

// expire forgets clients whose time is over.
func (c *chooser) expire(now time.Time) {
	c.health.expire(now)
	c.clients.mu.Lock()
	defer c.clients.mu.Unlock()
	for k, e := range c.clients.entries {
		if !now.Before(e.until) {
			delete(c.clients.entries, k)
		}
	}
}
