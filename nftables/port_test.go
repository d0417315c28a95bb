// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"net/netip"
	"slices"
	"testing"

	"signalbox/nft/access"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// TestIDsDoNotMeet: the kinds of ids have ranges of their own within ours.
func TestIDsDoNotMeet(t *testing.T) {
	for _, test := range []struct {
		name        string
		first, last uint32
		room        uint32 // how many ids belong to each
		pool        func(*idPools) *access.Pool
	}{
		{"plain", plainFirst, plainLast, 1 << chainBits, func(p *idPools) *access.Pool { return p.plain }},
		{"small", smallFirst, smallLast, 2 * uint32(endpointsPerRange(false)), func(p *idPools) *access.Pool { return p.small }},
		{"large", largeFirst, largeLast, 2 * uint32(endpointsPerRange(true)), func(p *idPools) *access.Pool { return p.large }},
	} {
		pools := newIDPools()
		for _, id := range []uint32{test.first, test.last, test.last + test.room - 1} {
			if id&idSpaceMask != idSpace {
				t.Errorf("%s id %#x is outside of our range", test.name, id)
			}
			if pools.of(id) != test.pool(pools) {
				t.Errorf("%s id %#x is taken for another kind", test.name, id)
			}
		}
	}
	for _, large := range []bool{false, true} {
		if ^rangeMask(large) != endpointFlag(large)|uint32(endpointsPerRange(large)-1) || endpointFlag(large)&chainMask != 0 {
			t.Errorf("large %v: mask %#x, flag %#x and room %d do not fit", large, rangeMask(large), endpointFlag(large), endpointsPerRange(large))
		}
	}
}

// TestSlots: endpoints keep their slots.
func TestSlots(t *testing.T) {
	set := func(ports ...uint16) *plan.EndpointSet {
		s := &plan.EndpointSet{}
		for _, p := range ports {
			s.Endpoints = append(s.Endpoints, plan.Endpoint{AddrPort: netip.AddrPortFrom(netip.IPv4Unspecified(), p)})
		}
		return s
	}
	var before *indexedSet
	for _, test := range []struct{ ports, want []uint16 }{
		{[]uint16{1, 2, 3}, []uint16{1, 2, 3}},
		{[]uint16{2, 3}, []uint16{3, 2}},
		{[]uint16{1, 2, 3, 4}, []uint16{3, 2, 1, 4}},
		{[]uint16{4}, []uint16{4}},
		{[]uint16{5, 6}, []uint16{5, 6}},
		{[]uint16{4, 5}, []uint16{5, 4}},
	} {
		s := &indexedSet{EndpointSet: set(test.ports...)}
		s.order = slotOrder(before, s.EndpointSet)
		var got []uint16
		for slot := range s.Len() {
			got = append(got, s.Endpoints[s.endpoint(slot)].Port())
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("endpoints %v are in slots %v, want %v", test.ports, got, test.want)
		}
		before = s
	}
}

// TestEndpointNumbers: a number of a range comes back into use only after the
// others.
func TestEndpointNumbers(t *testing.T) {
	pools := newIDPools()
	var r *programmedPort
	seen := map[uint32]int{}
	for i := range 200 {
		sp := conformance.FleetService(plan.IPv4, 0, i*10, 10)
		sp.AffinityTimeout = 1e9
		next, err := numberPort(r, sp, pools)
		if err != nil {
			t.Fatal(err)
		}
		if r != nil && next.idRange != r.idRange {
			t.Fatalf("the range changed from %#x to %#x", r.idRange, next.idRange)
		}
		r = next
		for _, n := range r.sets[0].numbers {
			seen[n]++
		}
	}
	if len(seen) != endpointsPerRange(false) {
		t.Errorf("%d numbers were used, want all %d", len(seen), endpointsPerRange(false))
	}
	for n, times := range seen {
		if times > 2 {
			t.Errorf("number %d was given %d times in 2,000", n, times)
		}
	}
}
