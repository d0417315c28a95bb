package userspace

import (
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"signalbox/proxier"
)

func endpointsAt(ports ...uint16) *proxier.EndpointSet {
	s := &proxier.EndpointSet{}
	for _, p := range ports {
		s.Endpoints = append(s.Endpoints, proxier.Endpoint{AddrPort: at(p)})
	}
	return s
}

func at(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port)
}

var someClient = netip.MustParseAddr("192.0.2.1")

func TestDrawIsEven(t *testing.T) {
	c, set, now := newChooser(), endpointsAt(1, 2, 3, 4), time.Now()
	for n := range 3 {
		c.health.failed(peer{at: at(4)}, now) // the last of these makes it passed over
		count := map[uint16]int{}
		for range 30000 {
			got, _ := c.choose(&target{}, set, someClient, nil, now)
			count[got.Port()]++
		}
		wanted := 4
		if n == failuresToPass-1 {
			wanted = 3
		}
		for port, seen := range count {
			if share := 30000 / wanted; seen < share*9/10 || seen > share*11/10 {
				t.Errorf("after %d failures: %d of 30000 went to port %d of %d", n+1, seen, port, wanted)
			}
		}
		if len(count) != wanted {
			t.Errorf("after %d failures: %d endpoints were used, want %d", n+1, len(count), wanted)
		}
	}
}

func TestPassingOver(t *testing.T) {
	var h = &newChooser().health
	now := time.Now()
	pass := firstPass
	for n := range 12 {
		h.failed(peer{at: at(1)}, now)
		if n < failuresToPass-1 {
			if h.passedOver(peer{at: at(1)}, now) {
				t.Fatalf("passed over after %d failures", n+1)
			}
			continue
		}
		if !h.passedOver(peer{at: at(1)}, now.Add(pass-1)) || h.passedOver(peer{at: at(1)}, now.Add(pass)) {
			t.Errorf("after %d failures: not passed over for just %s", n+1, pass)
		}
		pass = min(2*pass, longestPass)
	}
	h.answered(peer{at: at(1)})
	if h.passedOver(peer{at: at(1)}, now) || h.failing.Load() != 0 {
		t.Error("passed over though it answered")
	}
	h.failed(peer{at: at(2)}, now)
	h.expire(now.Add(forgetFailures + 1))
	if h.failing.Load() != 0 {
		t.Error("an old failure is not forgotten")
	}
}

// An endpoint's UDP port says nothing of its TCP port of the same number.
func TestFailuresAreOfOneProtocol(t *testing.T) {
	c, set, now := newChooser(), endpointsAt(1, 2), time.Now()
	for range failuresToPass {
		c.health.failed(peer{proxier.UDP, at(1)}, now)
	}
	for _, p := range []proxier.Protocol{proxier.TCP, proxier.UDP} {
		used := map[netip.AddrPort]bool{}
		for range 100 {
			got, _ := c.choose(&target{name: proxier.ServicePortName{Protocol: p}}, set, someClient, nil, now)
			used[got] = true
		}
		if used[at(1)] != (p == proxier.TCP) {
			t.Errorf("protocol %v: passed over is %v", p, !used[at(1)])
		}
	}
}

func TestAllFailing(t *testing.T) {
	c, now := newChooser(), time.Now()
	for range failuresToPass {
		c.health.failed(peer{at: at(1)}, now)
		c.health.failed(peer{at: at(2)}, now)
	}
	set := endpointsAt(1, 2)
	first, ok := c.choose(&target{}, set, someClient, nil, now)
	second, ok2 := c.choose(&target{}, set, someClient, []netip.AddrPort{first}, now)
	if !ok || !ok2 || first == second {
		t.Errorf("got %s and %s: where all fail, each is still tried once", first, second)
	}
	if got, ok := c.choose(&target{}, set, someClient, []netip.AddrPort{first, second}, now); ok {
		t.Errorf("got %s a second time", got)
	}
}

