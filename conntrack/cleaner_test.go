// SPDX-License-Identifier: Apache-2.0

package conntrack

import (
	"context"
	"errors"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

func inBothFamilies(t *testing.T, test func(t *testing.T, w *world)) {
	for _, family := range plan.Families {
		t.Run(family.String(), func(t *testing.T) { test(t, newWorld(t, family)) })
	}
}

// cleaner returns a Cleaner for the world, which knows the node's address.
func (w *world) cleaner(opts Options) *Cleaner {
	w.t.Helper()
	if opts.LocalAddrs == nil {
		opts.LocalAddrs = func() ([]netip.Addr, error) { return []netip.Addr{w.node}, nil }
	}
	c, err := New(opts)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(c.Close)
	return c
}

func (w *world) clean(c *Cleaner, usable *plan.EndpointSet, frontends ...plan.FrontendKey) {
	w.t.Helper()
	c.Clean(w.family, []plan.FlowOwner{{Frontends: frontends, Usable: usable}})
	ctx, cancel := context.WithTimeout(context.Background(), hangTimeout)
	defer cancel()
	if err := c.Flush(ctx); err != nil {
		w.t.Fatal(err)
	}
}

func set(at ...netip.AddrPort) *plan.EndpointSet {
	s := &plan.EndpointSet{}
	for _, a := range at {
		s.Endpoints = append(s.Endpoints, plan.Endpoint{AddrPort: a})
	}
	return s
}

func vipKey(a netip.AddrPort) plan.FrontendKey {
	return plan.FrontendKey{Addr: a.Addr(), Port: a.Port(), Protocol: plan.UDP}
}

func TestClientMovesToTheServingEndpoint(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, w *world) {
		w.rules([2]netip.AddrPort{w.vip, w.a}, [2]netip.AddrPort{w.other, w.a})
		moved, bystander := w.client(w.vip), w.client(w.other)
		if got := moved.ask() + bystander.ask(); got != "aa" {
			t.Fatalf("%q answered, want a both times", got)
		}
		w.rules([2]netip.AddrPort{w.vip, w.b}, [2]netip.AddrPort{w.other, w.a})
		if got := moved.ask(); got != "a" {
			t.Fatalf("%q answered: the kernel keeps to the first endpoint, or this test shows nothing", got)
		}
		w.clean(w.cleaner(Options{}), set(w.b), vipKey(w.vip))
		if got := moved.ask(); got != "b" {
			t.Errorf("%q answered, want b", got)
		}
		bystander.wantTracked(true, "after the other Service changed")
	})
}

func TestFlowToServingEndpointStays(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, w *world) {
		w.rules([2]netip.AddrPort{w.vip, w.a})
		kept := w.client(w.vip)
		kept.ask()
		w.clean(w.cleaner(Options{}), set(w.a, w.b), vipKey(w.vip))
		kept.wantTracked(true, "after a change that keeps its endpoint")
	})
}

func TestFlowsOfNobodyGo(t *testing.T) {
	for name, usable := range map[string]*plan.EndpointSet{"no endpoint left": set(), "Service gone": nil} {
		t.Run(name, func(t *testing.T) {
			inBothFamilies(t, func(t *testing.T, w *world) {
				w.rules([2]netip.AddrPort{w.vip, w.a})
				gone := w.client(w.vip)
				gone.ask()
				w.clean(w.cleaner(Options{}), usable, vipKey(w.vip))
				gone.wantTracked(false, name)
			})
		})
	}
}

func TestFlowMadeBeforeTheService(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, w *world) {
		early := w.client(w.vip)
		early.send()
		early.wantTracked(true, "before the Service")
		w.rules([2]netip.AddrPort{w.vip, w.a})
		w.clean(w.cleaner(Options{}), set(w.a), vipKey(w.vip))
		if got := early.ask(); got != "a" {
			t.Errorf("%q answered, want a", got)
		}
	})
}

func TestNodePort(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, w *world) {
		at := netip.AddrPortFrom(w.node, servedNodePort)
		w.rules([2]netip.AddrPort{at, w.a})
		stale := w.client(at)
		stale.ask()

		w.rules() // whoever comes now is not translated
		foreign, early := w.client(w.foreign), w.client(at)
		foreign.send()
		early.send()

		w.rules([2]netip.AddrPort{at, w.b})
		w.clean(w.cleaner(Options{}), set(w.b), nodePort(servedNodePort))
		foreign.wantTracked(true, "the same port of another host")
		for _, c := range []*client{stale, early} {
			if got := c.ask(); got != "b" {
				t.Errorf("%q answered, want b", got)
			}
		}
	})
}

