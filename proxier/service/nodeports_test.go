// SPDX-License-Identifier: Apache-2.0

package service

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"signalbox/proxier/plan"
)

func TestNodePortAddresses(t *testing.T) {
	local := addrs("127.0.0.1 192.168.0.7 192.168.0.8 10.0.0.1 ::1 fd00::7 fd00::8")
	for _, test := range []struct{ words, v4, v6 string }{
		{"", "all", "all"},
		{"all", "all", "all"},
		{"primary", "192.168.0.8", "fd00::8"},
		{"localhost", "127.0.0.1", "::1"},
		{"primary localhost", "127.0.0.1 192.168.0.8", "::1 fd00::8"},
		{"localhost 10.0.0.0/8", "10.0.0.1 127.0.0.1", "::1"},
		{"primary 10.0.0.9/8", "10.0.0.1 192.168.0.8", "fd00::8"},
		{"primary 192.168.0.0/16", "192.168.0.7 192.168.0.8", "fd00::8"},
		{"localhost all primary", "all", "all"},
		{"primary 0.0.0.0/0", "all", "fd00::8"},
		{"10.0.0.0/8", "10.0.0.1", "all"},
		{"fd00::/16", "all", "fd00::7 fd00::8"},
		{"172.16.0.0/12 ::1/128", "", "::1"},
	} {
		s, err := ParseNodePortAddresses(strings.Fields(test.words))
		if err != nil {
			t.Fatal(err)
		}
		for family, want := range map[plan.Family]string{plan.IPv4: test.v4, plan.IPv6: test.v6} {
			primary := addrs("192.168.0.8 fd00::8")[slices.Index(plan.Families, family)]
			got := s.pick(family, primary, local)
			if got.All != (want == "all") || !got.All && !slices.Equal(got.Addrs, addrs(want)) {
				t.Errorf("%q, %s: %+v, want %q", test.words, family, got, want)
			}
		}
	}
}

// The primary address of a family is a guess where the Node object has none, or
// where --bind-address is a loopback address.
func TestPrimaryNodePortAddressIsNeverLoopback(t *testing.T) {
	s := NodePortSelector{Primary: true}
	for _, primary := range []netip.Addr{{}, netip.MustParseAddr("127.0.0.1")} {
		if got := s.pick(plan.IPv4, primary, addrs("127.0.0.1 192.168.0.7")); got.All || !slices.Equal(got.Addrs, addrs("192.168.0.7")) {
			t.Errorf("primary %v: %+v", primary, got)
		}
	}
	if got := s.pick(plan.IPv6, netip.Addr{}, addrs("::1")); got.All || len(got.Addrs) > 0 {
		t.Errorf("without a global address: %+v", got)
	}
}

func TestWrongNodePortAddresses(t *testing.T) {
	for words, want := range map[string]string{
		"primary primary":     `"primary" is given twice`,
		"localhost localhost": `"localhost" is given twice`,
		"all 10.0.0.0/8 all":  `"all" is given twice`,
		"Primary":             `"Primary" is neither a CIDR`,
		"10.0.0.1":            `"10.0.0.1" is neither a CIDR`,
		"loopback":            `nor primary, localhost or all`,
	} {
		if _, err := ParseNodePortAddresses(strings.Fields(words)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", words, err, want)
		}
	}
}

func addrs(text string) []netip.Addr {
	var list []netip.Addr
	for _, word := range strings.Fields(text) {
		list = append(list, netip.MustParseAddr(word))
	}
	return list
}
