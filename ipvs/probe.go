package ipvs

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/nftables"
	"signalbox/proxier"
)

// probeDevice exists for a moment.
const probeDevice = "signalbox-probe"

// Supported says whether this node's kernel can do all that the mode needs, by
// asking it to. The error is a *proxier.UnsupportedError.
func Supported(f proxier.Family) error {
	unsupported := func(missing, remedy string, err error) error {
		return &proxier.UnsupportedError{Mode: Mode, Family: f, Missing: missing, Remedy: remedy, Err: err}
	}
	if _, err := os.Stat("/proc/net/if_inet6"); err != nil && f == proxier.IPv6 {
		return unsupported("IPv6 in the kernel", "start the kernel without ipv6.disable=1", err)
	}
	if _, err := netlink.GenlFamilyGet(familyName); err != nil {
		return unsupported("IPVS (ip_vs)", "load the module ip_vs (modprobe ip_vs); the kernel needs CONFIG_IP_VS", err)
	}
	if err := probeDummy(); err != nil {
		if errors.Is(err, unix.EPERM) {
			return unsupported("the right to change devices", "run as root or with CAP_NET_ADMIN", err)
		}
		return unsupported("dummy devices (dummy)", "load the module dummy; the kernel needs CONFIG_DUMMY", err)
	}
	var lacks *proxier.UnsupportedError
	if err := nftables.Supported(f); errors.As(err, &lacks) {
		return unsupported(lacks.Missing, lacks.Remedy, lacks.Err)
	}
	return probeServer(f, unsupported)
}

func probeDummy() error {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer nl.Close()
	if _, err := nl.LinkByName(deviceName); err == nil {
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

// probeServer makes a virtual server for a moment, by a mark that no packet
// has.
func probeServer(f proxier.Family, unsupported func(missing, remedy string, err error) error) error {
	k, err := openKernel(f)
	if err != nil {
		return unsupported("the netlink socket of IPVS", "load the module ip_vs", err)
	}
	defer k.close()
	key := serverKey{mark: noEndpoints}
	if err := do(k, op{verb: addServer, key: key, scheduler: defaultScheduler}); err != nil && !errors.Is(err, unix.EEXIST) {
		return unsupported(fmt.Sprintf("IPVS for %s with the scheduler %s", f, defaultScheduler), "the kernel needs CONFIG_IP_VS_RR, and for IPv6 CONFIG_IP_VS_IPV6", err)
	}
	if err := do(k, op{verb: removeServer, key: key}); err != nil {
		return unsupported("the right to change IPVS", "run as root or with CAP_NET_ADMIN", err)
	}
	return nil
}

// Cleanup removes this mode's table, its virtual servers and their addresses,
// of one family, and the device with the last address. Virtual servers of other
// software stay, and where kube-proxy's sets say that it serves in its ipvs
// mode, so do the addresses and what is at them. It is no error if there is
// nothing, and then removed is false.
func Cleanup(f proxier.Family) (removed bool, err error) {
	var failed []error
	d, err := openDevice(f)
	if err != nil {
		return false, err
	}
	defer d.close()
	if err := d.find(); err != nil {
		return false, err
	}
	ours, _, err := d.held()
	if err != nil {
		return false, err
	}
	if HasKubeProxy(f) {
		ours, d.link = nil, nil // kube-proxy's now
	}
	// First the addresses: then no packet comes for what goes after them.
	if d.link != nil {
		failed = append(failed, d.remove(slices.Collect(maps.Keys(ours)), func(netip.Addr) { removed = true }))
		device, err := d.removeUnused()
		removed = removed || device
		failed = append(failed, err)
	}
	if k, err := openKernel(f); err == nil { // without IPVS there is nothing to remove
		all, err := k.servers()
		var remove []op
		for key := range all {
			if isOurs(key.mark) || ours[key.addr] {
				remove = append(remove, op{verb: removeServer, key: key})
			}
		}
		failed = append(failed, err, k.send(remove, func(op) { removed = true }))
		k.close()
	}
	t, err := nftables.OpenTable(nftables.FamilyOf(f), tableName, nil)
	if err != nil {
		return removed, errors.Join(append(failed, err)...)
	}
	defer t.Close()
	table := t.DeleteTable()
	if err := t.Commit(); err != nil {
		failed = append(failed, fmt.Errorf("delete table %s of %s: %w", tableName, f, err))
	} else {
		removed = removed || table
	}
	return removed, errors.Join(failed...)
}
