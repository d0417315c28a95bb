package nftables

import (
	"fmt"
	"net/netip"
	"slices"

	"signalbox/proxier/plan"
)

// record is what is remembered of a Service port: what the kernel was told,
// and the numbers that this took. Elements are not kept; they are compiled
// again from the record when a change needs them. A record is never changed
// once a stage has made it.
type programmedPort struct {
	port *plan.ServicePort
	sets []indexedSet
	// block is the first id of the Service port's block and nextEndpoint the
	// number to give to the next new endpoint in it; only with affinity.
	idRange      uint32
	nextEndpoint uint32
}

// numberedSet is a non-empty endpoint set with its numbers.
type indexedSet struct {
	*plan.EndpointSet
	firstID uint32 // the id without the chain; with affinity the block
	chain   uint32 // number of the chain that picks from the set
	// order lists the indexes of the endpoints by slot; nil where slot and
	// index are the same. It keeps endpoints in their slots when others go, so
	// that a change costs only the slots that it touches.
	order []uint32
	// numbers are the endpoints' numbers in the block, by index; only with
	// affinity.
	numbers []uint32
}

// endpoint returns the index of the endpoint in a slot.
func (s *indexedSet) endpoint(slot int) int {
	if s.order == nil {
		return slot
	}
	return int(s.order[slot])
}

func (r *programmedPort) sticky() bool { return r != nil && r.port.AffinityTimeout > 0 }

func (r *programmedPort) large() bool { return r.sticky() && r.idRange >= largeFirst }

// ids lists the ids that the record took from the pools.
func (r *programmedPort) ids() []uint32 {
	if r == nil {
		return nil
	}
	if r.sticky() {
		return []uint32{r.idRange}
	}
	ids := make([]uint32, len(r.sets))
	for i := range r.sets {
		ids[i] = r.sets[i].firstID
	}
	return ids
}

// idOf returns the id of a set of the Service port.
func (r *programmedPort) idOf(set *plan.EndpointSet) uint32 {
	if set.Len() == 0 {
		return noSet
	}
	for i := range r.sets {
		if r.sets[i].EndpointSet == set {
			return r.sets[i].firstID | r.sets[i].chain
		}
	}
	panic("nftables: an endpoint set of " + r.port.Name.String() + " has no id")
}

// chainOf is the chain that picks from set number i.
func (r *programmedPort) chainOf(i int) pickChain {
	c := pickChain{size: r.sets[i].Len(), timeout: r.port.AffinityTimeout}
	if r.sticky() {
		c.setIndex, c.large = i, r.large()
	}
	return c
}

// succeed makes the record of port, which replaces the one in old (which may be
// nil). Numbers and slots stay what they were wherever they can; new numbers
// come from pools. The sets' chains are still to be numbered.
func numberPort(old *programmedPort, port *plan.ServicePort, pools *idPools) (*programmedPort, error) {
	r := &programmedPort{port: port}
	for _, set := range distinctSets(port) {
		r.sets = append(r.sets, indexedSet{EndpointSet: set})
	}
	for i := range r.sets {
		var before *indexedSet
		if old != nil && i < len(old.sets) {
			before = &old.sets[i]
		}
		r.sets[i].order = slotOrder(before, r.sets[i].EndpointSet)
	}
	var err error
	if r.sticky() {
		err = r.assignRange(old, pools)
	} else {
		err = r.assignSetIDs(old, pools)
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// distinctSets lists the Service port's non-empty endpoint sets in the order in
// which its frontends name them.
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

func (r *programmedPort) assignSetIDs(old *programmedPort, pools *idPools) error {
	for i := range r.sets {
		if old != nil && !old.sticky() && i < len(old.sets) {
			r.sets[i].firstID = old.sets[i].firstID
			continue
		}
		id, err := pools.plain.Take()
		if err != nil {
			return fmt.Errorf("numbers of endpoint sets: %w", err)
		}
		r.sets[i].firstID = id
	}
	return nil
}

// numberBlock gives the Service port a block of ids and its endpoints numbers
// in it. A Service port that outgrows a small block gets a large one and its
// clients start afresh.
func (r *programmedPort) assignRange(old *programmedPort, pools *idPools) error {
	if len(r.sets) > maxAffinitySets {
		return fmt.Errorf("%d different endpoint sets with session affinity, at most %d are possible", len(r.sets), maxAffinitySets)
	}
	numbers := make(map[netip.AddrPort]uint32)
	for _, set := range r.sets {
		for _, e := range set.Endpoints {
			numbers[e.AddrPort] = unnumbered
		}
	}
	large := old.large() || len(numbers) > endpointsPerRange(false)
	if len(numbers) > endpointsPerRange(large) {
		return fmt.Errorf("%d endpoints with session affinity, at most %d are possible", len(numbers), endpointsPerRange(large))
	}
	if old.sticky() && old.large() == large {
		r.idRange, r.nextEndpoint = old.idRange, old.nextEndpoint
		r.keepEndpointNumbers(old, numbers)
	} else {
		pool := pools.small
		if large {
			pool = pools.large
		}
		idRange, err := pool.Take()
		if err != nil {
			return fmt.Errorf("numbers of Services with affinity: %w", err)
		}
		r.idRange = idRange
	}
	r.assignEndpointNumbers(numbers)
	return nil
}

// keepEndpointNumbers fills in the numbers that endpoints had before.
func (r *programmedPort) keepEndpointNumbers(old *programmedPort, numbers map[netip.AddrPort]uint32) {
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

// giveNumbers gives numbers to the endpoints that have none, in the order of
// the sets, and writes all of them into the sets.
func (r *programmedPort) assignEndpointNumbers(numbers map[netip.AddrPort]uint32) {
	used := make(map[uint32]bool, len(numbers))
	for _, n := range numbers {
		used[n] = true
	}
	room := uint32(endpointsPerRange(r.large()))
	for i := range r.sets {
		set := &r.sets[i]
		set.firstID = r.idRange
		set.numbers = make([]uint32, set.Len())
		for j, e := range set.Endpoints {
			n := numbers[e.AddrPort]
			if n == unnumbered {
				for used[r.nextEndpoint] {
					r.nextEndpoint = (r.nextEndpoint + 1) % room
				}
				n = r.nextEndpoint
				used[n], numbers[e.AddrPort] = true, n
				r.nextEndpoint = (n + 1) % room
			}
			set.numbers[j] = n
		}
	}
}

// slotOrder assigns the endpoints of a set to slots. Those that were in the set
// before stay in their slots unless the set has become too small for these;
// the rest fill the gaps.
func slotOrder(before *indexedSet, set *plan.EndpointSet) []uint32 {
	if before == nil || before.EndpointSet == set {
		if before == nil {
			return nil
		}
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
