// SPDX-License-Identifier: Apache-2.0

package conntrack

import (
	"net/netip"
	"testing"

	"signalbox/proxier/plan"
)

func endpoints(at ...string) *plan.EndpointSet {
	set := &plan.EndpointSet{}
	for _, a := range at {
		set.Endpoints = append(set.Endpoints, plan.Endpoint{AddrPort: netip.MustParseAddrPort(a)})
	}
	return set
}

func key(at string) plan.FrontendKey {
	a := netip.MustParseAddrPort(at)
	return plan.FrontendKey{Addr: a.Addr(), Port: a.Port(), Protocol: plan.UDP}
}

func nodePort(port uint16) plan.FrontendKey {
	return plan.FrontendKey{Port: port, Protocol: plan.UDP}
}

func TestStale(t *testing.T) {
	usable := endpoints("10.0.0.1:53", "10.0.0.2:53", "10.0.0.2:5353", "10.0.0.9:53")
	d := tasks{
		key("10.96.0.10:53"):   {usable: usable},
		key("10.96.0.11:53"):   {usable: endpoints()},
		key("10.96.0.12:53"):   {},
		key("[fd00::10]:53"):   {usable: endpoints("[fd01::1]:53")},
		key("192.0.2.1:30053"): {usable: endpoints("10.0.0.7:53")},
		nodePort(30053):        {usable: usable},
	}
	local := func(a netip.Addr) bool {
		return a == netip.MustParseAddr("192.0.2.1") || a == netip.MustParseAddr("192.0.2.2")
	}
	relay := netip.MustParsePrefix("251.0.0.0/8").Contains
	tests := map[string]struct {
		to, from string
		answered bool
		want     bool
	}{
		"answered by a usable endpoint":               {"10.96.0.10:53", "10.0.0.1:53", true, false},
		"not yet answered by a usable endpoint":       {"10.96.0.10:53", "10.0.0.2:5353", false, false},
		"the last of the usable endpoints":            {"10.96.0.10:53", "10.0.0.9:53", true, false},
		"answered by an endpoint that is gone":        {"10.96.0.10:53", "10.0.0.3:53", true, true},
		"another port of a usable endpoint":           {"10.96.0.10:53", "10.0.0.1:54", true, true},
		"made before the Service existed":             {"10.96.0.10:53", "10.96.0.10:53", false, true},
		"made before, and answered by the way":        {"10.96.0.10:53", "10.96.0.10:53", true, true},
		"another port of the virtual IP":              {"10.96.0.10:54", "10.0.0.3:53", true, false},
		"taken in by a relay":                         {"10.96.0.10:53", "251.0.0.1:10363", true, false},
		"node port, taken in by a relay":              {"192.0.2.2:30053", "251.0.0.1:10363", true, false},
		"taken in by a relay, nobody left to serve":   {"10.96.0.11:53", "251.0.0.1:10363", true, true},
		"nobody left to serve":                        {"10.96.0.11:53", "10.0.0.1:53", true, true},
		"no set at all":                               {"10.96.0.12:53", "10.0.0.1:53", true, true},
		"IPv6, usable":                                {"[fd00::10]:53", "[fd01::1]:53", true, false},
		"IPv6, gone":                                  {"[fd00::10]:53", "[fd01::2]:53", true, true},
		"node port, usable":                           {"192.0.2.2:30053", "10.0.0.1:53", true, false},
		"node port, gone":                             {"192.0.2.2:30053", "10.0.0.3:53", true, true},
		"node port, a daemon of the host":             {"192.0.2.2:30053", "192.0.2.2:30053", true, false},
		"node port, made before and never answered":   {"192.0.2.2:30053", "192.0.2.2:30053", false, true},
		"the same port of another host":               {"198.51.100.1:30053", "198.51.100.1:30053", false, false},
		"the same port of another host, translated":   {"198.51.100.1:30053", "10.0.0.3:53", true, false},
		"an address with the same port wins":          {"192.0.2.1:30053", "10.0.0.7:53", true, false},
		"an address with the same port wins, removed": {"192.0.2.1:30053", "10.0.0.1:53", true, true},
		"somebody else's flow":                        {"198.51.100.1:53", "198.51.100.1:53", true, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			f := &flow{to: netip.MustParseAddrPort(tt.to), from: netip.MustParseAddrPort(tt.from), protocol: plan.UDP, answered: tt.answered}
			if got := d.stale(f, local, relay); got != tt.want {
				t.Errorf("stale = %v, want %v", got, tt.want)
			}
		})
	}
}

