package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/internal/wait"
)

// maxInterrupted is how often a listing that a change interrupted is begun
// anew.
const maxInterrupted = 10

// errNoAddrs is returned instead of an empty list: a node without so much as a
// loopback address is one whose addresses could not be seen.
var errNoAddrs = errors.New("the kernel named no address at all")

// Addrs returns the addresses of this node's interfaces in both families, each
// once, loopback included: those of the interface that has the default route
// come first, then the kernel's order of interfaces. Temporary and
// deprecated IPv6 addresses come last: they are the node's, and nobody should
// be sent to them. IPv6 link-local addresses are left out: they mean nothing
// without an interface beside them. The list is never empty without an error.
func Addrs() ([]netip.Addr, error) {
	h, err := openRoute()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	return addrs(h)
}

func openRoute() (*netlink.Handle, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket for this node's addresses: %w", err)
	}
	return h, nil
}

func addrs(h *netlink.Handle) ([]netip.Addr, error) {
	var list []netlink.Addr
	var err error = netlink.ErrDumpInterrupted
	for try := 0; try < maxInterrupted && errors.Is(err, netlink.ErrDumpInterrupted); try++ {
		list, err = h.AddrList(nil, netlink.FAMILY_ALL)
	}
	if err != nil {
		return nil, fmt.Errorf("listing this node's addresses: %w", err)
	}
	out := ordered(list, defaultLink(h))
	if len(out) == 0 {
		return nil, fmt.Errorf("listing this node's addresses: %w", errNoAddrs)
	}
	return out, nil
}

// defaultLink is the index of the interface that the default route leaves by,
// IPv4's before IPv6's, or 0. Where routes cannot be read, no order is lost
// that anybody could rely on.
func defaultLink(h *netlink.Handle) int {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, _ := h.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_DST)
		for _, r := range routes {
			if r.LinkIndex > 0 && (r.Type == unix.RTN_UNICAST || r.Type == 0) {
				return r.LinkIndex
			}
		}
	}
	return 0
}

func ordered(list []netlink.Addr, first int) []netip.Addr {
	slices.SortStableFunc(list, func(a, b netlink.Addr) int {
		switch {
		case a.LinkIndex == first && b.LinkIndex != first:
			return -1
		case a.LinkIndex != first && b.LinkIndex == first:
			return 1
		}
		return 0
	})
	var out, last []netip.Addr
	seen := map[netip.Addr]bool{}
	for _, a := range list {
		ip, ok := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		if !ok || seen[ip] || ip.Is6() && ip.IsLinkLocalUnicast() || a.Flags&unix.IFA_F_DADFAILED != 0 {
			continue
		}
		seen[ip] = true
		if ip.Is6() && a.Flags&(unix.IFA_F_TEMPORARY|unix.IFA_F_DEPRECATED) != 0 {
			last = append(last, ip)
		} else {
			out = append(out, ip)
		}
	}
	return append(out, last...)
}

// The wait before the addresses are looked at again after a failure.
const (
	firstRetry = 50 * time.Millisecond
	lastRetry  = 5 * time.Second
)

// Watch calls changed with what Addrs returns, at once and whenever that
// changes, until ctx is done, and returns nil then. What cannot be read changes
// nothing: the last list that was whole goes on to count, and reading is tried
// again. It is an error that the kernel offers no netlink socket at all.
func Watch(ctx context.Context, changed func([]netip.Addr)) error {
	// Sockets that are opened later must be of the namespace that the caller
	// is in now. To name it would cost CAP_SYS_ADMIN, which a container has not.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	h, err := openRoute()
	if err != nil {
		return err
	}
	defer h.Close()
	w := watch{handle: h, changed: changed, retry: firstRetry}
	for ctx.Err() == nil {
		if err := w.follow(ctx); err != nil {
			wait.For(ctx, w.retry)
			w.retry = min(2*w.retry, lastRetry)
		}
	}
	return nil
}

type watch struct {
	handle  *netlink.Handle
	changed func([]netip.Addr)
	last    []netip.Addr
	retry   time.Duration
}

// follow reads the addresses and again after every change, until the
// subscription breaks (the kernel drops it where changes come faster than they
// are read) or reading fails.
func (w *watch) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	updates := make(chan netlink.AddrUpdate, 64)
	opts := netlink.AddrSubscribeOptions{ErrorCallback: func(error) {}}
	if err := netlink.AddrSubscribeWithOptions(updates, ctx.Done(), opts); err != nil {
		return fmt.Errorf("subscribing to this node's addresses: %w", err)
	}
	// The library's goroutine must never block on a list that nobody reads.
	defer func() {
		cancel()
		for range updates {
		}
	}()
	for {
		if err := w.read(); err != nil {
			return err
		}
		w.retry = firstRetry
		select {
		case <-ctx.Done():
			return nil
		case _, open := <-updates:
			if !open {
				return nil
			}
		}
		for drained := false; !drained; {
			select {
			case _, open := <-updates:
				drained = !open
			default:
				drained = true
			}
		}
	}
}

func (w *watch) read() error {
	now, err := addrs(w.handle)
	if err != nil {
		return err
	}
	if w.last == nil || !slices.Equal(now, w.last) {
		w.last = now
		w.changed(slices.Clone(now))
	}
	return nil
}
