// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/netlab"
)

// Both ways are timed as often, each goes first in half of the turns, and a time that a
// signal interrupted does not count.
func TestTakeTurns(t *testing.T) {
	through, direct := netip.MustParseAddrPort("10.96.0.1:80"), netip.MustParseAddrPort("10.244.1.10:8080")
	var order []netip.AddrPort
	l, err := TakeTurns(t.Context(), func(to netip.AddrPort) (time.Duration, error) {
		if len(order) == 3 {
			order = append(order, netip.AddrPort{})
			return time.Hour, unix.EINTR
		}
		order = append(order, to)
		if to == through {
			return 2, nil
		}
		return 1, nil
	}, through, direct)
	if err != nil || len(l.Through) != turns || len(l.Direct) != turns || Median(l.Through) != 2 || Median(l.Direct) != 1 {
		t.Errorf("%d and %d times, median %v and %v (%v)", len(l.Through), len(l.Direct), Median(l.Through), Median(l.Direct), err)
	}
	if order[0] != through || order[1] != direct || order[2] != direct || order[4] != through {
		t.Errorf("the first turns are %v", order[:5])
	}
	refused := func(netip.AddrPort) (time.Duration, error) { return 0, unix.ECONNREFUSED }
	if _, err := TakeTurns(t.Context(), refused, through, direct); !errors.Is(err, unix.ECONNREFUSED) || !strings.Contains(err.Error(), through.String()) {
		t.Errorf("got error %v", err)
	}
}

// The real measurements, in both families: with a server, without one, and with one that
// does not do its part.
func TestMeasurements(t *testing.T) {
	lab, err := netlab.Lone("lone")
	if err != nil {
		t.Fatal(err)
	}
	defer lab.Close()
	host := lab.Host("lone")
	at := func(port uint16) []netip.AddrPort {
		return []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), netip.AddrPortFrom(netip.IPv6Loopback(), port)}
	}
	for port, handle := range map[string]func(net.Conn){":81": Discard, ":82": End, ":83": func(c net.Conn) { c.Write([]byte("x")) }} {
		l, err := host.Listen("tcp", port)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go handle(c)
			}
		}()
	}
	for _, to := range at(80) {
		if err := host.Serve(to); err != nil {
			t.Fatal(err)
		}
	}
	bulk := func(to netip.AddrPort) (float64, error) { return Bulk(host.Do, to, 1, time.Millisecond) }
	fresh := func(to netip.AddrPort) (float64, error) { return NewConnections(host.Do, to, 4, time.Millisecond) }
	once := func(measure func(netip.AddrPort) (time.Duration, error)) func(netip.AddrPort) (float64, error) {
		return func(to netip.AddrPort) (v float64, err error) {
			err = host.Do(func() error {
				took, err := measure(to)
				v = took.Seconds()
				return err
			})
			return v, err
		}
	}
	for _, c := range []struct {
		name      string
		measure   func(netip.AddrPort) (float64, error)
		good, bad uint16
	}{
		{"bulk", bulk, 81, 84}, {"new connections", fresh, 82, 83}, {"no server", fresh, 82, 84},
		{"connect", once(Connect), 80, 84}, {"datagram", once(Datagram), 80, 84},
	} {
		for i, to := range at(c.good) {
			if v, err := c.measure(to); v <= 0 || err != nil {
				t.Errorf("%s: %s: %v (%v)", c.name, to, v, err)
			}
			if v, err := c.measure(at(c.bad)[i]); err == nil {
				t.Errorf("%s: %s: %v, and no error", c.name, at(c.bad)[i], v)
			}
		}
	}
}
