package nftables

import (
	"fmt"
	"maps"
	"slices"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// stage is a change of some Service ports on its way to the kernel. commit or undo ends
// it. Until then the state differs only in the numbers that the change took.
type pendingChange struct {
	*access.Difference
	state   *state
	changes []replacement
	owners  map[plan.FrontendKey]*plan.ServicePort // of the new records' frontends
	taken   []uint32                               // ids that the change took from the pools

	newChains, oldChains []pickChain
}

// replacement is one Service port's change; old is nil if it is new, and new
// is nil if it goes.
type replacement struct {
	name     plan.ServicePortName
	old, new *programmedPort
}

// stage works out what changes in the table when the named Service ports become
// what plan says. On error the state is as it was.
func (st *state) prepare(desired *plan.Plan, names []plan.ServicePortName) (*pendingChange, error) {
	s := &pendingChange{state: st, owners: make(map[plan.FrontendKey]*plan.ServicePort)}
	chainsBefore := maps.Clone(st.chains)
	err := s.renumber(desired, names)
	for c := range st.chains {
		if _, present := chainsBefore[c]; !present {
			s.newChains = append(s.newChains, c)
		}
	}
	if err != nil {
		s.undo()
		return nil, err
	}
	s.oldChains = s.idleChains()
	s.Difference = st.elements.Compare(s.elements())
	return s, nil
}

// renumber makes the new records.
func (s *pendingChange) renumber(desired *plan.Plan, names []plan.ServicePortName) error {
	changing := make(map[plan.ServicePortName]bool, len(names))
	for _, name := range names {
		changing[name] = true
	}
	for _, name := range names {
		c := replacement{name: name, old: s.state.ports[name]}
		if port := desired.Services[name]; port != nil {
			r, err := s.state.programPort(c.old, port)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			c.new = r
			s.taken = append(s.taken, idsOnlyIn(r, c.old)...)
			if err := s.state.claim(port, s.owners, changing); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		s.changes = append(s.changes, c)
	}
	return nil
}

// idleChains lists the chains to delete: those that no set has used since an
// earlier Sync, once there are many of them.
func (s *pendingChange) idleChains() []pickChain {
	used := make(map[pickChain]bool)
	for _, c := range s.changes {
		if c.new == nil {
			continue
		}
		for i := range c.new.sets {
			used[c.new.chainOf(i)] = true
		}
	}
	var idle []pickChain
	for c := range s.state.chains {
		if s.state.setsPerChain[c] == 0 && !used[c] && !c.permanent() {
			idle = append(idle, c)
		}
	}
	if len(idle) <= idleChains {
		return nil
	}
	return idle
}

// elements compiles what the table has and will have of what changes.
func (s *pendingChange) elements() (before, after []nft.Element) {
	for _, c := range s.changes {
		if c.old != nil {
			compile(c.old, func(e nft.Element) { before = append(before, e) })
		}
		if c.new != nil {
			compile(c.new, func(e nft.Element) { after = append(after, e) })
		}
	}
	for _, c := range s.oldChains {
		before = append(before, s.state.pickElement(c))
	}
	for _, c := range s.newChains {
		after = append(after, s.state.pickElement(c))
	}
	return before, after
}

// undo gives back the numbers that the change took.
func (s *pendingChange) undo() {
	s.state.pools.release(s.taken)
	for _, c := range s.newChains {
		s.state.dropChain(c)
	}
}

// commit makes the state remember what the kernel has now.
func (s *pendingChange) commit() {
	st := s.state
	for _, c := range s.changes {
		st.pools.release(idsOnlyIn(c.old, c.new))
		if c.old != nil {
			for _, key := range c.old.port.Keys() {
				delete(st.owners, key)
			}
			st.countChains(c.old, -1)
			delete(st.ports, c.name)
		}
		if c.new != nil {
			st.countChains(c.new, 1)
			st.ports[c.name] = c.new
		}
	}
	maps.Copy(st.owners, s.owners)
	st.elements.Commit(s.Difference)
	for _, c := range s.oldChains {
		st.dropChain(c)
	}
}

// idsOnlyIn lists the ids that a took from the pools and b does not have.
func idsOnlyIn(a, b *programmedPort) []uint32 {
	had := b.ids()
	return slices.DeleteFunc(a.ids(), func(id uint32) bool { return slices.Contains(had, id) })
}
