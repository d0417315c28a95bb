// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// host is reached by a link of its own from the node.
type host struct {
	w    *world
	ns   netns.NsHandle
	link netlink.Link
}

func (w *world) host(name string, addr netip.Addr) *host {
	w.t.Helper()
	home, err := netns.Get()
	w.must(err)
	w.t.Cleanup(func() { home.Close() })
	there, err := netns.New()
	w.must(err)
	w.t.Cleanup(func() { there.Close() })
	w.must(netns.Set(home))
	w.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "node", PeerNamespace: netlink.NsFd(there)}))
	link, err := netlink.LinkByName(name)
	w.must(err)
	gateway := netip.MustParseAddr("192.0.2.1")
	w.must(netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(gateway, 32))}))
	w.must(netlink.LinkSetUp(link))
	w.must(netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(netip.PrefixFrom(addr, 32)), Scope: unix.RT_SCOPE_LINK}))
	h := &host{w, there, link}
	h.in(func() {
		peer, err := netlink.LinkByName("node")
		w.must(err)
		w.must(netlink.AddrAdd(peer, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(addr, 32))}))
		w.must(netlink.LinkSetUp(peer))
		w.must(netlink.RouteAdd(&netlink.Route{LinkIndex: peer.Attrs().Index, Dst: ipNet(netip.PrefixFrom(gateway, 32)), Scope: unix.RT_SCOPE_LINK}))
		w.must(netlink.RouteAdd(&netlink.Route{LinkIndex: peer.Attrs().Index, Gw: gateway.AsSlice()}))
	})
	return h
}

// slow has the link take a kilobyte a second from the node.
func (h *host) slow() *host {
	h.w.t.Helper()
	err := netlink.QdiscAdd(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: h.link.Attrs().Index, Parent: netlink.HANDLE_ROOT, Handle: netlink.MakeHandle(1, 0)},
		Rate:       1000, Limit: 64 << 20,
		Buffer: uint32(3 * time.Second / 64), // the kernel counts in ticks of 64 ns
	})
	if errors.Is(err, unix.ENOENT) {
		h.w.t.Skipf("the kernel has no tbf (CONFIG_NET_SCH_TBF): %v", err)
	}
	h.w.must(err)
	return h
}

// queued is how many packets wait for the link.
func (h *host) queued() uint32 {
	h.w.t.Helper()
	list, err := netlink.QdiscList(h.link)
	h.w.must(err)
	return list[0].Attrs().Statistics.Queue.Qlen
}

// in calls fn on the host.
func (h *host) in(fn func()) {
	h.w.t.Helper()
	home, err := netns.Get()
	h.w.must(err)
	defer home.Close()
	h.w.must(netns.Set(h.ns))
	defer func() { h.w.must(netns.Set(home)) }()
	fn()
}

// TestSlowEndpointHoldsUpNobody floods an endpoint behind a slow link and asks
// another Service's.
func TestSlowEndpointHoldsUpNobody(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	w.host("slow", w.endpoint(9).Addr()).slow().in(func() {
		silent, err := net.ListenPacket("udp", w.endpoint(9).String())
		w.must(err)
		t.Cleanup(func() { silent.Close() })
	})
	w.echoUDP(1)
	w.serve(0, 0, 9)
	w.serve(1, 0, 1)
	flood, other := w.dialUDP(0), w.dialUDP(1)
	for range 20 {
		for range 50 {
			_, err := flood.Write(make([]byte, 1200))
			w.must(err)
		}
		w.askOnce(other)
	}
	if w.p.relay.stats().Lost == 0 {
		t.Error("no datagram was lost: the link was not slow, or a loss is not counted")
	}
}

// TestSlowClientHoldsUpNobody has a client behind a slow link ask for more than
// that can carry, and asks from elsewhere.
func TestSlowClientHoldsUpNobody(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	slow, quick := w.host("slow", netip.MustParseAddr("192.0.2.8")).slow(), w.host("quick", netip.MustParseAddr("192.0.2.9"))
	endpoint, err := net.ListenPacket("udp", w.endpoint(1).String())
	w.must(err)
	defer endpoint.Close()
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := endpoint.ReadFrom(b)
			if err != nil {
				return
			}
			endpoint.WriteTo(bytes.Repeat(b[:n], 1200), from)
		}
	}()
	w.serve(1, 0, 1)
	var flood, other net.Conn
	slow.in(func() { flood = w.dialUDP(1) })
	quick.in(func() { other = w.dialUDP(1) })
	ask := func() {
		_, err := flood.Write([]byte("?"))
		w.must(err)
	}
	// Less than ninety answers fill a socket's buffer of the usual size.
	w.await("a queue of answers", func() bool {
		ask()
		return slow.queued() >= 90
	})
	for range 20 {
		for range 20 {
			ask()
		}
		w.askUDP(other)
	}
}

// askOnce is askUDP with one question: it must be answered.
func (w *world) askOnce(c net.Conn) {
	w.t.Helper()
	_, err := c.Write([]byte("?"))
	w.must(err)
	w.must(c.SetReadDeadline(time.Now().Add(hangTimeout)))
	if _, err := c.Read(make([]byte, 2048)); err != nil {
		w.t.Fatalf("while another flow is slow: %v", err)
	}
}
