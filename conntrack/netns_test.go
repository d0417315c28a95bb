// SPDX-License-Identifier: Apache-2.0

package conntrack

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/internal/netlab"
	"signalbox/internal/nstest"
	"signalbox/proxier/plan"
)

// hangTimeout ends a test that hangs and decides nothing else.
const hangTimeout = 30 * time.Second

// world is a network namespace whose loopback interface holds the node's
// address and two endpoints, and out of which the virtual IPs are routed.
type world struct {
	t       *testing.T
	family  plan.Family
	handle  *netlink.Handle
	node    netip.Addr
	a, b    netip.AddrPort // endpoints that answer with their name
	vip     netip.AddrPort
	other   netip.AddrPort // another virtual IP
	foreign netip.AddrPort // an address of another host
}

var worlds = map[plan.Family]world{
	plan.IPv4: {
		family: plan.IPv4, node: netip.MustParseAddr("192.0.2.1"),
		a: netip.MustParseAddrPort("10.0.0.1:5300"), b: netip.MustParseAddrPort("10.0.0.2:5300"),
		vip: netip.MustParseAddrPort("10.96.0.10:53"), other: netip.MustParseAddrPort("10.96.0.11:53"),
		foreign: netip.MustParseAddrPort("10.96.0.99:30053"),
	},
	plan.IPv6: {
		family: plan.IPv6, node: netip.MustParseAddr("2001:db8::1"),
		a: netip.MustParseAddrPort("[fd00::1]:5300"), b: netip.MustParseAddrPort("[fd00::2]:5300"),
		vip: netip.MustParseAddrPort("[fd96::10]:53"), other: netip.MustParseAddrPort("[fd96::11]:53"),
		foreign: netip.MustParseAddrPort("[fd96::99]:30053"),
	},
}

const servedNodePort = 30053

// newWorld moves the test's goroutine to a network namespace of its own.
func newWorld(t *testing.T, family plan.Family) *world {
	t.Helper()
	nstest.Enter(t)
	w := worlds[family]
	w.t = t
	var err error
	if w.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.handle.Close)
	lo, err := w.handle.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.handle.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	for _, a := range []netip.Addr{w.node, w.a.Addr(), w.b.Addr()} {
		if err := netlab.AddAddr(w.handle, lo, netip.PrefixFrom(a, a.BitLen())); err != nil {
			t.Fatalf("adding %s: %v", a, err)
		}
	}
	w.routeOutside(w.vip.Addr(), w.other.Addr(), w.foreign.Addr())
	w.rules()
	w.serve(w.a, "a")
	w.serve(w.b, "b")
	return &w
}

// routeOutside sends what is for these addresses out of an interface behind
// which nobody answers.
func (w *world) routeOutside(addrs ...netip.Addr) {
	w.t.Helper()
	if err := w.handle.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "out"}, PeerName: "away"}); err != nil {
		w.t.Fatal(err)
	}
	var out netlink.Link
	for _, name := range []string{"away", "out"} {
		var err error
		if out, err = w.handle.LinkByName(name); err != nil {
			w.t.Fatal(err)
		}
		if err := w.handle.LinkSetUp(out); err != nil {
			w.t.Fatal(err)
		}
	}
	for _, a := range addrs {
		if err := w.handle.RouteAdd(&netlink.Route{LinkIndex: out.Attrs().Index, Dst: hostNet(a), Scope: netlink.SCOPE_LINK}); err != nil {
			w.t.Fatalf("routing %s: %v", a, err)
		}
		n := &netlink.Neigh{LinkIndex: out.Attrs().Index, IP: a.AsSlice(), State: netlink.NUD_PERMANENT, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1}}
		if err := w.handle.NeighAdd(n); err != nil {
			w.t.Fatalf("neighbour %s: %v", a, err)
		}
	}
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// rules replaces the translation rules, and has flows tracked without any. Each is "ADDRESS:PORT ENDPOINT".
func (w *world) rules(translate ...[2]netip.AddrPort) {
	w.t.Helper()
	ip := map[plan.Family]string{plan.IPv4: "ip", plan.IPv6: "ip6"}[w.family]
	var s strings.Builder
	fmt.Fprintf(&s, "table %s t\nflush table %s t\ntable %s t {\n chain track { type filter hook output priority 0; ct state new accept; }\n chain out { type nat hook output priority -100;\n", ip, ip, ip)
	for _, r := range translate {
		fmt.Fprintf(&s, "  %s daddr %s udp dport %d dnat to %s\n", ip, r[0].Addr(), r[0].Port(), r[1])
	}
	s.WriteString(" }\n}\n")
	nstest.NFT(w.t, s.String(), "-f", "-")
}

