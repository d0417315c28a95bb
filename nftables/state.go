package nftables

import (
	"fmt"
	"maps"
	"slices"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// state is what a Proxier knows of its table's contents.
type state struct {
	*nft.IPFamily
	pools *idPools
	ports map[plan.ServicePortName]*programmedPort
	// owners says which Service port holds a frontend.
	owners   map[plan.FrontendKey]*plan.ServicePort
	elements *access.Elements
	// served counts the endpoint sets that each sized chain serves.
	setsPerChain map[pickChain]int32
	// chains numbers the sized chains in the kernel, among them idle ones.
	chains map[pickChain]uint32
	// digest is the name of the chain that tells which rules the kernel has.
	digest string
	// node are the facts that the rules in the kernel go by.
	node plan.Node
}

// readyChains is up to which size there is a chain from the beginning. Making a
// chain later costs the kernel a walk over all endpoints.
const permanentChains = 16

// idleChains is how many chains may be idle before they are deleted. A chain
// that is deleted is idle since an earlier Sync, so no packet is in it.
const idleChains = 16

func newState(f *nft.IPFamily) *state {
	st := &state{
		IPFamily:     f,
		pools:        newIDPools(),
		ports:        make(map[plan.ServicePortName]*programmedPort),
		owners:       make(map[plan.FrontendKey]*plan.ServicePort),
		elements:     access.NewElements(allSets),
		setsPerChain: make(map[pickChain]int32),
		chains:       make(map[pickChain]uint32),
	}
	for n := range permanentChains {
		st.chains[pickChain{size: n + 1}] = uint32(n + 1)
	}
	return st
}

// newStateOf is the state that holds the whole plan, numbered in the order of
// the names, so that the same plan makes the same table. Service ports keep the
// numbers that they have in before, and sized chains those in chains; both may
// be nil.
func newStateOf(f *nft.IPFamily, desired *plan.Plan, before map[plan.ServicePortName]*programmedPort, chains map[pickChain]uint32) (*state, error) {
	st := newState(f)
	for c, n := range chains {
		if c.sizeIsNumber() || st.pools.chains.Claim(n) {
			st.chains[c] = n
		}
	}
	names := slices.SortedFunc(maps.Keys(desired.Services), plan.ServicePortName.Compare)
	kept := st.keepIDs(desired, names, before)
	for _, name := range names {
		r, err := st.programPort(kept[name], desired.Services[name])
		if err == nil {
			err = st.claim(r.port, st.owners, nil)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		// A block that was outgrown is free, and so is a set that is no more.
		st.pools.release(idsOnlyIn(kept[name], r))
		st.countChains(r, 1)
		st.ports[name] = r
	}
	return st, nil
}

// keepEndpointNumbers takes out of the pools the numbers that Service ports had before,
// and returns the records that they are in. Where two had the same, the first
// has it.
func (st *state) keepIDs(desired *plan.Plan, names []plan.ServicePortName, before map[plan.ServicePortName]*programmedPort) map[plan.ServicePortName]*programmedPort {
	kept := make(map[plan.ServicePortName]*programmedPort)
	if len(before) == 0 {
		return kept
	}
	for _, name := range names {
		r := before[name]
		if r != nil && desired.Services[name].AffinityTimeout > 0 == r.sticky() && st.claimIDs(r.ids()) {
			kept[name] = r
		}
	}
	return kept
}

// claimIDs takes certain ids out of the pools: all of them, or none if one is
// taken.
func (st *state) claimIDs(ids []uint32) bool {
	for i, id := range ids {
		if !st.pools.of(id).Claim(id) {
			st.pools.release(ids[:i])
			return false
		}
	}
	return true
}

// recordOf makes the record of port, which follows on old. The caller gives
// back what it took from the pools if the record does not come to be.
func (st *state) programPort(old *programmedPort, port *plan.ServicePort) (*programmedPort, error) {
	if err := access.ValidatePort(st.IPFamily, port); err != nil {
		return nil, err
	}
	r, err := numberPort(old, port, st.pools)
	if err != nil {
		return nil, err
	}
	for i := range r.sets {
		if r.sets[i].chain, err = st.chainNumber(r.chainOf(i)); err != nil {
			st.pools.release(idsOnlyIn(r, old))
			return nil, err
		}
	}
	return r, nil
}

// chainNumber returns the number of a chain, and gives it one if it is new.
func (st *state) chainNumber(c pickChain) (uint32, error) {
	if n, known := st.chains[c]; known {
		return n, nil
	}
	n := uint32(c.size)
	if !c.sizeIsNumber() {
		var err error
		if n, err = st.pools.chains.Take(); err != nil {
			return 0, fmt.Errorf("numbers of chains, one for each count of endpoints and affinity timeout: %w", err)
		}
	}
	st.chains[c] = n
	return n, nil
}

// dropChain forgets a chain that is not in the kernel or no longer.
func (st *state) dropChain(c pickChain) {
	if !c.sizeIsNumber() {
		st.pools.chains.Release(st.chains[c])
	}
	delete(st.chains, c)
}

// pickElement is what leads to a sized chain.
func (st *state) pickElement(c pickChain) nft.Element {
	return nft.Element{Set: pickChains, Key: nft.MarkKey(st.chains[c]), Chain: c.name()}
}

// emitAll hands out every element that does not depend on the node, and counts those
// of shared sets.
func (st *state) emitAll(emit func(nft.Element)) *access.Elements {
	for origins := plan.FromPods; origins <= plan.AnySource; origins++ {
		emit(nft.Element{Set: markChains, Key: nft.MarkKey(uint32(origins)), Chain: markChain(origins)})
	}
	elements := access.NewElements(allSets)
	for _, name := range slices.SortedFunc(maps.Keys(st.ports), plan.ServicePortName.Compare) {
		compile(st.ports[name], func(e nft.Element) {
			if elements.Add(&e) {
				emit(e)
			}
		})
	}
	for _, c := range st.sortedChains() {
		emit(st.pickElement(c))
	}
	return elements
}

// claim makes the Service port the owner of its frontends. It fails if another one
// owns a frontend in owners, or in the state and is not about to change.
func (st *state) claim(port *plan.ServicePort, owners map[plan.FrontendKey]*plan.ServicePort, changing map[plan.ServicePortName]bool) error {
	for i := range port.Frontends {
		key := port.Frontends[i].Key(port.Name.Protocol)
		owner := owners[key]
		if other := st.owners[key]; owner == nil && other != nil && !changing[other.Name] {
			owner = other
		}
		if owner != nil {
			return fmt.Errorf("%s %s is held by %s", port.Frontends[i].Kind, key, owner.Name)
		}
		owners[key] = port
	}
	return nil
}

// countChains counts the record's endpoint sets for the chains that serve them.
func (st *state) countChains(r *programmedPort, by int32) {
	for i := range r.sets {
		c := r.chainOf(i)
		if st.setsPerChain[c] += by; st.setsPerChain[c] == 0 {
			delete(st.setsPerChain, c)
		}
	}
}

// sizedChains lists the chains that are in the kernel, in a fixed order.
func (st *state) sortedChains() []pickChain {
	return slices.SortedFunc(maps.Keys(st.chains), pickChain.compare)
}
