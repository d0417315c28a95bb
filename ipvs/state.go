package ipvs

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"signalbox/ipvs/internal/kernel"

	"signalbox/nft"
	"signalbox/proxier/plan"
)

// state is what a Proxier knows of the kernel's state.
type state struct {
	rules   *ruleset
	pool    *markPool
	records map[plan.ServicePortName]*record
	// uses counts how many records want each element of the table.
	uses map[nft.ElementID]use
	// servers are the virtual servers in the kernel that are this mode's.
	servers map[kernel.ServerKey]*server
	// live says which of them a record wants.
	live map[kernel.ServerKey]bool
	// replaced are virtual servers by address whose Service port has others by
	// mark now: a kube-proxy's.
	replaced map[kernel.ServerKey]plan.ServicePortName
	// endpoints are, by block, the marks that endpoints have.
	endpoints map[uint32]map[netip.AddrPort]uint32
	// held are the addresses on the device, wanted how often each is.
	held   map[netip.Addr]bool
	wanted map[netip.Addr]int
	// others are the node's other addresses while everything is compiled, nil
	// afterwards.
	others map[netip.Addr]bool

	*deadlines
}

type use struct {
	element nft.Element
	count   int
}

// batch is a change of some Service ports on its way to the kernel.
type batch struct {
	all, node     bool
	nodeBefore    plan.Node // what the rules in the kernel go by
	knownTimeouts int
	names         []plan.ServicePortName
	old, new      []*record // by names; nil for none
	grow, shrink  []kernel.Op
	add, remove   []nft.Element
	newVIPs       []netip.Addr
	uses          map[nft.ElementID]use // as they will be
}

func newState(rules *ruleset) *state {
	return &state{
		rules: rules, pool: newMarkPool(),
		records: make(map[plan.ServicePortName]*record), uses: make(map[nft.ElementID]use),
		servers: make(map[kernel.ServerKey]*server), live: make(map[kernel.ServerKey]bool),
		replaced:  make(map[kernel.ServerKey]plan.ServicePortName),
		endpoints: make(map[uint32]map[netip.AddrPort]uint32),
		held:      make(map[netip.Addr]bool), wanted: make(map[netip.Addr]int),
		deadlines: newDeadlines(),
	}
}

// class numbers a time-out of affinity.
func (st *state) class(d time.Duration) (uint32, error) {
	i := slices.Index(st.rules.timeouts, d)
	if i < 0 {
		if i = len(st.rules.timeouts); i == maxTimeouts {
			return 0, fmt.Errorf("Services can have %d different affinity time-outs", maxTimeouts)
		}
		st.rules.timeouts = append(st.rules.timeouts, d)
	}
	return uint32(i), nil
}

func (st *state) numbered(block uint32) map[netip.AddrPort]uint32 { return st.endpoints[block] }

// stage works out what changes when the named Service ports become what plan
// says. On error the state is as it was, but for new time-outs.
func (st *state) stage(desired *plan.Plan, names []plan.ServicePortName, compilerOf func(plan.ServicePortName) *compiler) (*batch, error) {
	b := &batch{names: names, uses: make(map[nft.ElementID]use, 2*len(names))}
	fail := func(err error) (*batch, error) {
		for _, r := range b.new {
			st.giveBack(r)
		}
		return nil, err
	}
	want := make(map[kernel.ServerKey]*wanted, len(names))
	owner := make(map[kernel.ServerKey]plan.ServicePortName, len(names))
	claimed := make(map[uint32]bool)
	var keys []kernel.ServerKey
	for _, name := range names {
		old := st.records[name]
		var r *record
		if port := desired.Services[name]; port != nil {
			var err error
			c := compilerOf(name)
			c.claimed = claimed
			if r, err = c.compile(port); err != nil {
				return fail(err)
			}
			for _, base := range r.bases {
				claimed[base] = true
			}
		}
		b.old, b.new = append(b.old, old), append(b.new, r)
		for i := range serversOf(r) {
			w := &r.servers[i]
			if other, twice := owner[w.key]; twice {
				return fail(fmt.Errorf("%s: %s is %s's", name, w.key, other))
			}
			owner[w.key], want[w.key] = name, w
			keys = append(keys, w.key)
		}
	}
	for _, r := range b.old {
		for i := range serversOf(r) {
			if key := r.servers[i].key; want[key] == nil {
				keys = append(keys, key)
			}
		}
	}
	for _, key := range keys {
		b.diff(st.servers[key.ID()], want[key], key)
	}
	st.diffElements(b)
	st.diffVIPs(b)
	return b, nil
}

