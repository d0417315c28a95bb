// SPDX-License-Identifier: Apache-2.0

package service

import (
	"fmt"
	"net/netip"
	"slices"

	"signalbox/proxier/plan"
)

// The words that --nodeport-addresses takes beside CIDRs.
const (
	NodePortsPrimary   = "primary"   // the Node object's own address of each family
	NodePortsLocalhost = "localhost" // 127.0.0.0/8 and ::1/128
	NodePortsAll       = "all"       // 0.0.0.0/0 and ::/0
)

// nodePortWords maps each word to the CIDRs it stands for. The address that
// "primary" stands for is known only to a running node.
var nodePortWords = map[string][]netip.Prefix{
	NodePortsPrimary:   nil,
	NodePortsLocalhost: {netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")},
	NodePortsAll:       {netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")},
}

// NodePortSelector says at which of the node's addresses NodePorts are served
// (--nodeport-addresses). The zero value is all addresses that are not loopback.
type NodePortSelector struct {
	// Primary serves the Node object's own address of each family.
	Primary bool
	// CIDRs serves the local addresses inside these. Without Primary, a family
	// that none of them belongs to is served at all local addresses.
	CIDRs []netip.Prefix
}

// ParseNodePortAddresses reads a list of CIDRs and words.
func ParseNodePortAddresses(list []string) (NodePortSelector, error) {
	var s NodePortSelector
	for i, text := range list {
		cidrs, isWord := nodePortWords[text]
		if isWord && slices.Contains(list[:i], text) {
			return NodePortSelector{}, fmt.Errorf("%q is given twice", text)
		}
		if !isWord {
			p, ok := ParsePrefix(text)
			if !ok {
				return NodePortSelector{}, fmt.Errorf("%q is neither a CIDR such as 10.0.0.0/8 or fd00::/48, nor %s, %s or %s",
					text, NodePortsPrimary, NodePortsLocalhost, NodePortsAll)
			}
			cidrs = []netip.Prefix{p}
		}
		s.Primary = s.Primary || text == NodePortsPrimary
		s.CIDRs = append(s.CIDRs, cidrs...)
	}
	return s, nil
}

// pick returns the addresses of one family that serve NodePorts, of local, the
// addresses that the node has. Primary may be invalid.
func (s *NodePortSelector) pick(family plan.Family, primary netip.Addr, local []netip.Addr) plan.NodePortAddrs {
	cidrs := s.of(family)
	if len(cidrs) == 0 && !s.Primary || slices.ContainsFunc(cidrs, func(p netip.Prefix) bool { return p.Bits() == 0 }) {
		return plan.NodePortAddrs{All: true}
	}
	local = slices.DeleteFunc(slices.Clone(local), func(a netip.Addr) bool { return plan.FamilyOf(a) != family })
	var addrs []netip.Addr
	for _, a := range local {
		if plan.AnyContains(cidrs, a) {
			addrs = append(addrs, a)
		}
	}
	if s.Primary {
		addrs = append(addrs, primaryOrFirst(primary, local)...)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return plan.NodePortAddrs{Addrs: slices.Compact(addrs)}
}

// of returns the CIDRs of one family.
func (s *NodePortSelector) of(family plan.Family) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(s.CIDRs), func(p netip.Prefix) bool { return plan.FamilyOf(p.Addr()) != family })
}

// primaryOrFirst returns the node's own address. Where that is unknown, or is
// loopback, the first global address of the node's interfaces stands for it.
func primaryOrFirst(primary netip.Addr, local []netip.Addr) []netip.Addr {
	if primary.IsValid() && !primary.IsLoopback() {
		return []netip.Addr{primary}
	}
	if i := slices.IndexFunc(local, netip.Addr.IsGlobalUnicast); i >= 0 {
		return local[i : i+1]
	}
	return nil
}

// LocalhostNodePorts says when a mode serves NodePorts on loopback addresses, to
// the node's own processes.
type LocalhostNodePorts uint8

const (
	// NoLocalhost is never.
	NoLocalhost LocalhostNodePorts = iota
	// LocalhostCovered is on 127.0.0.1, where NodePortAddresses covers it: for
	// a mode that needs route_localnet, which IPv6 lacks.
	LocalhostCovered
	// LocalhostNamed is on 127.0.0.1 and ::1, each where a range in
	// NodePortAddresses is one of loopback addresses and covers it.
	LocalhostNamed
)

// ServesLocalhost says whether NodePorts of a family are served on loopback.
func (s *Settings) ServesLocalhost(family plan.Family) bool {
	at := &s.NodePortAddresses
	switch s.LocalhostNodePorts {
	case LocalhostCovered:
		cidrs := at.of(plan.IPv4)
		return family == plan.IPv4 && (len(cidrs) == 0 && !at.Primary || plan.AnyContains(cidrs, plan.Localhost(plan.IPv4)))
	case LocalhostNamed:
		return at.NamesLocalhost(family)
	}
	return false
}

// NamesLocalhost says whether a range of loopback addresses is selected, as
// opposed to one of more addresses that covers loopback too.
func (s *NodePortSelector) NamesLocalhost(family plan.Family) bool {
	return slices.ContainsFunc(s.of(family), func(p netip.Prefix) bool {
		return p.Masked().Addr().IsLoopback() && p.Contains(plan.Localhost(family))
	})
}
