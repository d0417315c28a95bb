// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestReservedPortsAreLeftOut(t *testing.T) {
	all := sourcePortsWithout("\n")
	if len(all) != lastSourcePort-firstSourcePort+1 {
		t.Fatalf("%d ports with none reserved", len(all))
	}
	some := sourcePortsWithout("80,11000,11002-11004,29990-40000\n")
	for _, p := range all {
		reserved := p == 11000 || p >= 11002 && p <= 11004 || p >= 29990
		if slices.Contains(some, p) == reserved {
			t.Fatalf("port %d is chosen or left out wrongly", p)
		}
	}
	if got := sourcePortsWithout("1-65535").any(); got != 0 {
		t.Errorf("port %d is chosen, though all are reserved", got)
	}
}

// TestSourcePorts looks at the ports of transparent
// connections.
func TestSourcePorts(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.listen(0, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
		w.echoUDP(0)
		for _, network := range []string{"tcp", "udp"} {
			d := newDialer(w.family, w.p.relay.ns)
			dial := func() uint16 {
				c, err := d.dial(context.Background(), network, w.endpoint(3).Addr(), w.endpoint(0))
				w.must(err)
				t.Cleanup(func() { c.Close() })
				return netip.MustParseAddrPort(c.LocalAddr().String()).Port()
			}
			for range 50 {
				if p := dial(); p < firstSourcePort || p > lastSourcePort {
					t.Fatalf("a %s connection has port %d, where clients have their own", network, p)
				}
			}
			// Where none is free the kernel chooses.
			d.sources = sourcePorts{10999}
			if p := dial(); p != 10999 {
				t.Fatalf("a %s connection has port %d, want the free 10999", network, p)
			}
			if p := dial(); p == 10999 {
				t.Fatalf("two %s connections have the same port", network)
			}
		}
	})
}

// TestSourcePortsAreShared opens connections from one port to two endpoints.
func TestSourcePortsAreShared(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.listen(0, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
		w.listen(1, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
		d := newDialer(w.family, w.p.relay.ns)
		from := netip.AddrPortFrom(w.endpoint(3).Addr(), 10999)
		for n := range 2 {
			c, err := d.dialFrom(context.Background(), "tcp", from, w.endpoint(n))
			w.must(err)
			defer c.Close()
		}
		if _, err := d.dialFrom(context.Background(), "tcp", from, w.endpoint(1)); !isPortTaken(err) || !errors.Is(err, unix.EADDRNOTAVAIL) {
			t.Errorf("got %v for a connection that there is already", err)
		}
	})
}
