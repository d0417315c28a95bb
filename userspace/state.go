// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/google/nftables"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// state is what a Proxier knows of its table's contents.
type state struct {
	family   *nft.IPFamily
	services map[plan.ServicePortName]*plan.ServicePort
	pool     *access.Pool
	ids      map[plan.FrontendKey]frontendID
	owners   map[plan.FrontendKey]plan.ServicePortName
	elements *access.Elements
}

func newState(f *nft.IPFamily) *state {
	return &state{
		family:   f,
		services: map[plan.ServicePortName]*plan.ServicePort{},
		pool:     newIDPool(),
		ids:      map[plan.FrontendKey]frontendID{},
		owners:   map[plan.FrontendKey]plan.ServicePortName{},
		elements: access.NewElements(makeSets()),
	}
}

// pendingChange is a change before the kernel has it. commit or undo ends it.
type pendingChange struct {
	*access.Difference
	state *state
	names []plan.ServicePortName
	now   []*plan.ServicePort // by names; nil for what goes
	taken []plan.FrontendKey  // frontends that got a number
}

// prepare finds what changes in the table when the named Service ports become
// what plan says. On error the state is as it was.
func (st *state) prepare(plan *plan.Plan, names []plan.ServicePortName) (*pendingChange, error) {
	s := &pendingChange{state: st, names: names}
	var before, after []nft.Element
	for _, name := range names {
		sp := plan.Services[name]
		s.now = append(s.now, sp)
		if old := st.services[name]; old != nil {
			before = append(before, compile(st.family, old, st.ids)...)
		}
		if sp == nil {
			continue
		}
		if err := s.number(sp); err != nil {
			s.undo()
			return nil, err
		}
		after = append(after, compile(st.family, sp, st.ids)...)
	}
	s.Difference = st.elements.Compare(before, after)
	return s, nil
}

// number gives every frontend of a Service port a number that has none.
func (s *pendingChange) number(sp *plan.ServicePort) error {
	if err := access.ValidatePort(s.state.family, sp); err != nil {
		return fmt.Errorf("%s: %w", sp.Name, err)
	}
	for i := range sp.Frontends {
		k := sp.Frontends[i].Key(sp.Name.Protocol)
		if _, numbered := s.state.ids[k]; numbered || !relayed(k.Protocol) {
			continue
		}
		id, err := s.state.pool.Take()
		if err != nil {
			return fmt.Errorf("%s: numbers of frontends: %w", sp.Name, err)
		}
		s.state.ids[k] = frontendID(id)
		s.taken = append(s.taken, k)
	}
	return nil
}

// undo gives back the numbers that the change took.
func (s *pendingChange) undo() {
	for _, k := range s.taken {
		s.state.pool.Release(uint32(s.state.ids[k]))
		delete(s.state.ids, k)
	}
}

// removed lists the endpoints that were removed from each changed Service port.
func (s *pendingChange) removed(before map[plan.ServicePortName]*plan.ServicePort) map[plan.ServicePortName][]netip.AddrPort {
	removed := map[plan.ServicePortName][]netip.AddrPort{}
	for i, name := range s.names {
		if list := before[name].Removed(s.now[i]); len(list) > 0 {
			removed[name] = list
		}
	}
	return removed
}

// commit makes the state remember what the kernel has now, and returns the
// numbers of frontends that are gone.
func (s *pendingChange) commit() (gone []frontendID) {
	st := s.state
	var released []plan.FrontendKey
	for i, name := range s.names {
		for _, k := range st.services[name].Keys() {
			if st.owners[k] == name {
				delete(st.owners, k)
				released = append(released, k)
			}
		}
		if s.now[i] == nil {
			delete(st.services, name)
		} else {
			st.services[name] = s.now[i]
		}
	}
	for _, sp := range s.now {
		for _, k := range sp.Keys() {
			st.owners[k] = sp.Name
		}
	}
	for _, k := range released {
		id, numbered := st.ids[k]
		if _, owned := st.owners[k]; !owned && numbered {
			st.pool.Release(uint32(id))
			delete(st.ids, k)
			gone = append(gone, id)
		}
	}
	st.elements.Commit(s.Difference)
	return gone
}

// targets are what the relay must know of the changed Service ports.
func (s *pendingChange) targets() []*target {
	var list []*target
	for _, sp := range s.now {
		if sp == nil || !relayed(sp.Name.Protocol) {
			continue
		}
		for i := range sp.Frontends {
			fe := &sp.Frontends[i]
			list = append(list, &target{
				id: s.state.ids[fe.Key(sp.Name.Protocol)], name: sp.Name, timeout: sp.AffinityTimeout,
				internal: fe.Internal, external: fe.External, usable: sp.Usable, masquerade: fe.Masquerade,
			})
		}
	}
	return list
}

// adopt takes over the numbers that frontends have in the existing table, of this
// process or an earlier one: the conntrack entries of UDP flows contain them. read
// lists a set of the table.
func (p *Proxier) adopt(st *state, desired *plan.Plan, read func(set nft.SetID) ([]nftables.SetElement, error)) {
	wanted := map[plan.FrontendKey]bool{}
	for name, sp := range desired.Services {
		if relayed(name.Protocol) {
			for _, k := range sp.Keys() {
				wanted[k] = true
			}
		}
	}
	// The table comes first: another process may have written it since.
	for _, set := range []nft.SetID{frontends, nodePorts} {
		elements, err := read(set)
		if err != nil && p.state != nil {
			break
		}
		if err != nil {
			slog.Warn("userspace: the old table cannot be read and frontends get new numbers; UDP clients that keep their port may get no answer for two minutes",
				"family", p.family.Family.String(), "error", err)
			return
		}
		for _, e := range elements {
			k := access.FrontendOfBytes(p.family, e.Key, set == nodePorts)
			a, _ := netip.AddrFromSlice(e.Val)
			if id, ok := idOf(p.family.Family, a); ok && wanted[k] && st.pool.Claim(uint32(id)) {
				st.ids[k] = id
			}
		}
	}
	if p.state != nil {
		for k, id := range p.state.ids {
			if _, numbered := st.ids[k]; wanted[k] && !numbered && st.pool.Claim(uint32(id)) {
				st.ids[k] = id
			}
		}
	}
}
