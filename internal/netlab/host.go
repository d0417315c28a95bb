// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"signalbox/node"
)

// Host is one network namespace of a lab.
type Host struct {
	// Name is what the host answers with, for example "pod-a".
	Name string
	// Addr is the host's main address.
	Addr Pair

	lab *Lab
	ns  netns.NsHandle
	nl  *netlink.Handle // works inside ns, whichever thread uses it
}

// MissingError says that the kernel cannot build this lab.
type MissingError struct {
	// Feature is the kernel feature, for example "vxlan".
	Feature string
	Err     error
}

// Error names the feature and the kernel's answer.
func (e *MissingError) Error() string {
	return fmt.Sprintf("this kernel has no %s: %v", e.Feature, e.Err)
}

// Unwrap returns the kernel's answer.
func (e *MissingError) Unwrap() error { return e.Err }

// errAbandoned is what Do returns when fn ended its goroutine instead of
// returning.
var errAbandoned = errors.New("the function ended its goroutine")

// errClosed is what Do returns after Lab.Close.
var errClosed = errors.New("the lab is closed")

// Do runs fn inside the host, on a thread of its own: sockets it opens and
// programs it starts belong to the host, also after Do has returned. Goroutines
// that fn starts do not run inside the host.
func (h *Host) Do(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errAbandoned
		defer func() { done <- err }()
		runtime.LockOSThread()
		if err = h.lab.enter(&h.ns); err != nil {
			err = fmt.Errorf("entering %s: %w", h.Name, err)
			return // the thread, still locked, ends with the goroutine
		}
		err = errAbandoned
		err = fn()
		if h.lab.enter(&h.lab.home) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return <-done
}

// Start starts a program inside the host.
func (h *Host) Start(cmd *exec.Cmd) error {
	return h.Do(func() error {
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("starting %s on %s: %w", cmd.Path, h.Name, err)
		}
		return nil
	})
}

// Addrs returns every address that the host holds, loopback included,
// link-local ones left out.
func (h *Host) Addrs() (addrs []netip.Addr, err error) {
	err = h.Do(func() error {
		addrs, err = node.Addrs()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.Name, err)
	}
	return addrs, nil
}

// AddAddr gives the host one more address on its main interface: see AddAddrTo.
func (h *Host) AddAddr(a netip.Addr) error { return h.AddAddrTo("eth0", a) }

// AddAddrTo gives an interface of the host one more address. It returns when
// the kernel routes packets to that address to the host itself, which for IPv6 is a
// moment after the kernel has added it.
func (h *Host) AddAddrTo(link string, a netip.Addr) error {
	return h.addr(link, netip.PrefixFrom(a, a.BitLen()))
}

// RemoveAddr takes an address given by AddAddr away.
func (h *Host) RemoveAddr(a netip.Addr) error {
	link, err := h.nl.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("%s: %w", h.Name, err)
	}
	if err := h.nl.AddrDel(link, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen()))}); err != nil {
		return fmt.Errorf("removing %s from %s: %w", a, h.Name, err)
	}
	return nil
}

// SetRouteSource has the host's route to a destination name a source address, or with
// one that is not valid none.
func (h *Host) SetRouteSource(dst netip.Prefix, source netip.Addr) error {
	family := netlink.FAMILY_V4
	if dst.Addr().Is6() {
		family = netlink.FAMILY_V6
	}
	routes, err := h.nl.RouteListFiltered(family, &netlink.Route{Dst: ipNet(dst)}, netlink.RT_FILTER_DST)
	if err != nil || len(routes) != 1 {
		return fmt.Errorf("%s has not one route to %s: %v %v", h.Name, dst, routes, err)
	}
	r := routes[0]
	r.Src = source.AsSlice()
	if err := h.nl.RouteReplace(&r); err != nil {
		return fmt.Errorf("%s: naming the source %s in the route to %s: %w", h.Name, source, dst, err)
	}
	return nil
}

func newHost(lab *Lab, name string, addr Pair) (*Host, error) {
	h := &Host{Name: name, Addr: addr, lab: lab, ns: netns.None()}
	made := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		ns, err := netns.New()
		h.ns = ns
		if err == nil && lab.enter(&lab.home) == nil {
			runtime.UnlockOSThread()
		}
		made <- err
	}()
	if err := <-made; err != nil {
		return nil, fmt.Errorf("making the network namespace of %s (root is needed): %w", name, err)
	}
	var err error
	if h.nl, err = netlink.NewHandleAt(h.ns, unix.NETLINK_ROUTE); err != nil {
		h.close()
		return nil, fmt.Errorf("netlink socket in %s: %w", name, err)
	}
	if err := h.up("lo"); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

func (h *Host) close() {
	if h.nl != nil {
		h.nl.Close()
	}
	if h.ns.IsOpen() {
		h.ns.Close()
	}
}

// sysctls writes kernel parameters of the host, in order. Keys are paths below
// /proc/sys.
func (h *Host) sysctls(settings [][2]string) error {
	return h.Do(func() error {
		for _, s := range settings {
			if err := os.WriteFile(filepath.Join("/proc/sys", s[0]), []byte(s[1]), 0o644); err != nil {
				return fmt.Errorf("%s: %w", h.Name, err)
			}
		}
		return nil
	})
}

func (h *Host) link(name string) (netlink.Link, error) {
	l, err := h.nl.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("%s has no interface %s: %w", h.Name, name, err)
	}
	return l, nil
}

func (h *Host) up(name string) error {
	l, err := h.link(name)
	if err != nil {
		return err
	}
	if err := h.nl.LinkSetUp(l); err != nil {
		return fmt.Errorf("%s: setting %s up: %w", h.Name, name, err)
	}
	return nil
}

// addr gives an interface an address. Nobody else in a lab can hold it, so duplicate
// address detection is left out.
func (h *Host) addr(name string, p netip.Prefix) error {
	l, err := h.link(name)
	if err != nil {
		return err
	}
	if err := AddAddr(h.nl, l, p); err != nil {
		return fmt.Errorf("%s: giving %s the address %s: %w", h.Name, name, p, err)
	}
	return nil
}

// localTimeout is longer than a busy kernel needs for one route.
const localTimeout = time.Minute

// AddAddr gives an interface an address, and returns when packets to it arrive. The
// interface must be up. The kernel adds the local route of an IPv6 address later, in a
// work queue (addrconf_dad_work).
func AddAddr(nl *netlink.Handle, l netlink.Link, p netip.Prefix) error {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := nl.AddrAdd(l, a); err != nil {
		return err
	}
	for end := time.Now().Add(localTimeout); ; time.Sleep(time.Millisecond) {
		kind := node.RouteType(nl, p.Addr())
		// The first address of a network is that of every router, too: RTN_ANYCAST.
		if kind == unix.RTN_LOCAL || kind == unix.RTN_ANYCAST {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("the kernel does not take it for local: its route has type %d", kind)
		}
	}
}

// route sends dst out of an interface: straight to the addressed host, or by a
// neighbour there where via is valid.
func (h *Host) route(dst netip.Prefix, name string, via netip.Addr) error {
	l, err := h.link(name)
	if err != nil {
		return err
	}
	r := &netlink.Route{Dst: ipNet(dst), LinkIndex: l.Attrs().Index, Scope: netlink.SCOPE_LINK}
	if via.IsValid() {
		r.Gw = via.AsSlice()
		r.Scope = netlink.SCOPE_UNIVERSE
		r.SetFlag(netlink.FLAG_ONLINK)
	}
	if err := h.nl.RouteReplace(r); err != nil {
		return fmt.Errorf("%s: routing %s by %s: %w", h.Name, dst, name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
