// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"encoding/binary"
	"net/netip"

	"signalbox/proxier/plan"
)

// Pair is the same thing in both IP families: an address of each.
type Pair struct{ V4, V6 netip.Addr }

// PrefixPair is a range of each IP family.
type PrefixPair struct{ V4, V6 netip.Prefix }

func prefixes(v4, v6 string) PrefixPair {
	return PrefixPair{netip.MustParsePrefix(v4), netip.MustParsePrefix(v6)}
}

// Of is the address of a family.
func (p Pair) Of(f plan.Family) netip.Addr {
	if f == plan.IPv6 {
		return p.V6
	}
	return p.V4
}

// Of is the range of a family.
func (p PrefixPair) Of(f plan.Family) netip.Prefix {
	if f == plan.IPv6 {
		return p.V6
	}
	return p.V4
}

// Nth is the address n after the first of a range. The range lies within the last 32 bits
// of an address.
func Nth(p netip.Prefix, n int) netip.Addr {
	b := p.Addr().AsSlice()
	last := b[len(b)-4:]
	binary.BigEndian.PutUint32(last, binary.BigEndian.Uint32(last)+uint32(n))
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Nth is the address n after the first of the range, in both families.
func (p PrefixPair) Nth(n int) Pair { return Pair{Nth(p.V4, n), Nth(p.V6, n)} }

// at is the address with the prefix length of the range.
func (p PrefixPair) at(a Pair) PrefixPair {
	return PrefixPair{netip.PrefixFrom(a.V4, p.V4.Bits()), netip.PrefixFrom(a.V6, p.V6.Bits())}
}

// host is the range that holds this one address.
func (p Pair) host() PrefixPair {
	return PrefixPair{netip.PrefixFrom(p.V4, 32), netip.PrefixFrom(p.V6, 128)}
}

func (p PrefixPair) each() []netip.Prefix { return []netip.Prefix{p.V4, p.V6} }

// The ranges of every lab. Those that stand for the world outside are from the
// blocks reserved for documentation.
var (
	// NodeNetwork is the link that the nodes and the router share.
	NodeNetwork = prefixes("172.18.0.0/24", "fd00:172:18::/64")
	// PodNetwork holds the Pods of every node: the cluster CIDR.
	PodNetwork = prefixes("10.244.0.0/16", "fd00:10:244::/48")
	// ServiceNetwork and ServiceNetwork2 are for cluster IPs; the router sends
	// both to node1.
	ServiceNetwork  = prefixes("10.96.0.0/16", "fd00:10:96::/112")
	ServiceNetwork2 = prefixes("10.97.0.0/16", "fd00:10:97::/112")
	// ExternalNetwork is for load-balancer and external IPs; the router sends
	// it to node1.
	ExternalNetwork = prefixes("192.0.2.0/24", "2001:db8:100::/64")
	// ClientNetwork and ClientNetwork2 are where client1 and client2 are.
	ClientNetwork  = prefixes("198.51.100.0/24", "2001:db8:c1::/64")
	ClientNetwork2 = prefixes("203.0.113.0/24", "2001:db8:c2::/64")
)

// podNetworks holds each node's own part of PodNetwork.
var podNetworks = []PrefixPair{
	prefixes("10.244.1.0/24", "fd00:10:244:1::/64"),
	prefixes("10.244.2.0/24", "fd00:10:244:2::/64"),
	prefixes("10.244.3.0/24", "fd00:10:244:3::/64"),
}