func serversOf(r *record) []wanted {
	if r == nil {
		return nil
	}
	return r.servers
}

func (st *state) giveBack(r *record) {
	if r != nil {
		for _, base := range r.bases {
			st.pool.release(base)
		}
	}
}

func (b *batch) diff(have *server, want *wanted, key kernel.ServerKey) {
	grow, shrink := diff(have, want, key)
	b.grow, b.shrink = append(b.grow, grow...), append(b.shrink, shrink...)
}

// unwanted lists the virtual servers of ours that the batch, which is about
// everything, does not want.
func (st *state) unwanted(b *batch) []kernel.ServerKey {
	want := make(map[kernel.ServerKey]bool)
	for _, r := range b.new {
		for i := range serversOf(r) {
			want[r.servers[i].key.ID()] = true
		}
	}
	var keys []kernel.ServerKey
	for key := range st.servers {
		if !want[key] {
			keys = append(keys, key)
		}
	}
	slices.SortFunc(keys, kernel.ServerKey.Compare)
	return keys
}

// diffUnwanted has everything go that is in the kernel and not wanted by the
// batch, which is about everything. UDP flows to an endpoint that serves their
// Service by another virtual server from now on are not ended.
func (st *state) diffUnwanted(b *batch) {
	keys := st.unwanted(b)
	replacedBy := st.findReplaced(b, keys)
	for _, key := range keys {
		var want *wanted
		if port := replacedBy[key]; port != nil {
			st.replaced[key] = port.Name
			want = &wanted{key: key, scheduler: st.servers[key].scheduler, serving: port.Usable, replaced: true}
		}
		b.diff(st.servers[key], want, key)
	}
}

func (st *state) findReplaced(b *batch, unwanted []kernel.ServerKey) map[kernel.ServerKey]*plan.ServicePort {
	found := make(map[kernel.ServerKey]*plan.ServicePort)
	for _, key := range unwanted {
		if key.Mark == 0 {
			found[key] = nil
		}
	}
	for _, r := range b.new {
		if len(found) == 0 || r == nil {
			continue
		}
		for i := range r.port.Frontends {
			fe := r.port.Frontends[i].Key(r.port.Name.Protocol)
			key := kernel.ServerKey{Addr: fe.Addr, Port: fe.Port, Protocol: fe.Protocol}
			if _, is := found[key]; is {
				found[key] = r.port
			}
		}
	}
	return found
}

// drains says whether a destination that gets no new connections may wait for
// the end of those it has.
func (st *state) drains(key kernel.ServerKey, dest netip.AddrPort) bool {
	name, is := st.replaced[key]
	if !is || key.Protocol != plan.UDP {
		return true
	}
	r := st.records[name]
	return r != nil && contains(r.port.Usable, dest)
}

// diffElements compares the elements of the batch's records before and after.
func (st *state) diffElements(b *batch) {
	var order []nft.ElementID
	count := func(r *record, by int) {
		if r == nil {
			return
		}
		for i := range r.elements {
			e := &r.elements[i]
			k := e.ID()
			u, seen := b.uses[k]
			if !seen {
				u = st.uses[k]
				order = append(order, k)
			}
			u.count += by
			if by > 0 {
				u.element = *e
			}
			b.uses[k] = u
		}
	}
	for _, r := range b.old {
		count(r, -1)
	}
	for _, r := range b.new {
		count(r, 1)
	}
	for _, k := range order {
		before, after := st.uses[k], b.uses[k]
		changed := before.element.Data != after.element.Data
		if before.count > 0 && (after.count == 0 || changed) {
			b.remove = append(b.remove, before.element)
		}
		if after.count > 0 && (before.count == 0 || changed) {
			b.add = append(b.add, after.element)
		}
	}
}

func (st *state) diffVIPs(b *batch) {
	seen := make(map[netip.Addr]bool)
	for _, r := range b.new {
		if r == nil {
			continue
		}
		for _, a := range r.vips {
			if !st.held[a] && !seen[a] {
				seen[a] = true
				b.newVIPs = append(b.newVIPs, a)
			}
		}
	}
}

