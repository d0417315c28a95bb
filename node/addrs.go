// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// errNoAddrs is returned instead of an empty list: a node without so much as a
// loopback address is one whose addresses could not be seen.
var errNoAddrs = errors.New("the kernel named no address at all")

// ServiceDevice is the dummy device on which the ipvs modes of kube-proxy and signalbox
// hold the addresses of Services.
const ServiceDevice = "kube-ipvs0"

// Addrs returns the addresses of this node's interfaces in both families, each
// once, loopback included: those of the interface that has the default route
// come first, then the kernel's order of interfaces. Temporary and
// deprecated IPv6 addresses come last: they are the node's, and nobody should
// be sent to them. IPv6 link-local addresses are left out: they mean nothing
// without an interface beside them. Addresses of ServiceDevice are left out, too: they are
// those of Services. The list is never empty without an error.
func Addrs() ([]netip.Addr, error) {
	h, err := openRoute()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	return addrs(h)
}

func addrs(h *netlink.Handle) ([]netip.Addr, error) {
	list, err := Whole(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("listing this node's addresses: %w", err)
	}
	if d, err := h.LinkByName(ServiceDevice); err == nil {
		list = slices.DeleteFunc(list, func(a netlink.Addr) bool { return a.LinkIndex == d.Attrs().Index })
	}
	out := ordered(list, defaultLink(h))
	if len(out) == 0 {
		return nil, fmt.Errorf("listing this node's addresses: %w", errNoAddrs)
	}
	return out, nil
}

// defaultLink is the index of the interface that the default route leaves by,
// IPv4's before IPv6's, or 0. Where routes cannot be read, no order is lost
// that anybody could rely on.
func defaultLink(h *netlink.Handle) int {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, _ := Whole(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_DST)
		})
		for _, r := range routes {
			if r.LinkIndex > 0 && (r.Type == unix.RTN_UNICAST || r.Type == 0) {
				return r.LinkIndex
			}
		}
	}
	return 0
}

func ordered(list []netlink.Addr, first int) []netip.Addr {
	slices.SortStableFunc(list, func(a, b netlink.Addr) int {
		switch {
		case a.LinkIndex == first && b.LinkIndex != first:
			return -1
		case a.LinkIndex != first && b.LinkIndex == first:
			return 1
		}
		return 0
	})
	var out, last []netip.Addr
	seen := map[netip.Addr]bool{}
	for _, a := range list {
		ip, ok := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		if !ok || seen[ip] || ip.Is6() && ip.IsLinkLocalUnicast() || a.Flags&unix.IFA_F_DADFAILED != 0 {
			continue
		}
		seen[ip] = true
		if ip.Is6() && a.Flags&(unix.IFA_F_TEMPORARY|unix.IFA_F_DEPRECATED) != 0 {
			last = append(last, ip)
		} else {
			out = append(out, ip)
		}
	}
	return append(out, last...)
}

// Watch calls changed with what Addrs returns, at once and whenever that
// changes, until ctx is done, and returns nil then. What cannot be read changes
// nothing: the last list that was whole goes on to count, and reading is tried
// again. It is an error that the kernel offers no netlink socket at all.
func Watch(ctx context.Context, changed func([]netip.Addr)) error {
	var last []netip.Addr
	return withRoute(func(h *netlink.Handle) {
		Changes[netlink.AddrUpdate]{
			Subscribe: func(updates chan<- netlink.AddrUpdate, done <-chan struct{}) error {
				return netlink.AddrSubscribeWithOptions(updates, done, netlink.AddrSubscribeOptions{})
			},
			Read: func() error {
				now, err := addrs(h)
				if err == nil && (last == nil || !slices.Equal(now, last)) {
					last = now
					changed(slices.Clone(now))
				}
				return err
			},
		}.Follow(ctx)
	})
}

// LinkTo returns the name of the interface by which this node reaches an address; empty
// if no route leads there.
func LinkTo(a netip.Addr) string {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		return ""
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return ""
	}
	return link.Attrs().Name
}