// TestStaleTCP: of TCP connections, only those to removed endpoints end. An endpoint that
// was removed in an earlier change still is, unless it came back.
func TestStaleTCP(t *testing.T) {
	d := tasks{}
	frontend, node := key("10.96.0.10:53"), nodePort(30053)
	frontend.Protocol, node.Protocol = plan.TCP, plan.TCP
	at := func(list ...string) (out []netip.AddrPort) {
		for _, a := range list {
			out = append(out, netip.MustParseAddrPort(a))
		}
		return out
	}
	for _, k := range []plan.FrontendKey{frontend, node} {
		d.put(k, task{usable: endpoints("10.0.0.1:53"), removed: at("10.0.0.3:53", "10.0.0.2:53")})
		d.put(k, task{usable: endpoints("10.0.0.2:53"), removed: at("10.0.0.1:53")})
	}
	for _, tt := range []struct {
		to, from string
		protocol plan.Protocol
		want     bool
	}{
		{"10.96.0.10:53", "10.0.0.1:53", plan.TCP, true},
		{"10.96.0.10:53", "10.0.0.2:53", plan.TCP, false}, // it came back
		{"10.96.0.10:53", "10.0.0.3:53", plan.TCP, true},
		{"10.96.0.10:53", "10.0.0.3:54", plan.TCP, false},
		{"10.96.0.10:53", "10.0.0.4:53", plan.TCP, false}, // another Service's
		{"10.96.0.10:53", "10.96.0.10:53", plan.TCP, false},
		{"10.96.0.10:53", "10.0.0.3:53", plan.UDP, false},
		{"192.0.2.1:30053", "10.0.0.3:53", plan.TCP, true},
		{"198.51.100.1:30053", "10.0.0.3:53", plan.TCP, false},
	} {
		f := &flow{to: netip.MustParseAddrPort(tt.to), from: netip.MustParseAddrPort(tt.from), protocol: tt.protocol, answered: true}
		if got := d.stale(f, func(a netip.Addr) bool { return a == netip.MustParseAddr("192.0.2.1") }, func(netip.Addr) bool { return false }); got != tt.want {
			t.Errorf("%s to %s, answered by %s: stale = %v, want %v", tt.protocol, tt.to, tt.from, got, tt.want)
		}
	}
}

func TestMatchingDoesNotAllocate(t *testing.T) {
	d := tasks{key("10.96.0.10:53"): {usable: endpoints("10.0.0.1:53")}, nodePort(30053): {}}
	flows := []*flow{
		{to: netip.MustParseAddrPort("10.96.0.10:53"), from: netip.MustParseAddrPort("10.0.0.1:53"), protocol: plan.UDP},
		{to: netip.MustParseAddrPort("192.0.2.1:30053"), from: netip.MustParseAddrPort("10.0.0.1:53"), protocol: plan.UDP},
		{to: netip.MustParseAddrPort("192.0.2.1:30080"), from: netip.MustParseAddrPort("10.0.0.1:80"), protocol: plan.TCP},
	}
	local := func(netip.Addr) bool { return true }
	if n := testing.AllocsPerRun(100, func() {
		for _, f := range flows {
			d.stale(f, local, func(netip.Addr) bool { return true })
		}
	}); n != 0 {
		t.Errorf("%v allocations per table entry, want none: tables hold a million", n)
	}
}

// FuzzParse feeds what no kernel would send: the parser must neither panic nor
// call half a flow whole.
func FuzzParse(f *testing.F) {
	f.Add([]byte{2, 0, 0, 0, 4, 0, 1, 0x80})
	f.Add([]byte{2, 0, 0, 0, 0xff, 0xff, 1, 0x80, 3, 0})
	f.Add([]byte{2, 0, 0, 0, 8, 0, 3, 0, 0, 0, 0, 2})
	f.Fuzz(func(t *testing.T, msg []byte) {
		var fl flow
		if !fl.parse(msg) {
			return
		}
		if !fl.to.IsValid() || !fl.from.IsValid() || len(fl.handle) == 0 {
			t.Errorf("%x was read as %+v", msg, fl)
		}
	})
}
