// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"fmt"
	"net/netip"
	"slices"

	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// programmedPort is a Service port with the numbers that stand for it in the table.
// Elements are not kept: they are compiled again when the Service port changes. A
// programmedPort never changes.
type programmedPort struct {
	port *plan.ServicePort
	sets []indexedSet
	// idRange is the first id of the Service port's range, and nextEndpoint the number
	// in it that the next new endpoint gets. They are used with affinity only.
	idRange      uint32
	nextEndpoint uint32
}

// indexedSet is an endpoint set that is not empty, with its numbers.
type indexedSet struct {
	*plan.EndpointSet
	firstID uint32 // the id without the chain; with affinity the range
	chain   uint32 // number of the pick chain
	// order is the index of the endpoint in each slot; nil if slot and index are the
	// same. Endpoints keep their slots when others go, so that a change costs only the
	// slots that it touches.
	order []uint32
	// numbers are the endpoints' numbers in the range, by index; only with affinity.
	numbers []uint32
}

// endpoint returns the index of the endpoint in a slot.
func (s *indexedSet) endpoint(slot int) int {
	if s.order == nil {
		return slot
	}
	return int(s.order[slot])
}

// The methods of a nil programmedPort are those of a Service port with nothing.

func (p *programmedPort) sticky() bool { return p != nil && p.port.AffinityTimeout > 0 }

func (p *programmedPort) large() bool { return p.sticky() && p.idRange >= largeFirst }

func (p *programmedPort) keys() []plan.FrontendKey {
	if p == nil {
		return nil
	}
	return p.port.Keys()
}

func (p *programmedPort) endpointSets() []indexedSet {
	if p == nil {
		return nil
	}
	return p.sets
}

// ids lists the ids that the Service port took from the pools.
func (p *programmedPort) ids() []uint32 {
	if p.sticky() {
		return []uint32{p.idRange}
	}
	var ids []uint32
	for _, set := range p.endpointSets() {
		ids = append(ids, set.firstID)
	}
	return ids
}

// idsOnlyIn lists the ids that a took from the pools and b does not have.
func idsOnlyIn(a, b *programmedPort) []uint32 {
	kept := b.ids()
	return slices.DeleteFunc(a.ids(), func(id uint32) bool { return slices.Contains(kept, id) })
}

// idOf returns the id of a set of the Service port.
func (p *programmedPort) idOf(set *plan.EndpointSet) uint32 {
	if set.Len() == 0 {
		return noSet
	}
	for i := range p.sets {
		if p.sets[i].EndpointSet == set {
			return p.sets[i].firstID | p.sets[i].chain
		}
	}
	panic("nftables: an endpoint set of " + p.port.Name.String() + " has no id")
}

// chainOf is the chain that picks from set number i.
func (p *programmedPort) chainOf(i int) pickChain {
	c := pickChain{size: p.sets[i].Len(), timeout: p.port.AffinityTimeout}
	if p.sticky() {
		c.setIndex, c.large = i, p.large()
	}
	return c
}

// programPort numbers a Service port, which replaces old (may be nil). After an error
// the pools are as they were.
func (st *state) programPort(old *programmedPort, port *plan.ServicePort) (*programmedPort, error) {
	if err := access.ValidatePort(st.IPFamily, port); err != nil {
		return nil, err
	}
	p, err := numberPort(old, port, st.ids)
	if err != nil {
		return nil, err
	}
	for i := range p.sets {
		if p.sets[i].chain, err = st.chainNumber(p.chainOf(i)); err != nil {
			st.ids.release(idsOnlyIn(p, old))
			return nil, err
		}
	}
	return p, nil
}

// chainNumber returns the number of a chain, and gives it one if it is new.
func (st *state) chainNumber(c pickChain) (uint32, error) {
	if n, known := st.chains[c]; known {
		return n, nil
	}
	n := uint32(c.size)
	if !c.sizeIsNumber() {
		var err error
		if n, err = st.ids.chains.Take(); err != nil {
			return 0, fmt.Errorf("numbers of chains, one for each count of endpoints and affinity timeout: %w", err)
		}
	}
	st.chains[c] = n
	return n, nil
}

// numberPort keeps the numbers and slots of old where it can. New numbers come from the
// pools. The sets' chains get their numbers later.
func numberPort(old *programmedPort, port *plan.ServicePort, pools *idPools) (*programmedPort, error) {
	p, oldSets := &programmedPort{port: port}, old.endpointSets()
	for i, set := range distinctSets(port) {
		var before *indexedSet
		if i < len(oldSets) {
			before = &oldSets[i]
		}
		p.sets = append(p.sets, indexedSet{EndpointSet: set, order: slotOrder(before, set)})
	}
	assign := p.assignSetIDs
	if p.sticky() {
		assign = p.assignRange
	}
	if err := assign(old, pools); err != nil {
		return nil, err
	}
	return p, nil
}