// note keeps up with one message that the kernel has followed.
func (st *state) note(o kernel.Op) {
	id := o.Key.ID()
	s := st.servers[id]
	switch o.Verb {
	case kernel.AddServer:
		st.addServer(id, &server{scheduler: o.Scheduler, dests: make(map[netip.AddrPort]int)})
	case kernel.SetServer:
		s.scheduler = o.Scheduler
	case kernel.AddDestination, kernel.SetDestination:
		s.dests[o.Destination] = o.Weight
		st.noteEndpoint(id, o.Destination)
	case kernel.RemoveDestination:
		delete(s.dests, o.Destination)
	case kernel.RemoveServer:
		delete(st.servers, id)
		delete(st.replaced, id)
		st.forgetServer(id)
	}
}

func (st *state) addServer(key kernel.ServerKey, s *server) {
	st.servers[key] = s
	if key.Mark != 0 {
		st.pool.hold(key.Mark)
	}
}

func (st *state) noteEndpoint(key kernel.ServerKey, dest netip.AddrPort) {
	if !isSticky(key.Mark) || key.Mark&endpointFlag == 0 {
		return
	}
	block := baseOf(key.Mark)
	if st.endpoints[block] == nil {
		st.endpoints[block] = make(map[netip.AddrPort]uint32)
	}
	st.endpoints[block][dest] = key.Mark
}

func (st *state) forgetServer(key kernel.ServerKey) {
	if key.Mark == 0 {
		return
	}
	st.pool.release(key.Mark)
	block := baseOf(key.Mark)
	maps.DeleteFunc(st.endpoints[block], func(_ netip.AddrPort, mark uint32) bool { return mark == key.Mark })
	if len(st.endpoints[block]) == 0 {
		delete(st.endpoints, block)
	}
}

// commit makes the state remember that the batch is in the kernel.
func (st *state) commit(b *batch, now time.Time) {
	st.others = nil
	for i, name := range b.names {
		st.replace(name, b.old[i], b.new[i])
	}
	for k, u := range b.uses {
		if u.count > 0 {
			st.uses[k] = u
		} else {
			delete(st.uses, k)
		}
	}
	for _, o := range b.grow {
		st.undrain(o)
	}
	for _, o := range b.shrink {
		if o.Verb == kernel.SetDestination {
			st.drain(o.Key.ID(), o.Destination, now)
		} else {
			st.undrain(o)
		}
	}
	if b.all {
		for key, s := range st.servers {
			for dest, weight := range s.dests {
				if weight == 0 {
					st.drain(key, dest, now)
				}
			}
		}
	}
	st.leave(b, now)
}

func (st *state) replace(name plan.ServicePortName, old, r *record) {
	if old != nil {
		delete(st.records, name)
		st.giveBack(old)
		for _, a := range old.vips {
			if st.wanted[a]--; st.wanted[a] == 0 {
				delete(st.wanted, a)
			}
		}
		for i := range old.servers {
			// Another Service port of the batch may have it by now.
			delete(st.live, old.servers[i].key.ID())
		}
	}
	if r != nil {
		st.records[name] = r
		for _, a := range r.vips {
			st.wanted[a]++
		}
	}
}

// leave notes which addresses nobody wants, and which servers are wanted.
func (st *state) leave(b *batch, now time.Time) {
	for _, r := range b.new {
		for i := range serversOf(r) {
			st.live[r.servers[i].key.ID()] = true
		}
		if r != nil {
			for _, a := range r.vips {
				delete(st.leaving, a)
			}
		}
	}
	for _, r := range b.old {
		if r == nil {
			continue
		}
		var keys []kernel.ServerKey
		for i := range r.servers {
			keys = append(keys, r.servers[i].key.ID())
		}
		for _, a := range r.vips {
			if st.wanted[a] == 0 && st.held[a] {
				st.leaveAddress(a, keys, now)
			}
		}
	}
	if !b.all {
		return
	}
	for a := range st.held {
		if _, already := st.leaving[a]; st.wanted[a] == 0 && !already {
			st.leaveAddress(a, nil, now)
		}
	}
}

// leaveAddress holds an address for connections through the given servers, and through
// servers that its Service had earlier: a Service can lose its endpoints before it goes.
func (st *state) leaveAddress(a netip.Addr, servers []kernel.ServerKey, now time.Time) {
	servers = slices.Concat(st.leaving[a].servers, servers, st.serversAt(a))
	st.leaving[a] = leaving{servers: servers, until: now.Add(addressBound)}
}

// serversAt lists the draining servers that may hold connections to an address. A mark
// does not tell for which addresses its server is.
func (st *state) serversAt(a netip.Addr) []kernel.ServerKey {
	var keys []kernel.ServerKey
	for key := range st.draining {
		if key.Mark != 0 || key.Addr == a {
			keys = append(keys, key)
		}
	}
	return keys
}
