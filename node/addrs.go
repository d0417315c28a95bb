package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"

	"signalbox/proxier"
)

// Addrs returns every address that an interface of this network namespace
// has, of both families, loopback included, in the kernel's order of
// interfaces. IPv6 link-local addresses are left out: they mean nothing
// without an interface beside them.
func Addrs() ([]netip.Addr, error) {
	var found []netlink.Addr
	var err error
	// A dump that raced with a change says so, and may then lack addresses.
	for range 5 {
		found, err = netlink.AddrList(nil, netlink.FAMILY_ALL)
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("listing this node's addresses: %w", err)
	}
	var addrs []netip.Addr
	for _, a := range found {
		addr, ok := netip.AddrFromSlice(a.IP)
		if addr = addr.Unmap(); ok && !(addr.Is6() && addr.IsLinkLocalUnicast()) && !slices.Contains(addrs, addr) {
			addrs = append(addrs, addr)
		}
	}
	return addrs, nil
}

// Watch calls tell with the node's addresses, at once and whenever they
// change, until ctx ends; it returns nil then. What cannot be read is read
// again later: an address is never taken away because reading failed.
func Watch(ctx context.Context, tell func([]netip.Addr)) error {
	var last []netip.Addr
	for {
		if err := watchOnce(ctx, &last, tell); ctx.Err() != nil {
			return nil
		} else if err != nil && last == nil {
			return err // nothing was ever read: this will not get better
		}
		// The subscription broke, for want of buffer space in a storm of
		// changes for example. A new one begins with reading everything.
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(resubscribe):
		}
	}
}

// resubscribe is how long to wait before subscribing anew.
const resubscribe = 200 * time.Millisecond

// watchOnce lives as long as one subscription.
func watchOnce(ctx context.Context, last *[]netip.Addr, tell func([]netip.Addr)) error {
	done := make(chan struct{})
	defer close(done)
	changes := make(chan netlink.AddrUpdate)
	broken := make(chan error, 1)
	err := netlink.AddrSubscribeWithOptions(changes, done, netlink.AddrSubscribeOptions{
		ErrorCallback: func(err error) {
			select {
			case broken <- err:
			default:
			}
		},
	})
	if err != nil {
		return fmt.Errorf("subscribing to this node's addresses: %w", err)
	}
	defer func() { go drain(changes) }() // the library's goroutine must not hang on a last update
	for {
		if err := tellChanged(last, tell); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case err := <-broken:
			return err
		case _, ok := <-changes:
			if !ok {
				return errors.New("the subscription ended")
			}
		}
	}
}

func drain(changes <-chan netlink.AddrUpdate) {
	for range changes {
	}
}

func tellChanged(last *[]netip.Addr, tell func([]netip.Addr)) error {
	addrs, err := Addrs()
	if err != nil {
		return err
	}
	if len(addrs) == 0 && len(*last) > 0 || slices.Equal(addrs, *last) {
		return nil // a namespace has at least loopback: an empty answer is a failed one
	}
	*last = addrs
	tell(slices.Clone(addrs))
	return nil
}

// FamilyUsable says why no Service of a family can be served here, or returns
// nil.
func FamilyUsable(family proxier.Family) error {
	if family == proxier.IPv4 {
		return nil
	}
	disabled, err := Sysctl("net/ipv6/conf/all/disable_ipv6")
	switch {
	case err != nil:
		return fmt.Errorf("the kernel has no IPv6: %w", err)
	case disabled != "0":
		return errors.New("IPv6 is switched off (net.ipv6.conf.all.disable_ipv6)")
	}
	return nil
}
