// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"fmt"
	"maps"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// pendingChange is a change of some Service ports before the kernel has it. Until
// commit or undo, the state differs only in the numbers that the change took.
type pendingChange struct {
	*access.Difference // nil in a full write
	ports              []portChange
	owners             map[plan.FrontendKey]*plan.ServicePort // of the new frontends
	taken              []uint32                               // ids that the change took from the pools

	newChains, oldChains []pickChain
}

// portChange is one Service port's change. Without an old one it is new, without a new
// one it goes.
type portChange struct {
	name     plan.ServicePortName
	old, new *programmedPort
}

// prepare finds what changes in the table when the named Service ports become what the
// plan says. After an error the state is as it was.
func (st *state) prepare(desired *plan.Plan, names []plan.ServicePortName) (*pendingChange, error) {
	c, err := st.number(desired, names)
	if err != nil {
		return nil, err
	}
	c.oldChains = st.unusedChains(c)
	c.Difference = st.elements.Compare(compileChange(st, c))
	return c, nil
}

// stateOf makes the state that holds the whole plan. It numbers Service ports in the
// order of their names, so that the same plan makes the same table. Service ports keep
// the numbers that they have in before, and pick chains those in chains. Both may be
// nil.
func stateOf(f *nft.IPFamily, desired *plan.Plan, before map[plan.ServicePortName]*programmedPort, chains map[pickChain]uint32) (*state, error) {
	st := newState(f)
	for c, n := range chains {
		if c.sizeIsNumber() || st.ids.chains.Claim(n) {
			st.chains[c] = n
		}
	}
	names := desired.Names()
	st.keepIDs(desired, names, before)
	c, err := st.number(desired, names)
	if err != nil {
		return nil, err
	}
	st.commit(c)
	return st, nil
}

// keepIDs takes the ids that Service ports had before. If two had the same, the first
// keeps it.
func (st *state) keepIDs(desired *plan.Plan, names []plan.ServicePortName, before map[plan.ServicePortName]*programmedPort) {
	for _, name := range names {
		p := before[name]
		if p != nil && desired.Services[name].AffinityTimeout > 0 == p.sticky() && st.ids.claim(p.ids()) {
			st.ports[name] = p
			st.countSets(p, 1)
		}
	}
}

// number gives ids and chains to the named Service ports of the plan. After an error
// the state is as it was.
func (st *state) number(desired *plan.Plan, names []plan.ServicePortName) (*pendingChange, error) {
	c := &pendingChange{
		ports:  make([]portChange, 0, len(names)),
		owners: make(map[plan.FrontendKey]*plan.ServicePort, len(names)),
	}
	chainsBefore := maps.Clone(st.chains)
	free := make(map[plan.FrontendKey]bool) // frontends of the old Service ports
	for _, name := range names {
		for _, key := range st.ports[name].keys() {
			free[key] = true
		}
	}
	var err error
	for _, name := range names {
		if err = c.add(st, name, desired.Services[name], free); err != nil {
			err = fmt.Errorf("%s: %w", name, err)
			break
		}
	}
	for chain := range st.chains {
		if _, present := chainsBefore[chain]; !present {
			c.newChains = append(c.newChains, chain)
		}
	}
	if err != nil {
		st.undo(c)
		return nil, err
	}
	return c, nil
}

// add numbers one Service port; port is nil if it goes.
func (c *pendingChange) add(st *state, name plan.ServicePortName, port *plan.ServicePort, free map[plan.FrontendKey]bool) (err error) {
	p := portChange{name: name, old: st.ports[name]}
	if port != nil {
		if p.new, err = st.programPort(p.old, port); err != nil {
			return err
		}
		c.taken = append(c.taken, idsOnlyIn(p.new, p.old)...)
		for i := range port.Frontends {
			key := port.Frontends[i].Key(name.Protocol)
			owner := c.owners[key]
			if owner == nil && !free[key] {
				owner = st.owners[key]
			}
			if owner != nil {
				return fmt.Errorf("%s %s is held by %s", port.Frontends[i].Kind, key, owner.Name)
			}
			c.owners[key] = port
		}
	}
	c.ports = append(c.ports, p)
	return nil
}

// unusedChains lists the chains to delete: those that no endpoint set has used since an
// earlier Sync, if there are many.
func (st *state) unusedChains(c *pendingChange) (unused []pickChain) {
	used := make(map[pickChain]bool)
	for _, p := range c.ports {
		for i := range p.new.endpointSets() {
			used[p.new.chainOf(i)] = true
		}
	}
	for chain := range st.chains {
		if st.setsPerChain[chain] == 0 && !used[chain] && !chain.permanent() {
			unused = append(unused, chain)
		}
	}
	if len(unused) <= maxUnusedChains {
		return nil
	}
	return unused
}