func TestAffinityInTime(t *testing.T) {
	c, now := newChooser(), time.Now()
	sticky := &target{name: proxier.ServicePortName{Port: "a"}, timeout: time.Minute}
	set := endpointsAt(1, 2, 3, 4, 5, 6, 7, 8)
	first, _ := c.choose(sticky, set, someClient, nil, now)
	for range 50 { // each comes just in time
		now = now.Add(time.Minute - 1)
		c.expire(now)
		if got, _ := c.choose(sticky, set, someClient, nil, now); got != first {
			t.Fatalf("went to %s, was with %s", got, first)
		}
	}
	if got, _ := c.choose(sticky, set, someClient, []netip.AddrPort{first}, now); got == first {
		t.Error("got an endpoint that was just tried")
	} else if again, _ := c.choose(sticky, set, someClient, nil, now); again != got {
		t.Errorf("went back to %s, though %s had not answered", again, first)
	}
	others := map[netip.AddrPort]bool{}
	for n := range 64 {
		a, _ := c.choose(sticky, set, netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", n+100)), nil, now)
		others[a] = true
	}
	if len(others) < 2 {
		t.Error("all clients are with one endpoint")
	}
	c.expire(now.Add(time.Minute))
	if n := len(c.clients.entries); n != 0 {
		t.Errorf("%d clients are remembered after their time", n)
	}
}

func TestQuietLog(t *testing.T) {
	var q quietLog
	now := time.Now()
	of := func(n int) remark { return remark{"it fails", proxier.ServicePortName{Port: fmt.Sprint(n)}} }
	if !q.fresh(of(0), now) || q.fresh(of(0), now.Add(quiet-1)) || !q.fresh(of(1), now) {
		t.Error("something is not said once of each Service port")
	}
	for n := range 2 * maxRemarks {
		q.fresh(of(n), now)
	}
	if len(q.last) != maxRemarks {
		t.Errorf("%d remarks are remembered, want %d", len(q.last), maxRemarks)
	}
	if !q.fresh(of(0), now.Add(quiet)) || len(q.last) != 1 {
		t.Error("what was said long ago is not forgotten")
	}
}

func TestLimitsFor(t *testing.T) {
	for _, files := range []uint64{0, 256, 1024, 20000, 1 << 20} {
		l := limitsFor(files)
		used := l.connections.most*filesPerConnection + l.flows.most*filesPerFlow
		if l.connections.most < 1 || l.flows.most < 1 || files > 2*filesKept && used > int64(files-filesKept) {
			t.Errorf("%d files: %d connections and %d flows", files, l.connections.most, l.flows.most)
		}
	}
}

// However many relays a process has for a while, they have no more open than
// one.
func TestRelaysShareLimits(t *testing.T) {
	const files, relays = 20000, 4
	l := limitsFor(files)
	for name, q := range map[string]*quota{"connections": &l.connections, "flows": &l.flows} {
		var open [relays]atomic.Int64
		full := int64(0)
		for q.enter(&open[full%relays]) {
			full++
		}
		if full != q.most || q.enter(&open[1]) {
			t.Errorf("%d %s are open, want %d", full, name, q.most)
		}
		before := open[1].Load()
		q.leave(&open[1])
		if open[1].Load() != before-1 || !q.enter(&open[2]) || q.enter(&open[0]) {
			t.Errorf("what one relay lets go of, another gets once: %s %v", name, []int64{open[0].Load(), open[1].Load(), open[2].Load()})
		}
	}
}

func TestGoneTargetsAreFoundForAWhile(t *testing.T) {
	ts := &targets{byID: map[frontendID]*target{}, gone: map[frontendID]goneTarget{}}
	now := time.Now()
	added := ts.announce([]*target{{id: 1}, {id: 2}})
	if len(added) != 2 || ts.announce([]*target{{id: 1}}) != nil {
		t.Error("announce added what was there, or did not add what was new")
	}
	ts.put(nil, []frontendID{1}, now)
	if ts.find(1, false) != nil || ts.find(1, true) == nil {
		t.Error("a frontend that has gone must be found for late connections, and for nothing else")
	}
	ts.expire(now.Add(handshakeTime + 1))
	if ts.find(1, true) != nil || ts.find(2, false) == nil {
		t.Error("a frontend is found after its time, or another one is not")
	}
}
