// SPDX-License-Identifier: Apache-2.0

package node

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// MaxRouteSources is how many route sources of one family are served. Each is a
// rule that the first packet of a masqueraded connection is compared with.
const MaxRouteSources = 256

// RouteSources are the sources that this node's routes name, of both families.
type RouteSources struct {
	// Served are in the order in which rules must have them: the longest prefix
	// comes first.
	Served []plan.RouteSource
	// LeftOut are those beyond MaxRouteSources, and those of interfaces whose
	// name a rule cannot hold. Together with a route source its whole tree of
	// longer prefixes is left out, so that masquerade chooses for all of these.
	LeftOut []plan.RouteSource
}

func (s *RouteSources) equal(o *RouteSources) bool {
	return slices.Equal(s.Served, o.Served) && slices.Equal(s.LeftOut, o.LeftOut)
}

// ReadRouteSources reads the unicast routes of the main table. An ordinary node,
// on which masquerade takes the same addresses as the routes, has no route
// sources.
func ReadRouteSources() (RouteSources, error) {
	h, err := openRoute()
	if err != nil {
		return RouteSources{}, err
	}
	defer h.Close()
	return routeSources(h)
}

// readPause is the least time between two readings of the routes.
const readPause = time.Second

// WatchRouteSources calls changed with what ReadRouteSources returns, at once and
// whenever that changes, until ctx is done, and returns nil then. Reading that
// fails changes nothing and is tried again.
func WatchRouteSources(ctx context.Context, changed func(RouteSources)) error {
	var last *RouteSources
	return withRoute(func(h *netlink.Handle) {
		Changes[netlink.RouteUpdate]{
			// A new or lost address is a route of the local table, too.
			Subscribe: func(updates chan<- netlink.RouteUpdate, done <-chan struct{}) error {
				return netlink.RouteSubscribeWithOptions(updates, done, netlink.RouteSubscribeOptions{})
			},
			Read: func() error {
				now, err := routeSources(h)
				if err == nil && (last == nil || !now.equal(last)) {
					last = &now
					changed(now)
				}
				return err
			},
			Pause: readPause,
		}.Follow(ctx)
	})
}

func routeSources(h *netlink.Handle) (s RouteSources, err error) {
	routes, err := Whole(func() ([]netlink.Route, error) { return h.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, 0) })
	if err != nil {
		return s, fmt.Errorf("listing this node's routes: %w", err)
	}
	hops := hopsOf(routes)
	if !slices.ContainsFunc(hops, func(h hop) bool { return h.source.IsValid() }) {
		return s, nil
	}
	addrs, err := Whole(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return s, fmt.Errorf("listing this node's addresses: %w", err)
	}
	trees := reduce(hops, linkAddrs(addrs))
	names := map[int]string{}
	for _, t := range trees {
		index := t[0].link
		if names[index] != "" {
			continue
		}
		link, err := h.LinkByIndex(index)
		if err != nil {
			return s, fmt.Errorf("looking up the interface of the route to %s: %w", t[0].destination, err)
		}
		names[index] = link.Attrs().Name
	}
	return bounded(trees, names, MaxRouteSources), nil
}

// hop is one way that a route gives to packets.
type hop struct {
	link        int // index of the interface
	destination netip.Prefix
	gateway     netip.Addr // not valid for a destination on the link
	source      netip.Addr // not valid where the route names none
}

// hopsOf are the ways of the unicast routes, those of one destination in the order
// of their metrics.
func hopsOf(routes []netlink.Route) []hop {
	slices.SortStableFunc(routes, func(a, b netlink.Route) int { return cmp.Compare(a.Priority, b.Priority) })
	var hops []hop
	for _, r := range routes {
		destination := prefixOf(r.Dst)
		if r.Type != unix.RTN_UNICAST || r.Tos != 0 || !destination.IsValid() || destination.Addr().IsLinkLocalUnicast() {
			continue
		}
		add := func(link int, gateway net.IP) {
			if link > 0 {
				hops = append(hops, hop{link, destination, addrOf(gateway), addrOf(r.Src)})
			}
		}
		if len(r.MultiPath) == 0 {
			add(r.LinkIndex, r.Gw)
		}
		for _, next := range r.MultiPath {
			add(next.LinkIndex, next.Gw)
		}
	}
	return hops
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addrOf(n.IP), bits).Masked()
}

// linkAddr is an address of an interface that masquerade may choose.
type linkAddr struct {
	addr   netip.Addr
	subnet netip.Prefix
}

// linkAddrs are such addresses by the interface's index and the family, in the
// kernel's order.
func linkAddrs(list []netlink.Addr) map[linkFamily][]linkAddr {
	out := map[linkFamily][]linkAddr{}
	for _, a := range list {
		addr, subnet := addrOf(a.IP), prefixOf(a.IPNet)
		if a.Peer != nil {
			subnet = prefixOf(a.Peer)
		}
		switch {
		case !addr.IsValid() || a.Scope != int(netlink.SCOPE_UNIVERSE):
		case addr.Is4() && a.Flags&unix.IFA_F_SECONDARY != 0, addr.Is6() && a.Flags&unix.IFA_F_DADFAILED != 0:
		default:
			k := linkFamily{a.LinkIndex, plan.FamilyOf(addr)}
			out[k] = append(out[k], linkAddr{addr, subnet})
		}
	}
	return out
}

