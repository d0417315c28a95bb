// SPDX-License-Identifier: Apache-2.0

package node

import (
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// The interfaces of these tests.
const (
	eth0 = 2 + iota
	eth1
	flannel
)

var linkNames = map[int]string{eth0: "eth0", eth1: "eth1", flannel: "flannel.1"}

func on(link int, cidr string, flags int) netlink.Addr {
	a := *address(cidr, flags)
	a.LinkIndex = link
	return a
}

// parseRoute reads a route as `ip route` prints it: "10.0.0.0/8 via 192.0.2.1 dev
// eth0 src 192.0.2.7 metric 5", with further next hops after "nexthop".
func parseRoute(t *testing.T, text string) netlink.Route {
	t.Helper()
	r := netlink.Route{Type: unix.RTN_UNICAST}
	hops := strings.Split(text, " nexthop ")
	words := strings.Fields(hops[0])
	r.Dst = ipNet(netip.MustParsePrefix(words[0]))
	linkOf := func(name string) int {
		for index, n := range linkNames {
			if n == name {
				return index
			}
		}
		t.Fatalf("%s: there is no interface %s", text, name)
		return 0
	}
	number := func(text string) int {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for i := 1; i+1 < len(words); i += 2 {
		switch value := words[i+1]; words[i] {
		case "via":
			r.Gw = netip.MustParseAddr(value).AsSlice()
		case "dev":
			r.LinkIndex = linkOf(value)
		case "src":
			r.Src = netip.MustParseAddr(value).AsSlice()
		case "metric":
			r.Priority = number(value)
		case "tos":
			r.Tos = number(value)
		case "type":
			r.Type = map[string]int{"blackhole": unix.RTN_BLACKHOLE}[value]
		default:
			t.Fatalf("%s: what is %q?", text, words[i])
		}
	}
	for _, next := range hops[1:] {
		words := strings.Fields(next) // via ADDRESS dev NAME
		r.MultiPath = append(r.MultiPath, &netlink.NexthopInfo{Gw: netip.MustParseAddr(words[1]).AsSlice(), LinkIndex: linkOf(words[3])})
	}
	return r
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func texts(sources []plan.RouteSource) []string {
	var out []string
	for _, s := range sources {
		out = append(out, s.String())
	}
	return out
}

func TestRouteSources(t *testing.T) {
	own, own6 := on(eth0, "192.0.2.1/24", 0), on(eth0, "2001:db8::1/64", 0)
	for _, test := range []struct {
		what   string
		addrs  []netlink.Addr
		routes []string
		want   []string
	}{
		{"an ordinary node", []netlink.Addr{own, own6, on(eth1, "198.51.100.1/24", 0)}, []string{
			"0.0.0.0/0 via 192.0.2.254 dev eth0 src 192.0.2.1", "192.0.2.0/24 dev eth0 src 192.0.2.1", "198.51.100.0/24 dev eth1 src 198.51.100.1",
			"10.244.2.0/24 via 192.0.2.2 dev eth0", "::/0 via fe80::1 dev eth0 src 2001:db8::1", "2001:db8::/64 dev eth0",
		}, nil},
		{"the node's address on lo", []netlink.Addr{own, own6, on(1, "203.0.113.7/32", 0)}, []string{
			"0.0.0.0/0 via 192.0.2.254 dev eth0 src 203.0.113.7", "192.0.2.0/24 dev eth0 src 192.0.2.1",
			"10.244.2.0/24 via 192.0.2.2 dev eth0 src 203.0.113.7", "::/0 via fe80::1 dev eth0 src 2001:db8:7::1",
		}, []string{"eth0 to 192.0.2.0/24: masquerade", "eth0 to 0.0.0.0/0: 203.0.113.7", "eth0 to ::/0: 2001:db8:7::1"}},
		{"an interface without addresses", nil, []string{"10.0.0.0/8 dev eth0 src 203.0.113.7"}, []string{"eth0 to 10.0.0.0/8: 203.0.113.7"}},
		{"two addresses on the interface", []netlink.Addr{own, on(eth0, "192.0.2.9/24", unix.IFA_F_SECONDARY)}, []string{
			"192.0.2.0/24 dev eth0 src 192.0.2.1", "10.0.0.0/8 via 192.0.2.254 dev eth0 src 192.0.2.9", "11.0.0.0/8 via 192.0.2.254 dev eth0 src 192.0.2.1",
		}, []string{"eth0 to 10.0.0.0/8: 192.0.2.9"}},
		{"subnets of one interface", []netlink.Addr{own, on(eth0, "198.51.100.1/24", 0)}, []string{
			"192.0.2.0/24 dev eth0 src 192.0.2.1", "198.51.100.0/24 dev eth0 src 198.51.100.1",
			"10.0.0.0/8 via 198.51.100.254 dev eth0 src 198.51.100.1", "11.0.0.0/8 via 198.51.100.254 dev eth0 src 192.0.2.1",
		}, []string{"eth0 to 11.0.0.0/8: 192.0.2.1"}},
		{"a virtual address on the interface", []netlink.Addr{own, on(eth0, "192.0.2.100/32", 0)}, []string{
			"0.0.0.0/0 via 192.0.2.254 dev eth0 src 192.0.2.1", "192.0.2.0/24 dev eth0 src 192.0.2.1",
		}, nil},
		{"a default route on the link, where the subnet decides", []netlink.Addr{own, on(eth0, "198.51.100.1/24", 0)},
			[]string{"0.0.0.0/0 dev eth0 src 192.0.2.1"}, []string{"eth0 to 0.0.0.0/0: 192.0.2.1"}},
		{"several IPv6 addresses", []netlink.Addr{own6, on(eth0, "2001:db8::2/64", 0), on(eth0, "fe80::2/64", 0)},
			[]string{"::/0 via fe80::1 dev eth0 src 2001:db8::1", "2001:db8::/64 dev eth0"},
			[]string{"eth0 to 2001:db8::/64: masquerade", "eth0 to ::/0: 2001:db8::1"}},
		{"one IPv6 address beside one that another host has", []netlink.Addr{own6, on(eth0, "2001:db8::2/64", unix.IFA_F_DADFAILED)},
			[]string{"::/0 via fe80::1 dev eth0 src 2001:db8::1"}, nil},
		{"longer routes that say the same or something else", []netlink.Addr{own}, []string{
			"10.0.0.0/8 via 192.0.2.254 dev eth0 src 203.0.113.7", "10.1.0.0/16 via 192.0.2.253 dev eth0 src 203.0.113.7",
			"10.2.0.0/16 via 192.0.2.254 dev eth0", "10.2.3.0/24 via 192.0.2.254 dev eth0", "10.2.4.0/24 via 192.0.2.254 dev eth0 src 203.0.113.7",
			"10.3.0.0/16 via 192.0.2.254 dev eth0 src 203.0.113.8", "11.0.0.0/8 via 192.0.2.254 dev eth0",
		}, []string{"eth0 to 10.2.4.0/24: 203.0.113.7", "eth0 to 10.2.0.0/16: masquerade", "eth0 to 10.3.0.0/16: 203.0.113.8", "eth0 to 10.0.0.0/8: 203.0.113.7"}},
		{"another interface has the longer route", []netlink.Addr{own, on(flannel, "10.244.1.0/32", 0)}, []string{
			"0.0.0.0/0 via 192.0.2.254 dev eth0 src 203.0.113.7", "10.244.2.0/24 via 10.244.2.0 dev flannel.1",
		}, []string{"eth0 to 0.0.0.0/0: 203.0.113.7"}},
		{"several next hops", []netlink.Addr{own}, []string{"10.0.0.0/8 src 203.0.113.7 nexthop via 192.0.2.254 dev eth0 nexthop via 198.51.100.254 dev eth1"},
			[]string{"eth0 to 10.0.0.0/8: 203.0.113.7", "eth1 to 10.0.0.0/8: 203.0.113.7"}},
		{"the lower metric counts", []netlink.Addr{own}, []string{
			"10.0.0.0/8 via 192.0.2.254 dev eth0 src 203.0.113.8 metric 20", "10.0.0.0/8 via 192.0.2.254 dev eth0 src 203.0.113.7 metric 10",
		}, []string{"eth0 to 10.0.0.0/8: 203.0.113.7"}},
		{"other kinds of routes", []netlink.Addr{own}, []string{
			"10.0.0.0/8 via 192.0.2.254 dev eth0 src 203.0.113.7 tos 16", "11.0.0.0/8 dev eth0 src 203.0.113.7 type blackhole",
		}, nil},
	} {
		t.Run(test.what, func(t *testing.T) {
			var routes []netlink.Route
			for _, text := range test.routes {
				routes = append(routes, parseRoute(t, text))
			}
			got := bounded(reduce(hopsOf(routes), linkAddrs(test.addrs)), linkNames, MaxRouteSources)
			if !slices.Equal(texts(got.Served), test.want) || len(got.LeftOut) > 0 {
				t.Errorf("got %q, left out %q\nwant %q", texts(got.Served), got.LeftOut, test.want)
			}
		})
	}
}

// What does not fit is left out with all exceptions from it, and the other family
// has a bound of its own.
func TestRouteSourcesAreBounded(t *testing.T) {
	var routes []netlink.Route
	for _, text := range []string{
		"10.1.0.0/16 dev eth0 src 192.0.2.1", "10.1.1.0/24 dev eth0", "10.1.2.0/24 dev eth0",
		"10.0.0.0/15 dev eth1 src 192.0.2.1", "10.0.0.0/24 dev eth1",
		"10.9.0.0/24 dev eth0 src 192.0.2.1", "2001:db8::/64 dev eth0 src 2001:db8::1",
	} {
		routes = append(routes, parseRoute(t, text))
	}
	trees := reduce(hopsOf(routes), nil)
	got := bounded(trees, linkNames, 3)
	wantServed := []string{"eth1 to 10.0.0.0/24: masquerade", "eth0 to 10.9.0.0/24: 192.0.2.1", "eth1 to 10.0.0.0/15: 192.0.2.1"}
	wantServed = slices.Insert(wantServed, 0, "eth0 to 2001:db8::/64: 2001:db8::1")
	wantLeft := []string{"eth0 to 10.1.1.0/24: masquerade", "eth0 to 10.1.2.0/24: masquerade", "eth0 to 10.1.0.0/16: 192.0.2.1"}
	if !slices.Equal(texts(got.Served), wantServed) || !slices.Equal(texts(got.LeftOut), wantLeft) {
		t.Errorf("served %q\nleft out %q", texts(got.Served), texts(got.LeftOut))
	}
	got = bounded(trees, map[int]string{eth0: `a"b`, eth1: "eth+"}, 3)
	if len(got.Served) > 0 || len(got.LeftOut) != 7 {
		t.Errorf("served %q of interfaces whose names mean something else in rules", texts(got.Served))
	}
}

func TestWatchRouteSources(t *testing.T) {
	h, _ := emptyNode(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "eth0"
	if err := h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}); err != nil {
		t.Fatal(err)
	}
	link, err := h.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	for _, cidr := range []string{"192.0.2.1/24", "192.0.2.7/32", "2001:db8::1/64", "2001:db8:7::1/128"} {
		if err := h.AddrAdd(link, address(cidr, 0)); err != nil {
			t.Fatal(err)
		}
	}
	told := following(t, WatchRouteSources)
	await := func(what string, want ...string) {
		t.Helper()
		await(t, told, what, func(s RouteSources) bool { return slices.Equal(texts(s.Served), want) })
	}
	await("nothing on an ordinary node")
	v4 := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(netip.MustParsePrefix("10.0.0.0/8")), Src: net.ParseIP("192.0.2.7")}
	v6 := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(netip.MustParsePrefix("2001:db8:9::/48")), Src: net.ParseIP("2001:db8:7::1")}
	for _, r := range []*netlink.Route{v4, v6} {
		if err := h.RouteAdd(r); err != nil {
			t.Fatal(err)
		}
	}
	await("both routes", "eth0 to 2001:db8:9::/48: 2001:db8:7::1", "eth0 to 10.0.0.0/8: 192.0.2.7")
	if got, err := ReadRouteSources(); err != nil || len(got.Served) != 2 {
		t.Errorf("ReadRouteSources = %v, %v", got, err)
	}
	if err := h.RouteDel(v4); err != nil {
		t.Fatal(err)
	}
	await("the route that stays", "eth0 to 2001:db8:9::/48: 2001:db8:7::1")
	// With one address left, masquerade takes it, too.
	if err := h.AddrDel(link, address("2001:db8::1/64", 0)); err != nil {
		t.Fatal(err)
	}
	await("nothing once masquerade chooses the same")
}
