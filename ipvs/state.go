// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"cmp"
	"log/slog"
	"maps"
	"net/netip"
	"time"

	"signalbox/ipvs/internal/kernel"
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// state is what a Proxier knows of the kernel.
type state struct {
	rules   *ruleset
	marks   *markPool
	records map[plan.ServicePortName]*record
	// elements compares elements of the table; elementCount counts all but vips and those
	// of the node.
	elements     *access.Elements
	elementCount int
	// servers are the mode's virtual servers.
	servers map[kernel.ServerKey]*server
	// onDevice are the addresses of the device.
	onDevice map[netip.Addr]bool
	// draining are the destinations of servers that have weight 0, each with the time when
	// it is removed in spite of open connections.
	draining map[kernel.ServerKey]map[netip.AddrPort]time.Time
	// drainingAddrs are the addresses of onDevice that no Service port has.
	drainingAddrs map[netip.Addr]drainingAddr
}

// server is a virtual server in the kernel.
type server struct {
	scheduler string // with foreign options, see kernel.IPVS.Servers
	dests     map[netip.AddrPort]forwarding
	inUse     bool // by a record
	// replacedBy is the Service port whose servers by mark replace this server by address
	// of kube-proxy, or zero.
	replacedBy plan.ServicePortName
}

// forwarding is what a destination gets, and how.
type forwarding struct {
	weight int32
	method kernel.Method
}

func forwardingOf(d kernel.Destination) forwarding { return forwarding{int32(d.Weight), d.Method} }

func newState(rules *ruleset) *state {
	return &state{
		rules: rules, marks: newMarkPool(), elements: access.NewElements(newSets()),
		records: make(map[plan.ServicePortName]*record), servers: make(map[kernel.ServerKey]*server),
		onDevice: make(map[netip.Addr]bool),
		draining: make(map[kernel.ServerKey]map[netip.AddrPort]time.Time), drainingAddrs: make(map[netip.Addr]drainingAddr),
	}
}

// read makes a state from the kernel: virtual servers at addresses of the device or with a mark
// of this mode, whoever added them. Servers of the plan at other addresses are there if a
// Sync failed before it added the address. What drained before keeps its time. others are
// the addresses of other devices.
func (p *Proxier) read(rules *ruleset, desired *plan.Plan) (st *state, others map[netip.Addr]bool, err error) {
	st = newState(rules)
	old := cmp.Or(p.state, st)
	if st.onDevice, others, err = p.device.Addresses(); err != nil {
		return nil, nil, err
	}
	for a := range st.onDevice {
		if d, draining := old.drainingAddrs[a]; draining {
			st.drainingAddrs[a] = d
		}
	}
	all, err := p.ipvs.Servers()
	if err != nil {
		return nil, nil, err
	}
	listed, err := p.ipvs.Listing()
	if err != nil {
		slog.Warn("ipvs: cannot read the list of all destinations; asking for those of each virtual server, which takes longer",
			"family", p.Family.String(), "error", err)
		listed = nil
	}
	planned := make(map[kernel.ServerKey]bool)
	for name, sp := range desired.Services {
		for i := range sp.Frontends {
			planned[kernel.ServerKey{Addr: sp.Frontends[i].Addr, Port: sp.Frontends[i].Port, Protocol: name.Protocol}] = true
		}
	}
	now := p.now()
	for key, scheduler := range all {
		if !isOurs(key.Mark) && !st.onDevice[key.Addr] && (others[key.Addr] || !planned[key]) {
			continue
		}
		dests := listed[key].Destinations
		if len(dests) == 0 {
			if dests, err = p.ipvs.Destinations(key); err != nil {
				return nil, nil, err
			}
		}
		st.addServer(key, scheduler)
		for _, d := range dests {
			end, known := old.draining[key][d.Addr]
			if !known {
				end = now.Add(drainBound)
			}
			st.setDestination(key, d.Addr, forwardingOf(d), end)
		}
	}
	return st, others, nil
}

