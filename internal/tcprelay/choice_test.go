// SPDX-License-Identifier: Apache-2.0

package tcprelay

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"signalbox/proxier/plan"
)

func endpointsAt(ports ...uint16) *plan.EndpointSet {
	s := &plan.EndpointSet{}
	for _, p := range ports {
		s.Endpoints = append(s.Endpoints, plan.Endpoint{AddrPort: at(p)})
	}
	return s
}

func at(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port)
}

var someClient = netip.MustParseAddr("192.0.2.1")

func TestDrawIsEven(t *testing.T) {
	c, set, now := NewChooser(), endpointsAt(1, 2, 3, 4), time.Now()
	for n := range 3 {
		c.health.failed(Peer{At: at(4)}, now) // the last of these makes it unhealthy
		count := map[uint16]int{}
		for range 30000 {
			got, _ := c.Choose(Choice{Endpoints: set}, someClient, nil, now)
			count[got.Port()]++
		}
		wanted := 4
		if n == UnhealthyAfter-1 {
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
	var h = &NewChooser().health
	now := time.Now()
	pass := firstUnhealthy
	for n := range 12 {
		h.failed(Peer{At: at(1)}, now)
		if n < UnhealthyAfter-1 {
			if h.unhealthy(Peer{At: at(1)}, now) {
				t.Fatalf("unhealthy after %d failures", n+1)
			}
			continue
		}
		if !h.unhealthy(Peer{At: at(1)}, now.Add(pass-1)) || h.unhealthy(Peer{At: at(1)}, now.Add(pass)) {
			t.Errorf("after %d failures: not unhealthy for just %s", n+1, pass)
		}
		pass = min(2*pass, MaxUnhealthy)
	}
	h.answered(Peer{At: at(1)})
	if h.unhealthy(Peer{At: at(1)}, now) || h.failing.Load() != 0 {
		t.Error("unhealthy though it answered")
	}
	h.failed(Peer{At: at(2)}, now)
	h.expire(now.Add(forgetFailures + 1))
	if h.failing.Load() != 0 {
		t.Error("an old failure is not forgotten")
	}
}

// An endpoint's UDP port says nothing of its TCP port of the same number.
func TestFailuresAreOfOneProtocol(t *testing.T) {
	c, set, now := NewChooser(), endpointsAt(1, 2), time.Now()
	for range UnhealthyAfter {
		c.health.failed(Peer{plan.UDP, at(1)}, now)
	}
	for _, p := range []plan.Protocol{plan.TCP, plan.UDP} {
		used := map[netip.AddrPort]bool{}
		for range 100 {
			got, _ := c.Choose(Choice{Name: plan.ServicePortName{Protocol: p}, Endpoints: set}, someClient, nil, now)
			used[got] = true
		}
		if used[at(1)] != (p == plan.TCP) {
			t.Errorf("protocol %v: unhealthy is %v", p, !used[at(1)])
		}
	}
}

func TestAllFailing(t *testing.T) {
	c, now := NewChooser(), time.Now()
	for range UnhealthyAfter {
		c.health.failed(Peer{At: at(1)}, now)
		c.health.failed(Peer{At: at(2)}, now)
	}
	set := endpointsAt(1, 2)
	first, ok := c.Choose(Choice{Endpoints: set}, someClient, nil, now)
	second, ok2 := c.Choose(Choice{Endpoints: set}, someClient, []netip.AddrPort{first}, now)
	if !ok || !ok2 || first == second {
		t.Errorf("got %s and %s: where all fail, each is still tried once", first, second)
	}
	if got, ok := c.Choose(Choice{Endpoints: set}, someClient, []netip.AddrPort{first, second}, now); ok {
		t.Errorf("got %s a second time", got)
	}
}

func TestAffinityInTime(t *testing.T) {
	c, now := NewChooser(), time.Now()
	sticky := Choice{Name: plan.ServicePortName{Port: "a"}, Affinity: time.Minute, Endpoints: endpointsAt(1, 2, 3, 4, 5, 6, 7, 8)}
	first, _ := c.Choose(sticky, someClient, nil, now)
	for range 50 { // each comes just in time
		now = now.Add(time.Minute - 1)
		c.Expire(now)
		if got, _ := c.Choose(sticky, someClient, nil, now); got != first {
			t.Fatalf("went to %s, was with %s", got, first)
		}
	}
	if got, _ := c.Choose(sticky, someClient, []netip.AddrPort{first}, now); got == first {
		t.Error("got an endpoint that was just tried")
	} else if again, _ := c.Choose(sticky, someClient, nil, now); again != got {
		t.Errorf("went back to %s, though %s had not answered", again, first)
	}
	others := map[netip.AddrPort]bool{}
	for n := range 64 {
		a, _ := c.Choose(sticky, netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", n+100)), nil, now)
		others[a] = true
	}
	if len(others) < 2 {
		t.Error("all clients are with one endpoint")
	}
	c.Expire(now.Add(time.Minute))
	if n := len(c.clients.entries); n != 0 {
		t.Errorf("%d clients are remembered after their time", n)
	}
}
