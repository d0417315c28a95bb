// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"runtime"
	"slices"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"signalbox/internal/nstest"
	"signalbox/proxier/plan"
)

// loopback is a Device with lo of a new network namespace. Not every kernel has dummy devices.
func loopback(t *testing.T, family plan.Family) *Device {
	t.Helper()
	nstest.Enter(t)
	d, err := OpenDevice(family)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	if d.link, err = d.nl.LinkByName("lo"); err != nil {
		t.Fatal(err)
	}
	if err := d.nl.LinkSetUp(d.link); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestManyAddresses adds and removes more addresses than a window has. Some exist already, or
// do not exist.
func TestManyAddresses(t *testing.T) {
	for _, family := range plan.Families {
		t.Run(family.String(), func(t *testing.T) {
			d := loopback(t, family)
			addrs := world{family}.addresses(5*window + 7)
			check := func(change func([]netip.Addr, func(netip.Addr)) error, args, want []netip.Addr) {
				t.Helper()
				var done []netip.Addr
				if err := change(args, func(a netip.Addr) { done = append(done, a) }); err != nil {
					t.Fatal(err)
				}
				if !slices.Equal(done, args) {
					t.Errorf("%d of %d are said to be done, or not in order", len(done), len(args))
				}
				held, _, err := d.Addresses()
				for a := range held {
					if a.IsLoopback() {
						delete(held, a)
					}
				}
				if err != nil || len(held) != len(want) || slices.ContainsFunc(want, func(a netip.Addr) bool { return !held[a] }) {
					t.Errorf("the device has %d addresses and not %d (%v)", len(held), len(want), err)
				}
			}
			check(d.Add, addrs[3:200], addrs[3:200])
			check(d.Add, addrs, addrs)
			check(d.Remove, addrs[:300], addrs[300:])
			check(d.Remove, addrs, nil)
		})
	}
}

// TestRefusalIsItsRequests checks that a refusal reaches the callback of its request, and that
// send stops after the window.
func TestRefusalIsItsRequests(t *testing.T) {
	w := world{plan.IPv4}
	d := loopback(t, w.family)
	addrs := w.addresses(4 * window)
	wrong := []int{window, window + 5, window + 6, 2*window - 1} // a window's first and last, too
	for _, i := range wrong {
		if err := d.Add(addrs[i:i+1], func(netip.Addr) {}); err != nil {
			t.Fatal(err)
		}
	}
	answers := 0
	err := d.pipe.send(len(addrs), addressRequests(unix.RTM_NEWADDR, d.link.Attrs().Index, addrs), func(i int, err error) bool {
		if refused := slices.Contains(wrong, i); i != answers || refused != errors.Is(err, unix.EEXIST) || refused == (err == nil) {
			t.Errorf("answer %d is to request %d: %v", answers, i, err)
		}
		answers++
		return err == nil
	})
	if err != nil || answers != 2*window {
		t.Errorf("%d answers, %v", answers, err)
	}
}

// TestLostAnswers checks that lost answers cause an error, and that later answers are not
// mistaken for them.
func TestLostAnswers(t *testing.T) {
	w := world{plan.IPv4}
	d := loopback(t, w.family)
	addrs := w.addresses(window)
	add := func() (done int, err error) {
		err = d.Add(addrs, func(netip.Addr) { done++ })
		return done, err
	}
	if n, err := add(); n != window || err != nil {
		t.Fatal(n, err)
	}
	if err := d.pipe.conn.SetReadBuffer(1); err != nil {
		t.Fatal(err)
	}
	if n, err := add(); !errors.Is(err, unix.ENOBUFS) { // each is there already, and that is an answer
		t.Errorf("answers without room for them: %d done, %v", n, err)
	}
	if n, err := add(); n != window || err != nil {
		t.Errorf("again: %d of %d, %v", n, window, err)
	}
}

// TestEncoding compares requests with <linux/ip_vs.h>.
func TestEncoding(t *testing.T) {
	w := world{plan.IPv4}
	key := ServerKey{Addr: w.vip(1), Port: 80, Protocol: plan.SCTP}
	dest := netip.MustParseAddrPort("10.244.1.3:8080")
	h := &IPVS{family: w.family}
	data := h.encode(&Op{Verb: SetDestination, Key: key, Destination: dest, Weight: 65535})
	if string(data[:4]) != "\x06\x01\x00\x00" {
		t.Errorf("generic header % x", data[:4])
	}
	found := make(map[[2]uint16][]byte) // group and attribute -> value
	ad, err := netlink.NewAttributeDecoder(data[4:])
	if err != nil {
		t.Fatal(err)
	}
	for ad.Next() {
		group := ad.Type()
		ad.Nested(func(ad *netlink.AttributeDecoder) error {
			for ad.Next() {
				found[[2]uint16{group, ad.Type()}] = ad.Bytes()
			}
			return nil
		})
	}
	if ad.Err() != nil {
		t.Fatal(ad.Err())
	}
	native := func(n uint16) string { return string(binary.NativeEndian.AppendUint16(nil, n)) }
	for where, want := range map[[2]uint16]string{
		{attrService, serviceFamily}: native(unix.AF_INET), {attrService, serviceProtocol}: native(132),
		{attrService, serviceAddr}: "\x0a\x60\x00\x01", {attrService, servicePort}: "\x00\x50",
		{attrDest, destAddr}: "\x0a\xf4\x01\x03", {attrDest, destPort}: "\x1f\x90",
		{attrDest, destMethod}:         string(binary.NativeEndian.AppendUint32(nil, uint32(Masquerading))),
		{attrDest, destWeight}:         string(binary.NativeEndian.AppendUint32(nil, 65535)),
		{attrDest, destUpperThreshold}: "\x00\x00\x00\x00", {attrDest, destLowerThreshold}: "\x00\x00\x00\x00",
	} {
		if got, there := found[where]; !there || string(got) != want {
			t.Errorf("attribute %v is % x and not % x", where, got, want)
		}
		delete(found, where)
	}
	if len(found) > 0 {
		t.Errorf("also there: %v", found)
	}
}

// TestNoConnection checks that a pipe that cannot be opened returns an error, and works later.
func TestNoConnection(t *testing.T) {
	w := world{plan.IPv4}
	d := loopback(t, w.family)
	d.pipe.conn.Close()
	possible := d.pipe.protocol
	d.pipe.protocol = -1
	for range 2 {
		if err := d.Add(w.addresses(1), func(netip.Addr) {}); err == nil {
			t.Error("there is no error without a connection")
		}
	}
	d.pipe.protocol = possible
	if err := d.Add(w.addresses(1), func(netip.Addr) {}); err != nil {
		t.Error(err)
	}
}

// TestPipeNeedsNoCapability opens a pipe without CAP_SYS_ADMIN, as in a container. Other modes
// do so to look for virtual servers.
func TestPipeNeedsNoCapability(t *testing.T) {
	opened := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends as it is
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			opened <- err
			return
		}
		p, err := openPipe(unix.NETLINK_GENERIC)
		if err == nil {
			p.close()
		}
		opened <- err
	}()
	if err := <-opened; err != nil {
		t.Error(err)
	}
}
