package service

import (
	"net/netip"
	"slices"
	"unique"

	"signalbox/proxier/plan"
)

// candidate is an endpoint of one Service port, merged from its slices.
type candidate struct {
	addr   netip.AddrPort
	weight uint16 // share of new connections; 0 for none
	from   *sliceEndpoint
}

// candidates merges the slices of one family for one Service port, sorted by
// address and port. An address and port that several slices name counts once:
// an entry that is not terminating goes before one that is, a ready one before
// one that is not, and otherwise the first slice by name wins. What no slice
// says about weights is said by weights.
func candidates(filed []*endpointSlice, family plan.Family, portName string, protocol plan.Protocol, weights weightRules) []candidate {
	var all []candidate
	for _, s := range filed {
		if s.family != family {
			continue
		}
		for _, port := range s.ports {
			if port.name != portName || port.protocol != protocol {
				continue
			}
			all = slices.Grow(all, len(s.endpoints))
			for i := range s.endpoints {
				e := &s.endpoints[i]
				all = append(all, candidate{netip.AddrPortFrom(e.addr, port.port), e.weightBy(weights), e})
			}
		}
	}
	slices.SortStableFunc(all, func(a, b candidate) int {
		if c := a.addr.Compare(b.addr); c != 0 {
			return c
		}
		return a.rank() - b.rank()
	})
	return slices.CompactFunc(all, func(a, b candidate) bool { return a.addr == b.addr })
}

func (e *sliceEndpoint) weightBy(service weightRules) uint16 {
	if e.weighted {
		return e.weight
	}
	if w, said := service.of(e.addr, e.target); said {
		return w
	}
	return 1
}

func (c candidate) rank() int {
	switch {
	case c.from.terminating:
		return 2
	case !c.from.ready:
		return 1
	}
	return 0
}

// draining is an endpoint on its way out that still answers (KEP-1669).
func (c candidate) draining() bool { return c.from.serving && c.from.terminating }

// selection is what the endpoints of one Service port mean on one node.
type selection struct {
	cluster *plan.EndpointSet // for traffic policy Cluster
	local   *plan.EndpointSet // for traffic policy Local
	usable  *plan.EndpointSet // all that still answer
	// exists says that some node has an endpoint for new connections.
	exists bool
}

// locality is where endpoints are seen from.
type locality struct {
	node unique.Handle[string]
	zone unique.Handle[string]
	// weighs says that the mode gives endpoints different shares.
	weighs bool
}

var unnamed = unique.Make("")

func (l locality) isLocal(c candidate) bool { return c.from.node == l.node && l.node != unnamed }

// choose applies readiness, termination and topology. An endpoint of weight 0
// is none for new connections, and keeps what it has. Of other nodes' endpoints
// remoteHairpins says whether they may hairpin.
func (l locality) choose(all []candidate, remoteHairpins bool) selection {
	ready := filter(all, func(c candidate) bool { return c.from.ready && c.weight > 0 })
	draining := filter(all, func(c candidate) bool { return c.draining() && c.weight > 0 })

	cluster := l.closest(ready)
	if len(cluster) == 0 {
		cluster = draining
	}
	local := filter(ready, l.isLocal)
	if len(local) == 0 {
		local = filter(draining, l.isLocal)
	}
	set := func(chosen []candidate) *plan.EndpointSet { return l.set(chosen, remoteHairpins) }
	s := selection{cluster: set(cluster), exists: len(ready) > 0 || len(draining) > 0}
	share := func(chosen []candidate) *plan.EndpointSet {
		if slices.Equal(chosen, cluster) {
			return s.cluster
		}
		return set(chosen)
	}
	s.local = share(local)
	s.usable = share(filter(all, func(c candidate) bool { return c.from.serving || c.from.ready }))
	return s
}

// appendReady appends the addresses of this node's ready endpoints. One that
// drains does not count, though it may still get traffic: a load balancer that
// was told of it would go on sending here until the last moment. Nor does one of
// weight 0, which gets none.
func (l locality) appendReady(to []netip.Addr, all []candidate) []netip.Addr {
	for _, c := range all {
		if c.from.ready && c.weight > 0 && l.isLocal(c) {
			to = append(to, c.addr.Addr())
		}
	}
	return to
}

func distinct(addrs []netip.Addr) int {
	slices.SortFunc(addrs, netip.Addr.Compare)
	return len(slices.Compact(addrs))
}

// closest narrows ready endpoints down to those that hints name for this node,
// else for its zone. A hint counts only where every ready endpoint carries one
// of its kind: a slice without is still being updated, or too old for it.
func (l locality) closest(ready []candidate) []candidate {
	for _, near := range []struct {
		hints func(candidate) []unique.Handle[string]
		here  unique.Handle[string]
	}{
		{func(c candidate) []unique.Handle[string] { return c.from.hints.forNodes() }, l.node},
		{func(c candidate) []unique.Handle[string] { return c.from.hints.forZones() }, l.zone},
	} {
		if near.here == unnamed || slices.ContainsFunc(ready, func(c candidate) bool { return len(near.hints(c)) == 0 }) {
			continue
		}
		if chosen := filter(ready, func(c candidate) bool { return slices.Contains(near.hints(c), near.here) }); len(chosen) > 0 {
			return chosen
		}
	}
	return ready
}

// set takes an endpoint of which no slice says where it runs for one that may
// be anybody's client.
func (l locality) set(chosen []candidate, remoteHairpins bool) *plan.EndpointSet {
	if len(chosen) == 0 {
		return plan.NoEndpoints
	}
	s := &plan.EndpointSet{Endpoints: make([]plan.Endpoint, len(chosen))}
	for i, c := range chosen {
		s.Endpoints[i] = plan.Endpoint{AddrPort: c.addr, MayHairpin: remoteHairpins || c.from.node == l.node || c.from.node == unnamed}
		if l.weighs && c.weight > 1 {
			s.Endpoints[i].Weight = c.weight
		}
	}
	return s
}

// filter returns all itself where everything is kept.
func filter(all []candidate, keep func(candidate) bool) []candidate {
	first := slices.IndexFunc(all, func(c candidate) bool { return !keep(c) })
	if first < 0 {
		return all
	}
	out := slices.Clone(all[:first])
	for _, c := range all[first+1:] {
		if keep(c) {
			out = append(out, c)
		}
	}
	return out
}
