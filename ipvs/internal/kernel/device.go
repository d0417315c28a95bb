// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/node"
	"signalbox/proxier/plan"
)

// DeviceName is the dummy device with the virtual addresses. The name is kube-proxy's: other
// software on a node ignores this device.
const DeviceName = node.ServiceDevice

// Device is the dummy device in one IP family.
type Device struct {
	family plan.Family
	nl     *netlink.Handle
	pipe   *pipe        // adds and removes addresses
	link   netlink.Link // nil before Find or Ensure, and if there is no device
}

// OpenDevice connects to the caller's network namespace.
func OpenDevice(family plan.Family) (*Device, error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink to the routing tables: %w", err)
	}
	if err := nl.SetSocketTimeout(10 * time.Second); err != nil {
		nl.Close()
		return nil, err
	}
	p, err := openPipe(unix.NETLINK_ROUTE)
	if err != nil {
		nl.Close()
		return nil, err
	}
	return &Device{family: family, nl: nl, pipe: p}, nil
}

// Close closes the connections. The device stays.
func (d *Device) Close() {
	d.nl.Close()
	d.pipe.close()
}

// Find looks for the device. It is no error if there is none.
func (d *Device) Find() error {
	link, err := d.nl.LinkByName(DeviceName)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		d.link = nil
		return nil
	}
	if err != nil {
		return fmt.Errorf("device %s: %w", DeviceName, err)
	}
	d.link = link
	return nil
}

// Exists says whether Find or Ensure has found the device.
func (d *Device) Exists() bool { return d.link != nil }

// Ensure adds the device if there is none, and sets it up: the kernel does not use all
// addresses of a device that is down.
func (d *Device) Ensure() error {
	if err := d.Find(); err != nil {
		return err
	}
	if d.link == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = DeviceName
		err := d.nl.LinkAdd(&netlink.Dummy{LinkAttrs: attrs})
		if err != nil && !errors.Is(err, unix.EEXIST) { // the other family has added it
			return fmt.Errorf("make device %s: %w", DeviceName, err)
		}
		if err := d.Find(); err != nil {
			return err
		}
		if d.link == nil {
			return fmt.Errorf("device %s disappeared after it was made", DeviceName)
		}
	}
	if err := d.nl.LinkSetUp(d.link); err != nil {
		return fmt.Errorf("set device %s up: %w", DeviceName, err)
	}
	return nil
}

// Addresses lists the addresses of the device, and those of the node's other devices. Both
// lack link-local addresses.
func (d *Device) Addresses() (ours, others map[netip.Addr]bool, err error) {
	af := netlink.FAMILY_V4
	if d.family == plan.IPv6 {
		af = netlink.FAMILY_V6
	}
	ours, others = make(map[netip.Addr]bool), make(map[netip.Addr]bool)
	list, err := node.Whole(func() ([]netlink.Addr, error) { return d.nl.AddrList(nil, af) })
	if err != nil {
		return nil, nil, fmt.Errorf("list the node's addresses: %w", err)
	}
	for _, a := range list {
		switch addr, ok := virtualAddr(a.IP); {
		case !ok:
		case d.has(a.LinkIndex):
			ours[addr] = true
		default:
			others[addr] = true
		}
	}
	return ours, others, nil
}

// quietTime is how long the addresses are left alone before a comparison.
const quietTime = 25 * time.Millisecond

// Watch calls compare at once, and after changes of addresses that unexpected reports. A
// device that is removed loses its addresses. Watch returns when ctx ends.
func (d *Device) Watch(ctx context.Context, unexpected func(netlink.AddrUpdate) bool, compare func() error) {
	node.Changes[netlink.AddrUpdate]{
		Subscribe: func(updates chan<- netlink.AddrUpdate, done <-chan struct{}) error {
			return netlink.AddrSubscribeWithOptions(updates, done, netlink.AddrSubscribeOptions{Namespace: &d.pipe.ns})
		},
		Concerns: unexpected, Read: compare, Quiet: quietTime,
	}.Follow(ctx)
}

// VirtualAddr returns the address that a notification is about, if Addresses lists it as
// one of the device.
func (d *Device) VirtualAddr(u netlink.AddrUpdate) (a netip.Addr, ok bool) {
	a, ok = virtualAddr(u.LinkAddress.IP)
	return a, ok && plan.FamilyOf(a) == d.family && d.has(u.LinkIndex)
}

