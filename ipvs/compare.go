// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"signalbox/internal/wait"
	"signalbox/ipvs/internal/kernel"
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
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
		switch f, exists := have.dests[d.Addr]; {
		case !exists:
			add(kernel.Op{Verb: kernel.AddDestination, Destination: d.Addr, Weight: d.Weight})
		case f != forwardingOf(d):
			add(kernel.Op{Verb: kernel.SetDestination, Destination: d.Addr, Weight: d.Weight})
		}
	}
	draining := 0
	for _, d := range sortedDests(have.dests) {
		if _, found := slices.BinarySearchFunc(want.dests, d, func(d kernel.Destination, a netip.AddrPort) int { return d.Addr.Compare(a) }); found {
			continue
		}
		if want.ends(key.Protocol, d) {
			remove(kernel.Op{Verb: kernel.RemoveDestination, Destination: d})
			continue
		}
		draining++
		if have.dests[d] != (forwarding{}) {
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
			want = &desiredServer{scheduler: s.scheduler, usable: port.Usable, listed: port.Listed, replaced: true}
		}
		b.compareServer(key, s, want)
	}
}

func sortedDests(dests map[netip.AddrPort]forwarding) []netip.AddrPort {
	list := make([]netip.AddrPort, 0, len(dests))
	for d := range dests {
		list = append(list, d)
	}
	slices.SortFunc(list, netip.AddrPort.Compare)
	return list
}

const (
	// comparePeriod is the time between two comparisons with IPVS, which notifies of
	// nothing.
	comparePeriod = 2 * time.Second
	// comparePause is the pause for each moment of a comparison: comparisons take at most
	// half a percent of one processor.
	comparePause = 200
)

// Watch implements proxier.Proxier.
func (p *Proxier) Watch(ctx context.Context, drifted func(proxier.Writer)) {
	var others sync.WaitGroup
	defer others.Wait()
	others.Go(func() { p.watch.Run(ctx, drifted) })
	others.Go(func() {
		p.device.Watch(ctx, p.unexpected, func() error { return p.report("addresses", p.addrsDiffer, drifted) })
	})
	for took := time.Duration(0); wait.For(ctx, max(comparePeriod, comparePause*took)); {
		began := time.Now()
		_ = p.report("virtual servers", p.serversDiffer, drifted) // the next comparison is the retry
		took = time.Since(began)
	}
}

// report calls drifted if the kernel differs from the state.
func (p *Proxier) report(what string, differ func() (bool, error), drifted func(proxier.Writer)) error {
	differs, err := differ()
	if err != nil {
		slog.Debug("ipvs: cannot compare with the kernel; trying again", "compared", what, "family", p.Family.String(), "error", err)
	}
	if differs {
		drifted(proxier.Writer{})
	}
	return err
}

// unexpected says whether a notification contradicts the state. Those of own changes do so
// only if the address has changed again.
func (p *Proxier) unexpected(u netlink.AddrUpdate) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.current()
	a, isVirtual := p.device.VirtualAddr(u)
	return st != nil && isVirtual && st.onDevice[a] != u.NewAddr
}

// addrsDiffer says whether the device has other addresses than the state.
func (p *Proxier) addrsDiffer() (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.current()
	if st == nil {
		return false, nil
	}
	onDevice, _, err := p.device.Addresses()
	return err == nil && !maps.Equal(onDevice, st.onDevice), err
}

// serversDiffer says whether IPVS has other virtual servers or destinations than the state, or
// Repair has not compared yet. It reads them only if the digest of IPVS is another one than the
// last time.
func (p *Proxier) serversDiffer() (differ bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.current()
	if st == nil || p.unrepaired {
		return p.unrepaired, nil
	}
	digest, err := p.ipvs.Digest()
	if err != nil || digest != 0 && digest == p.digest {
		return false, err
	}
	differ, err = p.listingDiffers(st)
	if err == nil {
		p.digest = digest
	}
	return differ, err
}

// listingDiffers compares the listing with the state. Servers that the listing lacks are asked
// for one by one.
func (p *Proxier) listingDiffers(st *state) (bool, error) {
	listed, err := p.ipvs.Listing()
	if err != nil {
		return false, err
	}
	var schedulers map[kernel.ServerKey]string
	for key := range listed {
		if st.servers[key] == nil && (isOurs(key.Mark) || st.onDevice[key.Addr]) {
			return true, nil
		}
	}
	for key, s := range st.servers {
		if s.is(listed[key]) {
			continue
		}
		if schedulers == nil {
			if schedulers, err = p.ipvs.Servers(); err != nil {
				return false, err
			}
		}
		dests, err := p.ipvs.Destinations(key)
		if err != nil || !s.is(kernel.Server{Scheduler: schedulers[key], Destinations: dests}) {
			return err == nil, err
		}
	}
	return false, nil
}

// is says whether the kernel has the server as the state has it.
func (s *server) is(k kernel.Server) bool {
	return k.Scheduler == s.scheduler && len(k.Destinations) == len(s.dests) && !slices.ContainsFunc(k.Destinations, func(d kernel.Destination) bool {
		f, found := s.dests[d.Addr]
		return !found || f != forwardingOf(d)
	})
}

