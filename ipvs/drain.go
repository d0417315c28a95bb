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
)

const (
	// drainBound is how long a connection can outlive its endpoint's place in a
	// Service: an endpoint that is still there ends it itself; one that is not
	// may never.
	drainBound = 24 * time.Hour
	// addressBound is how long an address that lost its Service is held for the
	// sake of connections to it that are in a virtual server that other
	// addresses lead to as well: the time after which IPVS forgets an idle TCP
	// connection.
	addressBound = 15 * time.Minute
	// drainPeriod is how often open connections are counted, while there are
	// destinations that wait for their end.
	drainPeriod = time.Second
)

// deadlines are until when at most destinations and addresses wait for the end
// of connections. They outlive the state: each writing of everything makes a new
// one, and a destination would get its whole time again.
type deadlines struct {
	draining map[kernel.ServerKey]map[netip.AddrPort]time.Time
	leaving  map[netip.Addr]leaving
}

// leaving is an address that no Service has any more, but that open connections
// may need.
type leaving struct {
	servers []kernel.ServerKey // those that it led to
	until   time.Time
}

func newDeadlines() *deadlines {
	return &deadlines{draining: make(map[kernel.ServerKey]map[netip.AddrPort]time.Time), leaving: make(map[netip.Addr]leaving)}
}

// keepDeadlines takes the deadlines of an earlier state for what still waits in
// the kernel. Others are forgotten: what was in use in between starts anew.
func (st *state) keepDeadlines(d *deadlines) {
	for key, dests := range d.draining {
		maps.DeleteFunc(dests, func(dest netip.AddrPort, _ time.Time) bool {
			weight, exists := st.weight(key, dest)
			return !exists || weight > 0
		})
		if len(dests) == 0 {
			delete(d.draining, key)
		}
	}
	maps.DeleteFunc(d.leaving, func(a netip.Addr, _ leaving) bool { return !st.held[a] })
	st.deadlines = d
}

func (st *state) weight(key kernel.ServerKey, dest netip.AddrPort) (weight int, exists bool) {
	if s := st.servers[key]; s != nil {
		weight, exists = s.dests[dest]
	}
	return weight, exists
}

func (st *state) drain(key kernel.ServerKey, dest netip.AddrPort, now time.Time) {
	if st.draining[key] == nil {
		st.draining[key] = make(map[netip.AddrPort]time.Time)
	}
	if _, already := st.draining[key][dest]; !already {
		st.draining[key][dest] = now.Add(drainBound)
	}
}

// undrain forgets a destination that is in use again, or gone.
func (st *state) undrain(o kernel.Op) {
	key := o.Key.ID()
	delete(st.draining[key], o.Destination)
	if len(st.draining[key]) == 0 || o.Verb == kernel.RemoveServer {
		delete(st.draining, key)
	}
}

func (p *Proxier) wakeDrain() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// drainLoop ends what has drained, until Close.
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
				// Counting takes a twentieth of one processor and no more.
				timer.Reset(max(drainPeriod, 20*time.Since(began)))
			}
		}
	}
}

// drainOnce removes destinations without connections, virtual servers without
// destinations, and addresses without either. It says whether anything is left
// to wait for.
func (p *Proxier) drainOnce(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.state
	if st == nil {
		return false
	}
	for _, key := range slices.SortedFunc(maps.Keys(st.draining), kernel.ServerKey.Compare) {
		if err := p.drainServer(st, key, now); err != nil {
			slog.Warn("ipvs: cannot end what has drained; trying again", "server", key.String(), "error", err)
		}
	}
	if err := p.releaseAddresses(st, now); err != nil {
		slog.Warn("ipvs: cannot give up an address; trying again", "device", kernel.DeviceName, "error", err)
	}
	return len(st.draining) > 0 || len(st.leaving) > 0
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
	waiting := st.draining[key]
	for _, dest := range slices.SortedFunc(maps.Keys(waiting), netip.AddrPort.Compare) {
		if busy[dest] && now.Before(waiting[dest]) && st.drains(key, dest) {
			continue
		}
		if err := p.ipvs.Send([]kernel.Op{{Verb: kernel.RemoveDestination, Key: key, Destination: dest}}, st.note); err != nil {
			return err
		}
		delete(waiting, dest)
	}
	if len(waiting) > 0 {
		return nil
	}
	delete(st.draining, key)
	if s := st.servers[key]; s != nil && len(s.dests) == 0 && !st.live[key] {
		return p.ipvs.Send([]kernel.Op{{Verb: kernel.RemoveServer, Key: key}}, st.note)
	}
	return nil
}

// releaseAddresses gives up addresses that no connection needs. The rules that
// refuse what comes for them go last.
func (p *Proxier) releaseAddresses(st *state, now time.Time) error {
	var unused []netip.Addr
	for a, l := range st.leaving {
		if now.Before(l.until) && slices.ContainsFunc(l.servers, func(key kernel.ServerKey) bool {
			return len(st.draining[key]) > 0 || key.Mark != 0 && st.live[key]
		}) {
			continue
		}
		unused = append(unused, a)
	}
	var gone []nft.Element
	err := p.device.Remove(unused, func(a netip.Addr) {
		delete(st.leaving, a)
		delete(st.held, a)
		gone = append(gone, vipElement(a))
	})
	if len(gone) == 0 {
		return err
	}
	p.table.RemoveElements(gone)
	if err := access.Commit(p.table); err != nil {
		p.state = nil // the next Sync writes everything
		return err
	}
	return err
}
