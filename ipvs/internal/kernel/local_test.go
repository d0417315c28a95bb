// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// TestAddedAddressesAreLocal checks that AwaitLocal is sufficient: the kernel refuses a
// connection to a closed port of an added address.
func TestAddedAddressesAreLocal(t *testing.T) {
	for _, family := range plan.Families {
		d := loopback(t, family)
		addrs := world{family}.addresses(2000)
		local := func(want bool) {
			t.Helper()
			for _, a := range addrs {
				if d.IsLocal(a) != want {
					t.Fatalf("whether %s is local: %v", a, !want)
				}
			}
		}
		local(false)
		if err := d.Add(addrs, func(netip.Addr) {}); err != nil {
			t.Fatal(err)
		}
		if err := d.AwaitLocal(addrs); err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			c, err := net.DialTimeout("tcp", netip.AddrPortFrom(a, 1).String(), time.Minute)
			if err == nil {
				c.Close()
			}
			if !errors.Is(err, unix.ECONNREFUSED) {
				t.Fatal(err)
			}
		}
		local(true)
		if err := d.Remove(addrs, func(netip.Addr) {}); err != nil {
			t.Fatal(err)
		}
		local(false)
	}
}

// TestSettlingIsNotQuadratic compares the processor time of AwaitLocal on a device with few and
// with many addresses.
func TestSettlingIsNotQuadratic(t *testing.T) {
	d := loopback(t, plan.IPv6)
	addrs := world{plan.IPv6}.addresses(10_000)
	cost := func(n int) time.Duration {
		if err := d.Add(addrs[:n], func(netip.Addr) {}); err != nil {
			t.Fatal(err)
		}
		if err := d.AwaitLocal(addrs[:n]); err != nil {
			t.Fatal(err)
		}
		before := processorTime(t)
		for range 10 {
			if err := d.AwaitLocal(addrs[:100]); err != nil {
				t.Fatal(err)
			}
		}
		return processorTime(t) - before
	}
	few, many := cost(100), cost(len(addrs))
	t.Logf("of 100: %v, of %d: %v", few, len(addrs), many)
	if many > 20*max(few, 5*time.Millisecond) {
		t.Errorf("to ask for 1,000 addresses takes %v where there are 100, and %v where there are %d", few, many, len(addrs))
	}
}

// processorTime is the processor time of the calling thread, which the test has locked.
func processorTime(t *testing.T) time.Duration {
	var used unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &used); err != nil {
		t.Fatal(err)
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}
