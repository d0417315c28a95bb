// SPDX-License-Identifier: Apache-2.0

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
func candidates(filed []*endpointSlice, family plan.Family, portName string, protocol plan.Protocol, weights weightRules, why *Reasons) []candidate {
	var all []candidate
	for _, s := range filed {
		if s.family != family {
			why.leaveOutSlice(s, plan.OtherFamily)
			continue
		}
		found := false
		for _, port := range s.ports {
			if port.name != portName || port.protocol != protocol {
				continue
			}
			found = true
			all = slices.Grow(all, len(s.endpoints))
			for i := range s.endpoints {
				e := &s.endpoints[i]
				all = append(all, candidate{netip.AddrPortFrom(e.addr, port.port), e.weightBy(weights), e})
			}
		}
		if !found {
			why.leaveOutSlice(s, plan.NoSuchPort)
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

// state is an endpoint's own part in the decision about new connections. One that is
// terminating and still answers (KEP-1669) gets them where none is ready. One of
// weight 0 gets none, and keeps what it has.
func (c candidate) state() plan.Reason {
	switch draining := c.from.serving && c.from.terminating; {
	case c.weight == 0 && (c.from.ready || draining):
		return plan.WeightZero
	case c.from.ready:
		return plan.Ready
	case draining:
		return plan.Terminating
	case c.from.terminating:
		return plan.NotServing
	}
	return plan.NotReady
}

// selection is what the endpoints of one Service port mean on one node.
type selection struct {
	cluster *plan.EndpointSet // for traffic policy Cluster
	local   *plan.EndpointSet // for traffic policy Local
	usable  *plan.EndpointSet // all that still answer
	listed  *plan.EndpointSet // see plan.ServicePort.Listed
	// exists says that some node has an endpoint for new connections.
	exists bool
}

// locality is where endpoints are seen from.
type locality struct {
	node unique.Handle[string]
	zone unique.Handle[string]
	// weighs says that the mode gives endpoints different shares.
	weighs bool
	// lists says that all endpoints are wanted too.
	lists bool
}

var unnamed = unique.Make("")

func (l locality) isLocal(c candidate) bool { return c.from.node == l.node && l.node != unnamed }

// choose applies readiness, termination and topology. Of other nodes' endpoints
// remoteHairpins says whether they may hairpin.
func (l locality) choose(all []candidate, remoteHairpins bool, why *Reasons) selection {
	cluster, ready := answering(all, why.cluster())
	if ready {
		cluster = l.closest(cluster, why)
	}
	why.local().addWithout(all, l.isLocal, plan.OtherNode)
	local, _ := answering(filter(all, l.isLocal), why.local())

	set := func(chosen []candidate) *plan.EndpointSet { return l.set(chosen, remoteHairpins) }
	s := selection{cluster: set(cluster), exists: len(cluster) > 0}
	share := func(chosen []candidate) *plan.EndpointSet {
		if slices.Equal(chosen, cluster) {
			return s.cluster
		}
		return set(chosen)
	}
	s.local = share(local)
	s.usable = share(filter(all, func(c candidate) bool { return c.from.serving || c.from.ready }))
	if l.lists {
		s.listed = share(all)
	}
	return s
}

// answering returns the endpoints that are ready, or if there are none, those that
// drain.
func answering(all []candidate, why EndpointReasons) (chosen []candidate, ready bool) {
	chosen = filter(all, func(c candidate) bool { return c.state() == plan.Ready })
	if ready = len(chosen) > 0; !ready {
		chosen = filter(all, func(c candidate) bool { return c.state() == plan.Terminating })
	}
	why.addStates(all, ready)
	return chosen, ready
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
// else for its zone.
func (l locality) closest(ready []candidate, why *Reasons) []candidate {
	for _, near := range []place{
		{"node", l.node, func(c candidate) []unique.Handle[string] { return c.from.hints.forNodes() }, plan.OtherNodeHint},
		{"zone", l.zone, func(c candidate) []unique.Handle[string] { return c.from.hints.forZones() }, plan.OtherZoneHint},
	} {
		chosen, reason := near.narrow(ready)
		why.tried(ready, near, reason)
		if reason == plan.HintsUsed {
			return chosen
		}
	}
	return ready
}

// narrow keeps the endpoints that hints name for a place. A hint counts only where
// every ready endpoint carries one of its kind: a slice without is still being
// updated, or too old for it.
func (p place) narrow(ready []candidate) ([]candidate, plan.Reason) {
	switch {
	case p.here == unnamed:
		return nil, plan.PlaceUnknown
	case slices.ContainsFunc(ready, func(c candidate) bool { return len(p.hints(c)) == 0 }):
		return nil, plan.HintsMissing
	}
	if chosen := filter(ready, p.named); len(chosen) > 0 {
		return chosen, plan.HintsUsed
	}
	return nil, plan.HintsElsewhere
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