// distinctSets lists the Service port's non-empty endpoint sets in the order of its
// frontends.
func distinctSets(port *plan.ServicePort) []*plan.EndpointSet {
	var sets []*plan.EndpointSet
	for i := range port.Frontends {
		for _, set := range []*plan.EndpointSet{port.Frontends[i].Internal, port.Frontends[i].External} {
			if set.Len() > 0 && !slices.Contains(sets, set) {
				sets = append(sets, set)
			}
		}
	}
	return sets
}

func (p *programmedPort) assignSetIDs(old *programmedPort, pools *idPools) error {
	var kept []uint32
	if !old.sticky() {
		kept = old.ids()
	}
	for i := range p.sets {
		if i < len(kept) {
			p.sets[i].firstID = kept[i]
			continue
		}
		id, err := pools.plain.Take()
		if err != nil {
			return fmt.Errorf("numbers of endpoint sets: %w", err)
		}
		p.sets[i].firstID = id
	}
	return nil
}

// assignRange gives the Service port a range of ids, and its endpoints numbers in it. A
// Service port that outgrows a small range gets a large one, and its clients start
// afresh.
func (p *programmedPort) assignRange(old *programmedPort, pools *idPools) error {
	if len(p.sets) > maxAffinitySets {
		return fmt.Errorf("%d different endpoint sets with session affinity, at most %d are possible", len(p.sets), maxAffinitySets)
	}
	numbers := make(map[netip.AddrPort]uint32)
	for _, set := range p.sets {
		for _, e := range set.Endpoints {
			numbers[e.AddrPort] = unnumbered
		}
	}
	large := old.large() || len(numbers) > endpointsPerRange(false)
	if len(numbers) > endpointsPerRange(large) {
		return fmt.Errorf("%d endpoints with session affinity, at most %d are possible", len(numbers), endpointsPerRange(large))
	}
	if old.sticky() && old.large() == large {
		p.idRange, p.nextEndpoint = old.idRange, old.nextEndpoint
		keepEndpointNumbers(old, numbers)
	} else {
		pool := pools.small
		if large {
			pool = pools.large
		}
		idRange, err := pool.Take()
		if err != nil {
			return fmt.Errorf("numbers of Services with affinity: %w", err)
		}
		p.idRange = idRange
	}
	p.assignEndpointNumbers(numbers)
	return nil
}

// keepEndpointNumbers fills in the numbers that endpoints had before.
func keepEndpointNumbers(old *programmedPort, numbers map[netip.AddrPort]uint32) {
	for i := range old.sets {
		for j, e := range old.sets[i].Endpoints {
			if _, stays := numbers[e.AddrPort]; stays {
				numbers[e.AddrPort] = old.sets[i].numbers[j]
			}
		}
	}
}

// unnumbered stands for the number of an endpoint that has none yet.
const unnumbered = ^uint32(0)

// assignEndpointNumbers numbers the endpoints that have no number, in the order of the
// sets, and writes all numbers into the sets.
func (p *programmedPort) assignEndpointNumbers(numbers map[netip.AddrPort]uint32) {
	used := make(map[uint32]bool, len(numbers))
	for _, n := range numbers {
		used[n] = true
	}
	room := uint32(endpointsPerRange(p.large()))
	for i := range p.sets {
		set := &p.sets[i]
		set.firstID = p.idRange
		set.numbers = make([]uint32, set.Len())
		for j, e := range set.Endpoints {
			n := numbers[e.AddrPort]
			if n == unnumbered {
				for used[p.nextEndpoint] {
					p.nextEndpoint = (p.nextEndpoint + 1) % room
				}
				n = p.nextEndpoint
				used[n], numbers[e.AddrPort] = true, n
				p.nextEndpoint = (n + 1) % room
			}
			set.numbers[j] = n
		}
	}
}

// slotOrder assigns the endpoints of a set to slots. Endpoints keep the slots that they
// had before, except those beyond the new size. The rest fill the gaps.
func slotOrder(before *indexedSet, set *plan.EndpointSet) []uint32 {
	switch {
	case before == nil:
		return nil
	case before.EndpointSet == set:
		return before.order
	}
	n := set.Len()
	index := make(map[netip.AddrPort]uint32, n)
	for i, e := range set.Endpoints {
		index[e.AddrPort] = uint32(i)
	}
	order, taken := make([]uint32, n), make([]bool, n)
	filled := make([]bool, n)
	for slot := range min(n, before.Len()) {
		i, stays := index[before.Endpoints[before.endpoint(slot)].AddrPort]
		if stays && !taken[i] {
			order[slot], filled[slot], taken[i] = i, true, true
		}
	}
	next, identity := 0, true
	for slot := range n {
		if !filled[slot] {
			for taken[next] {
				next++
			}
			order[slot], taken[next] = uint32(next), true
		}
		identity = identity && order[slot] == uint32(slot)
	}
	if identity {
		return nil
	}
	return order
}