// Repair implements proxier.Proxier. It only compares: a Sync of everything reads IPVS and
// the addresses, and writes what differs. If kube-proxy's ipvs mode has started, the daemon
// decides who serves.
func (p *Proxier) Repair(context.Context) (proxier.Difference, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.state
	if st == nil {
		return proxier.Difference{}, nil
	}
	if p.unrepaired = kernel.HasKubeProxySets(p.Family); p.unrepaired {
		return proxier.Difference{}, nil
	}
	found, err := p.watch.Compare(st.rules.chains(), st.tableElements)
	if err != nil {
		return proxier.Difference{}, err
	}
	have, err := p.readAgain(st)
	if err != nil {
		return proxier.Difference{Objects: found}, err
	}
	found = append(found, st.differences(have)...)
	if p.stale && len(found) == 0 {
		p.stale = false // the failed write has left what the state says
		wait.Wake(p.wake)
	}
	return proxier.Difference{Objects: found, NeedsFullWrite: len(found) > 0}, nil
}

// Compare implements proxier.Proxier.
func (p *Proxier) Compare(_ context.Context, about ...plan.ServicePortName) (c proxier.Comparison, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.state
	if st == nil {
		return c, proxier.ErrNothingWritten
	}
	c, err = access.Compare(p.table, st.rules.chains(), st.tableElements, about, func(name plan.ServicePortName, emit func(nft.Element)) {
		if r := st.records[name]; r != nil {
			for _, e := range r.elements {
				emit(e)
			}
		}
	})
	if err != nil {
		return c, err
	}
	have, err := p.readAgain(st)
	if err != nil {
		return c, err
	}
	wanted, found := st.lines(st, about), st.lines(have, about)
	for _, line := range slices.Sorted(maps.Keys(wanted)) {
		switch {
		case !found[line]:
			c.Differences = append(c.Differences, "-"+line)
		case len(about) > 0:
			c.Holds = append(c.Holds, line)
		}
	}
	for _, line := range slices.Sorted(maps.Keys(found)) {
		if !wanted[line] {
			c.Differences = append(c.Differences, "+"+line)
		}
	}
	return c, nil
}

// readAgain reads virtual servers and addresses as a start would.
func (p *Proxier) readAgain(st *state) (*state, error) {
	desired := &plan.Plan{Family: p.Family, Services: make(map[plan.ServicePortName]*plan.ServicePort)}
	for name, r := range st.records {
		desired.Services[name] = r.port
	}
	have, _, err := p.read(st.rules, desired)
	return have, err
}

// lines has the commands that make another state's virtual servers and addresses: all, or
// those of the named Service ports.
func (st *state) lines(of *state, about []plan.ServicePortName) map[string]bool {
	keys, addrs := map[kernel.ServerKey]bool{}, map[netip.Addr]bool{}
	for _, name := range about {
		r := st.records[name]
		if r == nil {
			continue
		}
		for i := range r.servers {
			keys[r.servers[i].key.ID()] = true
		}
		for i := range r.port.Frontends {
			addrs[r.port.Frontends[i].Addr] = true
		}
	}
	lines := make(map[string]bool)
	add := func(o kernel.Op) { lines["ipvsadm "+o.String()] = true }
	for key, s := range of.servers {
		if len(about) > 0 && !keys[key.ID()] {
			continue
		}
		add(kernel.Op{Verb: kernel.AddServer, Key: key, Scheduler: s.scheduler})
		for addr, f := range s.dests {
			add(kernel.Op{Verb: kernel.AddDestination, Key: key, Destination: addr, Weight: int(f.weight), Method: f.method})
		}
	}
	for a := range of.onDevice {
		if len(about) == 0 || addrs[a] {
			lines[fmt.Sprintf("ip addr add %s/%d dev %s", a, a.BitLen(), kernel.DeviceName)] = true
		}
	}
	return lines
}

// tableElements hands out the elements that the table should have.
func (st *state) tableElements(emit func(nft.Element)) {
	for _, e := range st.rules.NodeElements() {
		emit(e)
	}
	for a := range st.onDevice {
		emit(vipElement(a))
	}
	elements := access.NewElements(newSets())
	for _, r := range st.records {
		others, _ := cutAddrs(slices.Clone(r.elements))
		for _, e := range others {
			if elements.Add(&e) {
				emit(e)
			}
		}
	}
}

// differences says what of virtual servers and addresses the kernel lacks, and what it has
// too much.
func (st *state) differences(have *state) (texts []string) {
	var servers, altered, addrs int
	for key, s := range st.servers {
		switch h := have.servers[key]; {
		case h == nil:
			servers++
		case h.scheduler != s.scheduler || !maps.Equal(h.dests, s.dests):
			altered++
		}
	}
	for a := range st.onDevice {
		if !have.onDevice[a] {
			addrs++
		}
	}
	for _, d := range []struct {
		n    int
		text string
	}{
		{servers, "%d virtual servers are missing"},
		{altered, "%d virtual servers have other options or other destinations"},
		{len(have.servers) - len(st.servers) + servers, "%d virtual servers are not signalbox's"},
		{addrs, "%d addresses of " + kernel.DeviceName + " are missing"},
		{len(have.onDevice) - len(st.onDevice) + addrs, "%d addresses of " + kernel.DeviceName + " are not signalbox's"},
	} {
		if d.n > 0 {
			texts = append(texts, fmt.Sprintf(d.text, d.n))
		}
	}
	return texts
}
