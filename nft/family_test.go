// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"net/netip"
	"slices"
	"testing"
)

func TestDisjoint(t *testing.T) {
	for _, test := range []struct{ in, want []string }{
		{nil, nil},
		{[]string{"10.1.2.3/8"}, []string{"10.0.0.0/8"}},
		{[]string{"10.1.0.0/16", "10.0.0.0/8", "10.1.2.3/32"}, []string{"10.0.0.0/8"}},
		{[]string{"10.1.0.0/16", "10.0.0.0/16", "10.1.0.0/16"}, []string{"10.0.0.0/16", "10.1.0.0/16"}},
		{[]string{"fd00::/64", "::/0"}, []string{"::/0"}},
	} {
		var in []netip.Prefix
		for _, p := range test.in {
			in = append(in, netip.MustParsePrefix(p))
		}
		var got []string
		for _, p := range Disjoint(in) {
			got = append(got, p.String())
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("disjoint(%v) = %v, want %v", test.in, got, test.want)
		}
	}
}

func TestLastAddr(t *testing.T) {
	for in, want := range map[string]string{
		"10.1.2.3/8": "10.255.255.255", "10.1.2.3/32": "10.1.2.3", "0.0.0.0/0": "255.255.255.255", "fd00:0:0:10::/60": "fd00::1f:ffff:ffff:ffff:ffff",
	} {
		if got := LastAddr(netip.MustParsePrefix(in)).String(); got != want {
			t.Errorf("lastAddr(%s) = %s, want %s", in, got, want)
		}
	}
}
