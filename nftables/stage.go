package nftables

import (
	"fmt"
	"maps"
	"slices"

	"signalbox/nft"
	"signalbox/proxier/plan"
)

// stage is a change of some Service ports on its way to the kernel. Its state's
// counts include the change already; commit or undo ends it.
type stage struct {
	state   *state
	changes []replacement
	taken   []uint32 // ids that the change took from the pools

	remove, add          []nft.Element
	newChains, oldChains []sizedChain
}

// replacement is one Service port's change; old is nil if it is new, and new
// is nil if it goes.
type replacement struct {
	name     plan.ServicePortName
	old, new *record
}

// stage works out what changes in the table when the named Service ports become
// what plan says. On error the state is as it was.
func (st *state) stage(plan *plan.Plan, names []plan.ServicePortName) (*stage, error) {
	s := &stage{state: st}
	chainsBefore := maps.Clone(st.chains)
	err := s.renumber(plan, names)
	for c := range st.chains {
		if _, present := chainsBefore[c]; !present {
			s.newChains = append(s.newChains, c)
		}
	}
	if err != nil {
		s.forget()
		return nil, err
	}
	usesBefore := s.countUses()
	if err := s.claim(); err != nil {
		return nil, err
	}
	for i := range s.changes {
		s.diff(&s.changes[i])
	}
	s.diffShared(usesBefore)
	s.diffChains()
	return s, nil
}

// renumber makes the new records.
func (s *stage) renumber(plan *plan.Plan, names []plan.ServicePortName) error {
	for _, name := range names {
		c := replacement{name: name, old: s.state.records[name]}
		if port := plan.Services[name]; port != nil {
			r, err := s.state.recordOf(c.old, port)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			c.new = r
			s.taken = append(s.taken, idsOnlyIn(r, c.old)...)
		}
		s.changes = append(s.changes, c)
	}
	return nil
}

// forget gives back the numbers that the stage took.
func (s *stage) forget() {
	s.state.pools.giveBack(s.taken)
	for _, c := range s.newChains {
		s.state.dropChain(c)
	}
}

// countUses returns how often each shared element of the changing records is
// wanted now.
func (s *stage) countUses() map[sharedKey]int32 {
	before := make(map[sharedKey]int32)
	note := func(e nft.Element) {
		if schemas[e.Set].Shared {
			k := sharedKey{e.Set, e.Key}
			before[k] = s.state.uses[k]
		}
	}
	for _, c := range s.changes {
		for _, r := range []*record{c.old, c.new} {
			if r != nil {
				compile(r, note)
			}
		}
	}
	return before
}

// claim moves every frontend to its new holder: first all are let go, so that
// two Service ports may swap.
func (s *stage) claim() error {
	for _, c := range s.changes {
		s.state.release(c.old)
	}
	for i, c := range s.changes {
		if err := s.state.claim(c.new); err != nil {
			s.unclaim(i)
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return nil
}

// unclaim takes back a claim of which the first n changes were made.
func (s *stage) unclaim(n int) {
	for _, c := range s.changes[:n] {
		s.state.release(c.new)
	}
	for _, c := range s.changes {
		if err := s.state.claim(c.old); err != nil {
			panic("nftables: what was held before cannot be held again: " + err.Error())
		}
	}
	s.forget()
}

// undo makes the state what it was before the stage.
func (s *stage) undo() { s.unclaim(len(s.changes)) }

// commit makes the state remember what the kernel has now.
func (s *stage) commit() {
	for _, c := range s.changes {
		s.state.pools.giveBack(idsOnlyIn(c.old, c.new))
		if c.new == nil {
			delete(s.state.records, c.name)
		} else {
			s.state.records[c.name] = c.new
		}
	}
	for _, c := range s.oldChains {
		s.state.dropChain(c)
	}
}

// idsOnlyIn lists the ids that a took from the pools and b does not have.
func idsOnlyIn(a, b *record) []uint32 {
	had := b.ids()
	return slices.DeleteFunc(a.ids(), func(id uint32) bool { return slices.Contains(had, id) })
}

// diff compares the elements of one Service port before and after.
func (s *stage) diff(c *replacement) {
	before := make(map[nft.ElementID]nft.Element)
	var order []nft.ElementID
	if c.old != nil {
		compile(c.old, func(e nft.Element) {
			if _, twice := before[e.ID()]; !twice && !schemas[e.Set].Shared {
				before[e.ID()] = e
				order = append(order, e.ID())
			}
		})
	}
	if c.new != nil {
		compile(c.new, func(e nft.Element) {
			if schemas[e.Set].Shared {
				return
			}
			if b, had := before[e.ID()]; had && b == e {
				delete(before, e.ID())
				return
			}
			s.add = append(s.add, e)
		})
	}
	for _, k := range order {
		if e, gone := before[k]; gone {
			s.remove = append(s.remove, e)
		}
	}
}

func (s *stage) diffShared(before map[sharedKey]int32) {
	for k, n := range before {
		e := nft.Element{Set: k.set, Key: k.key}
		switch wanted := s.state.uses[k] > 0; {
		case wanted && n == 0:
			s.add = append(s.add, e)
		case !wanted && n > 0:
			s.remove = append(s.remove, e)
		}
	}
}

// diffChains leads to new chains, and finds those to delete: ones that no set
// has used since an earlier Sync, once there are many of them.
func (s *stage) diffChains() {
	for _, c := range s.newChains {
		s.add = append(s.add, s.state.pickElement(c))
	}
	var idle []sizedChain
	for chain := range s.state.chains {
		if s.state.served[chain] == 0 && !chain.ready() && !s.leaves(chain) {
			idle = append(idle, chain)
		}
	}
	if len(idle) > idleChains {
		s.oldChains = idle
		for _, c := range idle {
			s.remove = append(s.remove, s.state.pickElement(c))
		}
	}
}

// leaves says whether an endpoint set leaves the chain in this very change.
func (s *stage) leaves(chain sizedChain) bool {
	for _, c := range s.changes {
		if c.old == nil {
			continue
		}
		for i := range c.old.sets {
			if c.old.chainOf(i) == chain {
				return true
			}
		}
	}
	return false
}