func virtualAddr(ip net.IP) (a netip.Addr, ok bool) {
	a, ok = netip.AddrFromSlice(ip)
	a = a.Unmap()
	return a, ok && !a.IsLinkLocalUnicast()
}

func (d *Device) has(linkIndex int) bool { return d.link != nil && d.link.Attrs().Index == linkIndex }

// IsLocal says whether the node has an address.
func (d *Device) IsLocal(a netip.Addr) bool { return node.RouteType(d.nl, a) == unix.RTN_LOCAL }

// Add adds addresses and calls done for each that the device has then.
func (d *Device) Add(addrs []netip.Addr, done func(netip.Addr)) error {
	return d.change(unix.RTM_NEWADDR, addrs, "cannot be added to", done)
}

// Remove removes addresses and calls done for each that the device has no longer.
func (d *Device) Remove(addrs []netip.Addr, done func(netip.Addr)) error {
	return d.change(unix.RTM_DELADDR, addrs, "cannot be taken from", done)
}

func (d *Device) change(verb uint16, addrs []netip.Addr, complaint string, done func(netip.Addr)) error {
	if len(addrs) == 0 {
		return nil
	}
	already := map[uint16][]error{unix.RTM_NEWADDR: {unix.EEXIST}, unix.RTM_DELADDR: {unix.EADDRNOTAVAIL, unix.ENODEV}}[verb]
	var refused []error
	err := d.pipe.send(len(addrs), addressRequests(verb, d.link.Attrs().Index, addrs), func(i int, err error) bool {
		if err == nil || slices.ContainsFunc(already, func(a error) bool { return errors.Is(err, a) }) {
			done(addrs[i])
		} else {
			refused = append(refused, fmt.Errorf("%s %s the device %s: %w", addrs[i], complaint, DeviceName, err))
		}
		return len(refused) == 0
	})
	if err != nil {
		refused = append(refused, fmt.Errorf("change the addresses of %s: %w", DeviceName, err))
	}
	return summary(refused)
}

// AwaitLocal waits until the kernel delivers packets to added addresses locally. IPv6 does so
// shortly after it has confirmed the address. Before that, the kernel forwards packets, and
// IPVS cannot redirect their connections.
func (d *Device) AwaitLocal(addrs []netip.Addr) error {
	if d.family != plan.IPv6 {
		return nil
	}
	end := time.Now().Add(10 * time.Second)
	for _, a := range addrs {
		for wait := 100 * time.Microsecond; !d.IsLocal(a); wait = min(2*wait, 50*time.Millisecond) {
			if time.Now().After(end) {
				return fmt.Errorf("the kernel does not take %s on %s for an address of this node", a, DeviceName)
			}
			time.Sleep(wait)
		}
	}
	return nil
}

// RemoveUnused removes the device if it has no virtual address of either family, and says
// whether it did.
func (d *Device) RemoveUnused() (removed bool, err error) {
	for _, af := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := node.Whole(func() ([]netlink.Addr, error) { return d.nl.AddrList(d.link, af) })
		if err != nil {
			return false, fmt.Errorf("list the addresses of %s: %w", DeviceName, err)
		}
		for _, a := range list {
			if !a.IP.IsLinkLocalUnicast() {
				return false, nil
			}
		}
	}
	if err := d.nl.LinkDel(d.link); err != nil && !errors.Is(err, unix.ENODEV) {
		return false, fmt.Errorf("remove device %s: %w", DeviceName, err)
	}
	return true, nil
}

// probeDevice is the device of ProbeDummy.
const probeDevice = "signalbox-probe"

// ProbeDummy adds a dummy device and removes it, unless the mode has its device.
func ProbeDummy() error {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer nl.Close()
	if _, err := nl.LinkByName(DeviceName); err == nil {
		return nil
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = probeDevice
	link := &netlink.Dummy{LinkAttrs: attrs}
	if err := nl.LinkAdd(link); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := nl.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}

// RemoveProbe removes the device that ProbeDummy leaves if the process is killed in it.
func (d *Device) RemoveProbe() (removed bool, err error) {
	link, err := d.nl.LinkByName(probeDevice)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return false, nil
	}
	if err == nil {
		err = d.nl.LinkDel(link)
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return false, fmt.Errorf("remove device %s: %w", probeDevice, err)
	}
	return err == nil, nil
}