func TestDaemonOfTheHostKeepsItsClients(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, w *world) {
		at := netip.AddrPortFrom(w.node, servedNodePort)
		w.serve(at, "daemon")
		kept := w.client(at)
		if got := kept.ask(); got != "daemon" {
			t.Fatalf("%q answered, want daemon", got)
		}
		w.clean(w.cleaner(Options{}), set(w.a), nodePort(servedNodePort))
		kept.wantTracked(true, "after a NodePort with its number appeared")
	})
}

// A failed look at the addresses must not make the node forget them.
func TestLastKnownAddressesCount(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	at := netip.AddrPortFrom(w.node, servedNodePort)
	answers := []func() ([]netip.Addr, error){
		func() ([]netip.Addr, error) { return []netip.Addr{w.node}, nil },
		func() ([]netip.Addr, error) { return nil, errors.New("no addresses today") },
		func() ([]netip.Addr, error) { return nil, nil },
	}
	calls := 0
	c := w.cleaner(Options{RecheckAfter: time.Hour, LocalAddrs: func() ([]netip.Addr, error) {
		calls++
		return answers[calls-1]()
	}})
	w.rules([2]netip.AddrPort{at, w.a})
	for range answers {
		gone := w.client(at)
		gone.ask()
		w.clean(c, nil, nodePort(servedNodePort))
		gone.wantTracked(false, "with the addresses known before")
	}
}

// A packet that met the old rules may make its flow only after the first scan.
func TestSecondScan(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	w.rules([2]netip.AddrPort{w.vip, w.a})
	late := w.client(w.vip)
	scans := make(chan Scan, 2)
	first := true
	c := w.cleaner(Options{RecheckAfter: time.Millisecond, Scanned: func(s Scan) {
		if first {
			first = false
			late.ask()
		}
		scans <- s
	}})
	c.Clean(w.family, []plan.FlowOwner{{Frontends: []plan.FrontendKey{vipKey(w.vip)}}})
	for i, deleted := range []int{0, 1} {
		s := <-scans
		if s.Deleted != deleted || s.Err != nil || s.Family != w.family || s.Frontends != 1 {
			t.Errorf("scan %d: %+v, want %d flows deleted for 1 frontend", i+1, s, deleted)
		}
	}
	late.wantTracked(false, "after the second scan")
}

// The latest task for a frontend counts in the second scan, too.
func TestLatestTaskCounts(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	w.rules([2]netip.AddrPort{w.vip, w.a})
	kept := w.client(w.vip)
	c := w.cleaner(Options{RecheckAfter: time.Hour})
	w.clean(c, nil, vipKey(w.vip))
	kept.ask()
	w.clean(c, set(w.a), vipKey(w.vip))
	kept.wantTracked(true, "after another Service took the frontend over")
}

func TestFlushEndsWithItsContext(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	blocked := make(chan struct{})
	c := w.cleaner(Options{LocalAddrs: func() ([]netip.Addr, error) { <-blocked; return []netip.Addr{w.node}, nil }})
	c.Clean(w.family, []plan.FlowOwner{{Frontends: []plan.FrontendKey{nodePort(servedNodePort)}}})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := c.Flush(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Flush = %v, want the context's error", err)
	}
	close(blocked)
}

func TestWithoutPrivilege(t *testing.T) {
	answer := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its lack of privilege
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		if err := unix.Capset(&hdr, &caps[0]); err != nil {
			answer <- err
			return
		}
		table, err := openTable()
		if err == nil {
			table.close()
		}
		answer <- err
	}()
	err := <-answer
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Errorf("openTable without CAP_NET_ADMIN = %v, want EPERM and the remedy", err)
	}
}

// TestTableOpensLater: a Cleaner that cannot open the table at first tries again.
func TestTableOpensLater(t *testing.T) {
	opened := make(chan error, 10)
	made := make(chan *Cleaner)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its lack of privilege
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		if err := unix.Capset(&hdr, &caps[0]); err != nil {
			t.Error(err)
		}
		c, err := New(Options{LocalAddrs: func() ([]netip.Addr, error) { return nil, nil }, Opened: func(err error) { opened <- err }})
		if err != nil {
			t.Error(err)
		}
		made <- c
	}()
	c := <-made
	defer c.Close()
	if err := <-opened; !errors.Is(err, unix.EPERM) {
		t.Errorf("the first try: %v", err)
	}
	if err := <-opened; err != nil {
		t.Errorf("the second try, with privileges: %v", err)
	}
	c.Clean(plan.IPv4, []plan.FlowOwner{{Frontends: []plan.FrontendKey{vipKey(netip.MustParseAddrPort("192.0.2.1:53"))}, Usable: set()}})
	ctx, cancel := context.WithTimeout(t.Context(), hangTimeout)
	defer cancel()
	if err := c.Flush(ctx); err != nil {
		t.Error(err)
	}
}