// oldMarks finds the marks that frontends have in the kernel. If this process has not written
// the table, it reads the table.
func (p *Proxier) oldMarks() (map[markKey]uint32, error) {
	found := make(map[markKey]uint32)
	if p.state != nil {
		for _, r := range p.state.records {
			maps.Copy(found, r.marks)
		}
		return found, nil
	}
	for set, internal := range map[nft.SetID]bool{marks: false, nodePortMarks: false, internalMarks: true, internalNodePortMarks: true} {
		elements, err := p.table.Read(set)
		if err != nil {
			return found, err
		}
		for _, e := range elements {
			if len(e.Val) == 4 {
				fe := access.FrontendOfBytes(p.IPFamily, e.Key, set == nodePortMarks || set == internalNodePortMarks)
				found[markKey{fe, internal}] = nft.MarkOfData(e.Val)
			}
		}
	}
	return found, nil
}

// endpointMarks finds the marks that endpoints of a Service port have in the kernel.
func (st *state) endpointMarks(firstMark uint32) map[netip.AddrPort]uint32 {
	found := make(map[netip.AddrPort]uint32)
	for i := range uint32(maxKnownEndpoints) {
		mark := firstMark | endpointFlag | i
		if s := st.servers[kernel.ServerKey{Mark: mark}]; s != nil {
			for endpoint := range s.dests {
				found[endpoint] = mark
			}
		}
	}
	return found
}

// executed follows a message that the kernel has executed.
func (st *state) executed(o kernel.Op, now time.Time) {
	key := o.Key.ID()
	switch o.Verb {
	case kernel.AddServer:
		st.addServer(key, o.Scheduler)
	case kernel.SetServer:
		st.servers[key].scheduler = o.Scheduler
	case kernel.AddDestination, kernel.SetDestination:
		st.setDestination(key, o.Destination, forwarding{int32(o.Weight), o.Method}, now.Add(drainBound))
	case kernel.RemoveDestination:
		delete(st.servers[key].dests, o.Destination)
		st.stopDraining(key, o.Destination)
	case kernel.RemoveServer:
		delete(st.servers, key)
		delete(st.draining, key)
		if key.Mark != 0 {
			st.marks.release(key.Mark)
		}
	}
}

func (st *state) addServer(key kernel.ServerKey, scheduler string) {
	st.servers[key] = &server{scheduler: scheduler, dests: make(map[netip.AddrPort]forwarding)}
	if key.Mark != 0 {
		st.marks.hold(key.Mark)
	}
}

// setDestination sets the forwarding. A destination whose weight becomes 0 drains until end.
func (st *state) setDestination(key kernel.ServerKey, dest netip.AddrPort, f forwarding, end time.Time) {
	st.servers[key].dests[dest] = f
	if f.weight > 0 {
		st.stopDraining(key, dest)
		return
	}
	if st.draining[key] == nil {
		st.draining[key] = make(map[netip.AddrPort]time.Time)
	}
	st.draining[key][dest] = end
}

func (st *state) stopDraining(key kernel.ServerKey, dest netip.AddrPort) {
	delete(st.draining[key], dest)
	if len(st.draining[key]) == 0 {
		delete(st.draining, key)
	}
}

// commit replaces the records of a batch that the kernel has.
func (st *state) commit(b *batch, now time.Time) {
	st.rules = b.rules
	st.elements.Commit(b.Difference)
	st.elementCount += len(b.Add) - len(b.Remove)
	for i, r := range b.old {
		st.marks.releaseAll(r)
		delete(st.records, b.names[i])
		st.setInUse(r, false)
	}
	for i, r := range b.new {
		if r != nil {
			st.records[b.names[i]] = r
			st.setInUse(r, true)
		}
	}
	st.commitAddrs(b, now)
}

func (st *state) setInUse(r *record, inUse bool) {
	if r == nil {
		return
	}
	for i := range r.servers {
		if s := st.servers[r.servers[i].key.ID()]; s != nil {
			s.inUse = inUse
		}
	}
}

func (st *state) counts() []proxier.KernelObjects {
	if st == nil {
		return nil
	}
	dests := 0
	for _, s := range st.servers {
		dests += len(s.dests)
	}
	return []proxier.KernelObjects{
		{Kind: "virtual-server", Count: len(st.servers)},
		{Kind: "real-server", Count: dests},
		{Kind: "address", Count: len(st.onDevice)},
		{Table: tableName, Kind: "element", Count: st.elementCount + len(st.onDevice) + len(st.rules.NodeElements())},
	}
}