// serve answers every datagram with name.
func (w *world) serve(at netip.AddrPort, name string) {
	w.t.Helper()
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	go func() {
		buf := make([]byte, 64)
		for {
			_, from, err := conn.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = conn.WriteToUDPAddrPort([]byte(name), from)
			}
		}
	}()
}

// client is a UDP socket that keeps its source port.
type client struct {
	w    *world
	conn *net.UDPConn
	to   netip.AddrPort
}

func (w *world) client(to netip.AddrPort) *client {
	w.t.Helper()
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(w.node, 0)))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return &client{w, conn, to}
}

func (c *client) send() {
	c.w.t.Helper()
	if _, err := c.conn.WriteToUDPAddrPort([]byte("?"), c.to); err != nil {
		c.w.t.Fatalf("sending to %s: %v", c.to, err)
	}
}

// ask returns who answers.
func (c *client) ask() string {
	c.w.t.Helper()
	c.send()
	buf := make([]byte, 64)
	if err := c.conn.SetReadDeadline(time.Now().Add(hangTimeout)); err != nil {
		c.w.t.Fatal(err)
	}
	n, err := c.conn.Read(buf)
	if err != nil {
		c.w.t.Fatalf("nobody at %s: %v", c.to, err)
	}
	return string(buf[:n])
}

// tracked says whether the table holds the client's flow, as another reader of
// the table than the one under test sees it.
func (c *client) tracked() bool {
	c.w.t.Helper()
	af := netlink.InetFamily(unix.AF_INET)
	if c.w.family == plan.IPv6 {
		af = unix.AF_INET6
	}
	flows, err := c.w.handle.ConntrackTableList(netlink.ConntrackTable, af)
	if err != nil {
		c.w.t.Fatal(err)
	}
	port := c.conn.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	for _, f := range flows {
		to, _ := netip.AddrFromSlice(f.Forward.DstIP)
		if f.Forward.Protocol == unix.IPPROTO_UDP && f.Forward.SrcPort == port && to.Unmap() == c.to.Addr() && f.Forward.DstPort == c.to.Port() {
			return true
		}
	}
	return false
}

func (c *client) wantTracked(want bool, when string) {
	c.w.t.Helper()
	if got := c.tracked(); got != want {
		c.w.t.Errorf("%s: flow to %s tracked = %v, want %v", when, c.to, got, want)
	}
}

// List finds a translated flow with both of its sides.
func TestList(t *testing.T) {
	for _, family := range plan.Families {
		t.Run(family.String(), func(t *testing.T) {
			w := newWorld(t, family)
			w.rules([2]netip.AddrPort{w.vip, w.a})
			c := w.client(w.vip)
			if got := c.ask(); got != "a" {
				t.Fatalf("%s answers", got)
			}
			client := netip.AddrPortFrom(w.node, c.conn.LocalAddr().(*net.UDPAddr).AddrPort().Port())
			found := false
			if err := List(family, plan.UDP, func(f Flow) { found = found || f == Flow{client, w.vip, w.a, client} }); err != nil || !found {
				t.Errorf("the flow is listed: %v, %v", found, err)
			}
			if err := List(family, plan.TCP, func(f Flow) { t.Errorf("%v is listed as TCP", f) }); err != nil {
				t.Error(err)
			}
		})
	}
}
