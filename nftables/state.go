// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"maps"
	"slices"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// state is what a Proxier knows of its table.
type state struct {
	*nft.IPFamily
	ids   *idPools
	ports map[plan.ServicePortName]*programmedPort
	// owners says which Service port has a frontend.
	owners   map[plan.FrontendKey]*plan.ServicePort
	elements *access.Elements // except the node's
	// chains numbers the pick chains of the table. A chain may be unused.
	chains map[pickChain]uint32
	// setsPerChain counts the endpoint sets that use a pick chain.
	setsPerChain map[pickChain]int32
	node         plan.Node
}

// permanentChains is the largest size for which there always is a chain. To add a chain
// later costs the kernel a walk over all endpoints.
const permanentChains = 16

// maxUnusedChains is how many chains may be unused before they are deleted. A deleted
// chain is unused since an earlier Sync, so no packet is in it.
const maxUnusedChains = 16

func newState(f *nft.IPFamily) *state {
	st := &state{
		IPFamily:     f,
		ids:          newIDPools(),
		ports:        make(map[plan.ServicePortName]*programmedPort),
		owners:       make(map[plan.FrontendKey]*plan.ServicePort),
		elements:     access.NewElements(allSets),
		chains:       make(map[pickChain]uint32),
		setsPerChain: make(map[pickChain]int32),
	}
	for n := range permanentChains {
		st.chains[pickChain{size: n + 1}] = uint32(n + 1)
	}
	return st
}

// commit makes the state what the kernel has after the change.
func (st *state) commit(c *pendingChange) {
	for _, p := range c.ports {
		st.ids.release(idsOnlyIn(p.old, p.new))
		if p.old != nil {
			for _, key := range p.old.port.Keys() {
				delete(st.owners, key)
			}
			st.countSets(p.old, -1)
			delete(st.ports, p.name)
		}
		if p.new != nil {
			st.countSets(p.new, 1)
			st.ports[p.name] = p.new
		}
	}
	maps.Copy(st.owners, c.owners)
	if c.Difference != nil {
		st.elements.Commit(c.Difference)
	}
	for _, chain := range c.oldChains {
		st.dropChain(chain)
	}
}

// undo gives back the numbers that the change took.
func (st *state) undo(c *pendingChange) {
	st.ids.release(c.taken)
	for _, chain := range c.newChains {
		st.dropChain(chain)
	}
}

func (st *state) countSets(p *programmedPort, by int32) {
	for i := range p.sets {
		chain := p.chainOf(i)
		if st.setsPerChain[chain] += by; st.setsPerChain[chain] == 0 {
			delete(st.setsPerChain, chain)
		}
	}
}

// servicePorts yields the Service ports of the table.
func (st *state) servicePorts(yield func(*plan.ServicePort) bool) {
	for _, p := range st.ports {
		if !yield(p.port) {
			return
		}
	}
}

func (st *state) dropChain(c pickChain) {
	if !c.sizeIsNumber() {
		st.ids.chains.Release(st.chains[c])
	}
	delete(st.chains, c)
}

// sortedChains lists the pick chains of the table in a fixed order.
func (st *state) sortedChains() []pickChain {
	return slices.SortedFunc(maps.Keys(st.chains), pickChain.compare)
}
