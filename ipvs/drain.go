// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"time"

	"signalbox/ipvs/internal/kernel"
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

const (
	// drainBound limits how long a destination drains. An endpoint that is gone may never
	// end its connections.
	drainBound = 24 * time.Hour
	// addressBound limits how long an address drains that shares a virtual server with
	// addresses in use. It is the time after which IPVS forgets an idle TCP connection.
	addressBound = 15 * time.Minute
	// drainPeriod is the time between two counts of connections.
	drainPeriod = time.Second
)

// drainingAddr is an address that lost its Service, and that connections may need.
type drainingAddr struct {
	servers []kernel.ServerKey // that may have connections to it
	end     time.Time
}

// commitAddrs lets the addresses drain that no Service port has any longer.
func (st *state) commitAddrs(b *batch, now time.Time) {
	servers := make(map[netip.Addr][]kernel.ServerKey) // of the addresses that start to drain
	for _, a := range b.unusedAddrs {
		servers[a] = nil
	}
	if b.all {
		for a := range st.onDevice {
			if _, draining := st.drainingAddrs[a]; !draining {
				servers[a] = nil
			}
		}
	}
	for _, a := range b.usedAddrs {
		delete(servers, a)
		delete(st.drainingAddrs, a)
	}
	for _, r := range b.old {
		if r == nil || len(servers) == 0 {
			continue
		}
		for _, a := range r.virtualAddrs() {
			if _, starts := servers[a]; starts {
				for i := range r.servers {
					servers[a] = append(servers[a], r.servers[i].key.ID())
				}
			}
		}
	}
	for a, list := range servers {
		st.drainingAddrs[a] = drainingAddr{append(list, st.drainingServersOf(a)...), now.Add(addressBound)}
	}
}

// virtualAddrs lists the addresses of the device that a record uses.
func (r *record) virtualAddrs() []netip.Addr {
	_, addrs := cutAddrs(slices.Clone(r.elements))
	return addrs
}

// drainingServersOf lists the draining servers that may have connections to an address. They
// are of an earlier Service port: a Service can lose its endpoints before it is deleted. It is
// unknown which addresses lead to a server by mark.
func (st *state) drainingServersOf(a netip.Addr) (keys []kernel.ServerKey) {
	for key := range st.draining {
		if key.Mark != 0 || key.Addr == a {
			keys = append(keys, key)
		}
	}
	return keys
}

// drainLoop runs drainOnce while something drains, until Close.
func (p *Proxier) drainLoop() {
	defer close(p.done)
	timer := time.NewTimer(0)
	timer.Stop()
	armed := false
	for {
		select {
		case <-p.stop:
			timer.Stop()
			return
		case <-p.wake:
			if !armed {
				armed = true
				timer.Reset(drainPeriod)
			}
		case <-timer.C:
			began := time.Now()
			armed = p.drainOnce(began)
			if armed {
				// Counting takes at most a twentieth of one processor.
				timer.Reset(max(drainPeriod, 20*time.Since(began)))
			}
		}
	}
}

// drainOnce removes draining destinations without connections, unused virtual servers without
// destinations, and addresses without both. It says whether something still drains.
func (p *Proxier) drainOnce(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.current()
	if st == nil {
		return false
	}
	for _, key := range slices.SortedFunc(maps.Keys(st.draining), kernel.ServerKey.Compare) {
		if err := p.drainServer(st, key, now); err != nil {
			slog.Warn("ipvs: cannot remove drained destinations; trying again", "server", key.String(), "error", err)
		}
	}
	if err := p.removeAddrs(st, now); err != nil {
		slog.Warn("ipvs: cannot remove unused addresses; trying again", "device", kernel.DeviceName, "error", err)
	}
	return len(st.draining) > 0 || len(st.drainingAddrs) > 0
}

func (p *Proxier) drainServer(st *state, key kernel.ServerKey, now time.Time) error {
	dests, err := p.ipvs.Destinations(key)
	if err != nil {
		return err
	}
	busy := make(map[netip.AddrPort]bool)
	for _, d := range dests {
		busy[d.Addr] = d.Connections > 0
	}
	var ops []kernel.Op
	for _, dest := range slices.SortedFunc(maps.Keys(st.draining[key]), netip.AddrPort.Compare) {
		if !busy[dest] || !now.Before(st.draining[key][dest]) || st.mustEnd(key, dest) {
			ops = append(ops, kernel.Op{Verb: kernel.RemoveDestination, Key: key, Destination: dest})
		}
	}
	if s := st.servers[key]; len(s.dests) == len(ops) && !s.inUse {
		ops = append(ops, kernel.Op{Verb: kernel.RemoveServer, Key: key})
	}
	return p.ipvs.Send(ops, func(o kernel.Op) { st.executed(o, now) })
}

// mustEnd says whether UDP flows must not wait: a server of kube-proxy drains, and the endpoint
// no longer answers.
func (st *state) mustEnd(key kernel.ServerKey, dest netip.AddrPort) bool {
	name := st.servers[key].replacedBy
	if key.Protocol != plan.UDP || name == (plan.ServicePortName{}) {
		return false
	}
	r := st.records[name]
	return r == nil || !r.port.Usable.Contains(dest)
}

// removeAddrs removes addresses that no connection needs. Their elements are removed last,
// because they refuse packets to the address.
func (p *Proxier) removeAddrs(st *state, now time.Time) error {
	var unused []netip.Addr
	for a, d := range st.drainingAddrs {
		needed := func(key kernel.ServerKey) bool {
			return len(st.draining[key]) > 0 || key.Mark != 0 && st.servers[key] != nil && st.servers[key].inUse
		}
		if !now.Before(d.end) || !slices.ContainsFunc(d.servers, needed) {
			unused = append(unused, a)
		}
	}
	var removed []nft.Element
	err := p.device.Remove(unused, func(a netip.Addr) {
		delete(st.drainingAddrs, a)
		delete(st.onDevice, a)
		removed = append(removed, vipElement(a))
	})
	if len(removed) == 0 {
		return err
	}
	p.table.RemoveElements(removed)
	if err := access.Commit(p.table); err != nil {
		p.stale, p.unrepaired = true, true // this is no Sync, which the Loop would try again
		return err
	}
	return err
}
