package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// deviceName is the dummy device that holds the virtual addresses: kube-proxy's
// name, which other software on a node knows to leave alone.
const DeviceName = "kube-ipvs0"

// device is the dummy device, and what there is of other addresses.
type Device struct {
	family plan.Family
	nl     *netlink.Handle
	pipe   *pipe        // for what changes addresses
	link   netlink.Link // nil until ensure
}

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

func (d *Device) Close() {
	d.nl.Close()
	d.pipe.close()
}

// find looks for the device; it is no error if there is none.
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

func (d *Device) Exists() bool { return d.link != nil }

// ensure makes the device if there is none. It is up, because the addresses of
// a device that is down are not all in use.
func (d *Device) Ensure() error {
	if err := d.Find(); err != nil {
		return err
	}
	if d.link == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = DeviceName
		err := d.nl.LinkAdd(&netlink.Dummy{LinkAttrs: attrs})
		if err != nil && !errors.Is(err, unix.EEXIST) { // the other family was quicker
			return fmt.Errorf("make device %s: %w", DeviceName, err)
		}
		if err := d.Find(); err != nil {
			return err
		}
		if d.link == nil {
			return fmt.Errorf("device %s is gone as soon as made", DeviceName)
		}
	}
	if err := d.nl.LinkSetUp(d.link); err != nil {
		return fmt.Errorf("set device %s up: %w", DeviceName, err)
	}
	return nil
}

// held lists the virtual addresses on the device, and those of the node's other
// addresses that are not link-local.
func (d *Device) Addresses() (ours, others map[netip.Addr]bool, err error) {
	af := netlink.FAMILY_V4
	if d.family == plan.IPv6 {
		af = netlink.FAMILY_V6
	}
	ours, others = make(map[netip.Addr]bool), make(map[netip.Addr]bool)
	var list []netlink.Addr
	for range 5 { // the listing says so if it met a change
		if list, err = d.nl.AddrList(nil, af); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("list the node's addresses: %w", err)
	}
	for _, a := range list {
		addr, ok := netip.AddrFromSlice(a.IP)
		if addr = addr.Unmap(); !ok || addr.IsLinkLocalUnicast() {
			continue
		}
		if d.link != nil && a.LinkIndex == d.link.Attrs().Index {
			ours[addr] = true
		} else {
			others[addr] = true
		}
	}
	return ours, others, nil
}

// isLocal says whether the node holds an address. It asks for the entry of the
// routing table that a packet to it meets (RTM_F_FIB_MATCH, kernel 4.13): in the
// place of that the kernel's IPv6 would say which source address a packet would
// have, for which it compares all that the device has.
func (d *Device) IsLocal(a netip.Addr) bool {
	routes, err := d.nl.RouteGetWithOptions(net.IP(a.AsSlice()), &netlink.RouteGetOptions{FIBMatch: true})
	return err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL
}

// add gives the device addresses and tells done of each that it has then.
func (d *Device) Add(addrs []netip.Addr, done func(netip.Addr)) error {
	return d.change(unix.RTM_NEWADDR, addrs, "cannot be added to", done)
}

// remove takes addresses from the device and tells done of each that it has no
// more.
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

// settle waits until packets to addresses that were just added are taken for
// the node's own: the kernel's IPv6 sees to that a moment after it has said that
// the address is there. A connection that is quicker would be forwarded, and
// could not be redirected any more.
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

// removeUnused removes the device if no virtual address of either family is on
// it, and says whether it did.
func (d *Device) RemoveUnused() (removed bool, err error) {
	for _, af := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := d.nl.AddrList(d.link, af)
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

// probeDevice exists for a moment.
const probeDevice = "signalbox-probe"

// probeDummy makes a dummy device for a moment, unless the mode has one.
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