type linkFamily struct {
	link   int
	family plan.Family
}

// masquerade is the source that the kernel's masquerade gives to packets that take
// this way. It is not valid where it is not the same for all of them, or where
// other interfaces' addresses come into question.
//
// For IPv4 it is the interface's first address whose subnet has the gateway, or for
// a destination on the link that destination, and else the first address. Among
// several IPv6 addresses the kernel chooses by the destination.
func (h *hop) masquerade(addrs []linkAddr) netip.Addr {
	if len(addrs) == 0 || h.destination.Addr().Is6() && len(addrs) > 1 {
		return netip.Addr{}
	}
	towards := h.destination
	if h.gateway.Is4() {
		towards = netip.PrefixFrom(h.gateway, 32)
	}
	otherwise := linkAddr{addrs[0].addr, netip.PrefixFrom(addrs[0].addr, 0).Masked()}
	var possible netip.Addr
	for _, a := range append(slices.Clone(addrs), otherwise) {
		switch {
		case !a.subnet.Overlaps(towards):
			continue
		case possible.IsValid() && possible != a.addr:
			return netip.Addr{}
		}
		if possible = a.addr; a.subnet.Bits() <= towards.Bits() {
			break
		}
	}
	return possible
}

// reduce leaves out what masquerade does by itself and what follows from a shorter
// prefix of the same interface. It returns trees: the first of each contains
// the others, and names a source. A source that is not valid stands for masquerade.
func reduce(hops []hop, addrs map[linkFamily][]linkAddr) (trees [][]hop) {
	hops = slices.Clone(hops)
	for i := range hops {
		h := &hops[i]
		if h.source == h.masquerade(addrs[linkFamily{h.link, plan.FamilyOf(h.destination.Addr())}]) {
			h.source = netip.Addr{}
		}
	}
	// The first of equal ones, which has the lowest metric, counts.
	slices.SortStableFunc(hops, hop.compare)
	hops = slices.CompactFunc(hops, func(a, b hop) bool { return a.compare(b) == 0 })
	var above []hop
	for _, h := range hops {
		for len(above) > 0 && !above[len(above)-1].contains(h) {
			above = above[:len(above)-1]
		}
		var given netip.Addr
		if len(above) > 0 {
			given = above[len(above)-1].source
		}
		if h.source == given {
			continue
		}
		if len(above) == 0 {
			trees = append(trees, nil)
		}
		above = append(above, h)
		trees[len(trees)-1] = append(trees[len(trees)-1], h)
	}
	return trees
}

// compare orders by interface, and puts a prefix before those in it.
func (h hop) compare(o hop) int {
	return cmp.Or(cmp.Compare(h.link, o.link), h.destination.Addr().Compare(o.destination.Addr()), cmp.Compare(h.destination.Bits(), o.destination.Bits()))
}

func (h hop) contains(o hop) bool {
	return h.link == o.link && h.destination.Bits() <= o.destination.Bits() && h.destination.Contains(o.destination.Addr())
}

// bounded serves whole trees as long as no family has more than limit, the widest
// first.
func bounded(trees [][]hop, names map[int]string, limit int) (s RouteSources) {
	slices.SortStableFunc(trees, func(a, b []hop) int { return cmp.Compare(a[0].destination.Bits(), b[0].destination.Bits()) })
	count := map[plan.Family]int{}
	for _, tree := range trees {
		list, family := &s.LeftOut, plan.FamilyOf(tree[0].destination.Addr())
		if name := names[tree[0].link]; isPlain(name) && count[family]+len(tree) <= limit {
			list = &s.Served
			count[family] += len(tree)
		}
		for _, h := range tree {
			*list = append(*list, plan.RouteSource{Link: names[h.link], Destination: h.destination, Source: h.source})
		}
	}
	for _, list := range [][]plan.RouteSource{s.Served, s.LeftOut} {
		slices.SortFunc(list, func(a, b plan.RouteSource) int {
			return cmp.Or(cmp.Compare(b.Destination.Bits(), a.Destination.Bits()), a.Destination.Addr().Compare(b.Destination.Addr()), cmp.Compare(a.Link, b.Link))
		})
	}
	return s
}

// isPlain says whether a rule of any tool can name the interface. A plus or a star
// at the end would stand for several.
func isPlain(name string) bool {
	return name != "" && !strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`"'\*+`, r) })
}

// RouteType is the type of the entry of the routing table for an address, such as
// unix.RTN_LOCAL; unix.RTN_UNSPEC if there is none. It asks for the entry itself
// (RTM_F_FIB_MATCH, kernel 4.13). Otherwise IPv6 would also choose a source address, and
// compare all addresses of the device for that.
func RouteType(h *netlink.Handle, a netip.Addr) int {
	routes, err := h.RouteGetWithOptions(a.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
	if err != nil || len(routes) == 0 {
		return unix.RTN_UNSPEC
	}
	return routes[0].Type
}
