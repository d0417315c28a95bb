// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"signalbox/internal/nstest"
)

// hangTimeout ends a test that hangs and decides nothing else.
const hangTimeout = 30 * time.Second

// emptyNode moves the test to a network namespace with a loopback interface.
func emptyNode(t *testing.T) (*netlink.Handle, netlink.Link) {
	t.Helper()
	nstest.Enter(t)
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	lo, err := h.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	return h, lo
}

func address(text string, flags int) *netlink.Addr {
	p := netip.MustParsePrefix(text)
	a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}, Flags: flags}
	if p.Addr().Is6() {
		a.Flags |= unix.IFA_F_NODAD
	}
	return a
}

func TestAddrs(t *testing.T) {
	h, lo := emptyNode(t)
	for _, a := range []string{"192.0.2.1/24", "192.0.2.1/32", "2001:db8::1/64", "fe80::1/64"} {
		if err := h.AddrAdd(lo, address(a, 0)); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Addrs()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"127.0.0.1", "192.0.2.1", "2001:db8::1", "::1"}
	slices.SortFunc(got, netip.Addr.Compare)
	slices.SortFunc(want, func(a, b string) int { return netip.MustParseAddr(a).Compare(netip.MustParseAddr(b)) })
	if !slices.EqualFunc(got, want, func(a netip.Addr, s string) bool { return a.String() == s }) {
		t.Errorf("Addrs = %v, want %v", got, want)
	}
}

// TestServiceDevice: the addresses of Services on kube-ipvs0 are not the node's.
func TestServiceDevice(t *testing.T) {
	h, lo := emptyNode(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = ServiceDevice
	// Not every kernel has dummy devices.
	if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		t.Fatal(err)
	}
	device, err := h.LinkByName(ServiceDevice)
	if err != nil {
		t.Fatal(err)
	}
	// An address that a real interface holds as well stays the node's.
	for _, text := range []string{"10.96.0.1/32", "192.0.2.7/32", "fd00:96::1/128"} {
		if err := h.AddrAdd(device, address(text, 0)); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.AddrAdd(lo, address("192.0.2.7/24", 0)); err != nil {
		t.Fatal(err)
	}
	got, err := Addrs()
	if err != nil {
		t.Fatal(err)
	}
	want := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.0.2.7"), netip.IPv6Loopback()}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestOrder(t *testing.T) {
	got := ordered([]netlink.Addr{
		*address("127.0.0.1/8", 0), *address("2001:db8::2/64", unix.IFA_F_TEMPORARY), *address("2001:db8::3/64", unix.IFA_F_DEPRECATED),
		*address("2001:db8::4/64", unix.IFA_F_DADFAILED), *address("2001:db8::1/64", 0), *address("192.0.2.1/24", 0), *address("2001:db8::1/128", 0),
	}, 0)
	want := []string{"127.0.0.1", "2001:db8::1", "192.0.2.1", "2001:db8::2", "2001:db8::3"}
	if !slices.EqualFunc(got, want, func(a netip.Addr, s string) bool { return a.String() == s }) {
		t.Errorf("ordered = %v, want %v", got, want)
	}
}

func TestNoAddressIsAnError(t *testing.T) {
	h, lo := emptyNode(t)
	if err := h.LinkSetDown(lo); err != nil {
		t.Fatal(err)
	}
	list, err := h.AddrList(lo, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range list {
		if err := h.AddrDel(lo, &a); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := Addrs(); err == nil {
		t.Errorf("Addrs = %v without an error, for a node without addresses", got)
	}
}

// following runs a watch in the namespace of the calling thread.
func following[T any](t *testing.T, watch func(context.Context, func(T)) error) <-chan T {
	t.Helper()
	ns, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	told := make(chan T, 1000)
	ended := make(chan error, 1)
	go func() {
		defer ns.Close()
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			ended <- err
			return
		}
		ended <- watch(ctx, func(now T) { told <- now })
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the watch = %v, want nil once its context ends", err)
		}
	})
	return told
}

// await waits until something is told that is as it should be.
func await[T any](t *testing.T, told <-chan T, what string, ok func(T) bool) {
	t.Helper()
	deadline := time.After(hangTimeout)
	for {
		select {
		case got := <-told:
			if ok(got) {
				return
			}
		case <-deadline:
			t.Fatalf("never told: %s", what)
		}
	}
}

func TestWatch(t *testing.T) {
	h, lo := emptyNode(t)
	told := following(t, Watch)
	await(t, told, "the addresses at the start", func(a []netip.Addr) bool {
		return slices.Contains(a, netip.MustParseAddr("127.0.0.1"))
	})
	for _, text := range []string{"192.0.2.7/32", "2001:db8::7/128"} {
		want := netip.MustParsePrefix(text).Addr()
		if err := h.AddrAdd(lo, address(text, 0)); err != nil {
			t.Fatal(err)
		}
		await(t, told, text+" added", func(a []netip.Addr) bool { return slices.Contains(a, want) })
		if err := h.AddrDel(lo, address(text, 0)); err != nil {
			t.Fatal(err)
		}
		await(t, told, text+" removed", func(a []netip.Addr) bool { return !slices.Contains(a, want) })
	}
}

// A node that loses its last address, as one whose addresses cannot be read,
// keeps those known before; and more changes at once than the kernel keeps for
// a reader do not make it deaf.
func TestWatchNeverShrinksToNothing(t *testing.T) {
	h, lo := emptyNode(t)
	told := following(t, Watch)
	await(t, told, "the addresses at the start", func(a []netip.Addr) bool { return len(a) > 0 })
	list, err := h.AddrList(lo, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range list {
		if err := h.AddrDel(lo, &a); err != nil {
			t.Fatal(err)
		}
	}
	for range 2000 {
		if err := h.AddrAdd(lo, address("192.0.2.7/32", 0)); err != nil {
			t.Fatal(err)
		}
		if err := h.AddrDel(lo, address("192.0.2.7/32", 0)); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.AddrAdd(lo, address("192.0.2.8/32", 0)); err != nil {
		t.Fatal(err)
	}
	await(t, told, "the address that came last", func(a []netip.Addr) bool {
		if len(a) == 0 {
			t.Error("told an empty list")
		}
		return slices.Contains(a, netip.MustParseAddr("192.0.2.8"))
	})
}

func TestDefaultRouteComesFirst(t *testing.T) {
	on := func(link int, cidr string) netlink.Addr {
		a, err := netlink.ParseAddr(cidr)
		if err != nil {
			t.Fatal(err)
		}
		a.LinkIndex = link
		return *a
	}
	got := ordered([]netlink.Addr{on(1, "127.0.0.1/8"), on(2, "10.244.1.1/24"), on(3, "192.168.9.1/24"), on(3, "fd00::1/64")}, 3)
	want := []netip.Addr{netip.MustParseAddr("192.168.9.1"), netip.MustParseAddr("fd00::1"), netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("10.244.1.1")}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
