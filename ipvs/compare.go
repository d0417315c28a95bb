package ipvs

import (
	"net/netip"
	"slices"

	"signalbox/ipvs/internal/kernel"
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// batch is the difference between the kernel's state and some Service ports.
type batch struct {
	all, node bool
	rules     *ruleset // after the batch
	names     []plan.ServicePortName
	old, new  []*record // by names; nil for none
	// Difference is about all sets but vips.
	*access.Difference
	// additions are written before the table, removals after it.
	additions, removals []kernel.Op
	// usedAddrs get their first Service port, unusedAddrs lose their last one.
	usedAddrs, unusedAddrs []netip.Addr
	newAddrs               []netip.Addr // of usedAddrs, those that the device lacks
}

// compare finds what changes if the named Service ports get the records.
func (st *state) compare(names []plan.ServicePortName, records []*record) *batch {
	b := &batch{names: names, new: records}
	desired := make(map[kernel.ServerKey]*desiredServer, len(names))
	var keys []kernel.ServerKey
	var before, after []nft.Element
	for _, r := range records {
		if r == nil {
			continue
		}
		after = append(after, r.elements...)
		for i := range r.servers {
			key := r.servers[i].key
			keys, desired[key] = append(keys, key), &r.servers[i]
		}
	}
	for _, name := range names {
		r := st.records[name]
		b.old = append(b.old, r)
		if r == nil {
			continue
		}
		before = append(before, r.elements...)
		for i := range r.servers {
			if key := r.servers[i].key; desired[key] == nil {
				keys = append(keys, key)
			}
		}
	}
	for _, key := range keys {
		b.compareServer(key, st.servers[key.ID()], desired[key])
	}
	b.Difference = st.elements.Compare(before, after)
	b.Add, b.usedAddrs = cutAddrs(b.Add)
	b.Remove, b.unusedAddrs = cutAddrs(b.Remove)
	for _, a := range b.usedAddrs {
		if !st.onDevice[a] {
			b.newAddrs = append(b.newAddrs, a)
		}
	}
	return b
}

// cutAddrs separates the elements of vips from others. An address stays in the set for as long
// as it is on the device.
func cutAddrs(elements []nft.Element) (others []nft.Element, addrs []netip.Addr) {
	others = slices.DeleteFunc(elements, func(e nft.Element) bool {
		if e.Set != vips {
			return false
		}
		a, _ := netip.AddrFromSlice([]byte(e.Key))
		addrs = append(addrs, a)
		return true
	})
	return others, addrs
}

// compareServer compares a virtual server in the kernel with the desired one. have is nil if
// the kernel has none, and want is nil if no Service port needs it. Additions bring new
// connections, removals end them.
//
// A destination that is no longer desired gets the weight 0, with which it keeps its open
// connections; drainOnce removes it.
func (b *batch) compareServer(key kernel.ServerKey, have *server, want *desiredServer) {
	add := func(o kernel.Op) { o.Key = key; b.additions = append(b.additions, o) }
	remove := func(o kernel.Op) { o.Key = key; b.removals = append(b.removals, o) }
	switch {
	case have == nil && want == nil:
		return
	case have == nil:
		have = &server{scheduler: want.scheduler}
		add(kernel.Op{Verb: kernel.AddServer, Scheduler: want.scheduler})
	case want == nil:
		want = &desiredServer{scheduler: have.scheduler, replaced: true}
	}
	if want.scheduler != have.scheduler {
		add(kernel.Op{Verb: kernel.SetServer, Scheduler: want.scheduler})
	}
	for _, d := range want.dests {
		switch weight, exists := have.dests[d.Addr]; {
		case !exists:
			add(kernel.Op{Verb: kernel.AddDestination, Destination: d.Addr, Weight: d.Weight})
		case weight != d.Weight:
			add(kernel.Op{Verb: kernel.SetDestination, Destination: d.Addr, Weight: d.Weight})
		}
	}
	draining := 0
	for _, d := range sortedDests(have.dests) {
		if _, found := slices.BinarySearchFunc(want.dests, d, func(d kernel.Destination, a netip.AddrPort) int { return d.Addr.Compare(a) }); found {
			continue
		}
		if key.Protocol == plan.UDP && !want.usable.Contains(d) {
			remove(kernel.Op{Verb: kernel.RemoveDestination, Destination: d})
			continue
		}
		draining++
		if have.dests[d] != 0 {
			remove(kernel.Op{Verb: kernel.SetDestination, Destination: d})
		}
	}
	if want.replaced && draining == 0 {
		remove(kernel.Op{Verb: kernel.RemoveServer})
	}
}

// compareUnknown removes the virtual servers in the kernel that a batch of all Service ports
// does not need. A server by address of kube-proxy may have been replaced by servers by mark.
// Then UDP flows to usable endpoints stay.
func (st *state) compareUnknown(b *batch) {
	desired := make(map[kernel.ServerKey]bool)
	byAddress := make(map[kernel.ServerKey]*plan.ServicePort)
	for _, r := range b.new {
		for i := range r.servers {
			desired[r.servers[i].key.ID()] = true
		}
		for i := range r.port.Frontends {
			fe := r.port.Frontends[i].Key(r.port.Name.Protocol)
			byAddress[kernel.ServerKey{Addr: fe.Addr, Port: fe.Port, Protocol: fe.Protocol}] = r.port
		}
	}
	var keys []kernel.ServerKey
	for key := range st.servers {
		if !desired[key] {
			keys = append(keys, key)
		}
	}
	slices.SortFunc(keys, kernel.ServerKey.Compare)
	for _, key := range keys {
		s := st.servers[key]
		var want *desiredServer
		if port := byAddress[key]; port != nil {
			s.replacedBy = port.Name
			want = &desiredServer{scheduler: s.scheduler, usable: port.Usable, replaced: true}
		}
		b.compareServer(key, s, want)
	}
}

func sortedDests(dests map[netip.AddrPort]int) []netip.AddrPort {
	list := make([]netip.AddrPort, 0, len(dests))
	for d := range dests {
		list = append(list, d)
	}
	slices.SortFunc(list, netip.AddrPort.Compare)
	return list
}
