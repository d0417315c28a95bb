// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	lvs "github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/internal/nstest"
	"signalbox/ipvs/internal/kernel"
	"signalbox/nft/nfttest"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// removeAddr takes an address from the mode's device.
func removeAddr(t *testing.T, a netip.Addr) {
	t.Helper()
	link, err := netlink.LinkByName(kernel.DeviceName)
	if err != nil {
		t.Fatal(err)
	}
	addr, err := netlink.ParseAddr(netip.PrefixFrom(a, a.BitLen()).String())
	if err == nil {
		err = netlink.AddrDel(link, addr)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestDrift: what another program changes is found and named, and a full write repairs it.
func TestDrift(t *testing.T) {
	w := world{plan.IPv4}
	web, pod := kernel.ServerKey{Addr: w.vip(1), Port: 80, Protocol: plan.TCP}, w.pods(1).Endpoints[0].AddrPort
	foreign := kernel.ServerKey{Addr: w.vip(1), Port: 81, Protocol: plan.TCP}
	for _, test := range []struct {
		name    string
		damage  func(t *testing.T, k *fakeIPVS)
		found   string
		noticed bool   // addrsDiffer or serversDiffer notices it
		line    string // of Compare about the Service; "" for none
	}{
		{"server removed", func(_ *testing.T, k *fakeIPVS) { k.do(kernel.Op{Verb: kernel.RemoveServer, Key: web}) }, "1 virtual servers are missing", true, "-ipvsadm -A -t " + w.vip(1).String() + ":80 -s rr"},
		{"destination removed", func(_ *testing.T, k *fakeIPVS) {
			k.do(kernel.Op{Verb: kernel.RemoveDestination, Key: web, Destination: pod})
		}, "1 virtual servers have other options or other destinations", true, "-ipvsadm -a -t " + w.vip(1).String() + ":80 -r " + pod.String() + " -m -w 1"},
		{"weight changed", func(_ *testing.T, k *fakeIPVS) {
			k.do(kernel.Op{Verb: kernel.SetDestination, Key: web, Destination: pod, Weight: 7})
		}, "1 virtual servers have other options or other destinations", true, "+ipvsadm -a -t " + w.vip(1).String() + ":80 -r " + pod.String() + " -m -w 7"},
		{"scheduler changed", func(_ *testing.T, k *fakeIPVS) {
			k.do(kernel.Op{Verb: kernel.SetServer, Key: web, Scheduler: "sh"})
		}, "1 virtual servers have other options or other destinations", true, "+ipvsadm -A -t " + w.vip(1).String() + ":80 -s sh"},
		{"forwarding method changed", func(_ *testing.T, k *fakeIPVS) {
			k.do(kernel.Op{Verb: kernel.SetDestination, Key: web, Destination: pod, Weight: 1, Method: kernel.DirectRoute})
		}, "1 virtual servers have other options or other destinations", true, "+ipvsadm -a -t " + w.vip(1).String() + ":80 -r " + pod.String() + " -g -w 1"},
		{"persistence added", func(_ *testing.T, k *fakeIPVS) {
			k.do(kernel.Op{Verb: kernel.SetServer, Key: web, Scheduler: "rr -p"})
		}, "1 virtual servers have other options or other destinations", true, "+ipvsadm -A -t " + w.vip(1).String() + ":80 -s rr -p"},
		{"server added", func(_ *testing.T, k *fakeIPVS) {
			k.do(kernel.Op{Verb: kernel.AddServer, Key: foreign, Scheduler: "rr"})
		}, "1 virtual servers are not signalbox's", false, ""}, // the fake has no list of all servers
		{"address removed", func(t *testing.T, _ *fakeIPVS) { removeAddr(t, w.vip(1)) }, "1 addresses of kube-ipvs0 are missing", true, "-ip addr add " + w.vip(1).String() + "/32 dev kube-ipvs0"},
		{"elements removed", func(t *testing.T, _ *fakeIPVS) { nstest.NFT(t, "", "flush", "map", "ip", tableName, "marks") }, "set marks lacks ", false, ""},
		{"chain emptied", func(t *testing.T, _ *fakeIPVS) { nstest.NFT(t, "", "flush", "chain", "ip", tableName, "services") }, "chain services has 0 rules", false, "chain services has 0 rules"},
		{"table removed", func(t *testing.T, _ *fakeIPVS) { nstest.NFT(t, "", "flush", "ruleset") }, "the table is missing", false, "the table is missing"},
	} {
		t.Run(test.name, func(t *testing.T) {
			k := newFakeIPVS(t)
			p, desired := k.proxier(t, time.Now), w.example()
			text := func() string {
				listing, err := nfttest.Listing()
				if err != nil {
					t.Fatal(err)
				}
				held := heldAddrs(t, w.family)
				slices.SortFunc(held, netip.Addr.Compare)
				return fmt.Sprint(listing, *k.model.servers[web], held)
			}
			wantChanged := func(when string, want bool) {
				t.Helper()
				servers, err := p.serversDiffer()
				addrs, addrsErr := p.addrsDiffer()
				if err := errors.Join(err, addrsErr); (servers || addrs) != want || err != nil {
					t.Errorf("%s: differ: servers %v, addresses %v, %v", when, servers, addrs, err)
				}
			}
			if _, err := p.Compare(t.Context()); !errors.Is(err, proxier.ErrNothingWritten) {
				t.Errorf("before the first write, Compare says %v", err)
			}
			syncAll(t, p, desired)
			intact := text()
			wantChanged("after a sync", false)
			if found, err := p.Repair(t.Context()); err != nil || len(found.Objects) > 0 {
				t.Errorf("before the damage: found %+v, %v", found, err)
			}
			about := serviceAt(t, desired, web)
			compare := func(about ...plan.ServicePortName) proxier.Comparison {
				t.Helper()
				c, err := p.Compare(t.Context(), about...)
				if err != nil {
					t.Fatal(err)
				}
				return c
			}
			server := "ipvsadm -A -t " + w.vip(1).String() + ":80 -s rr"
			if all, one := compare(), compare(about); len(all.Differences)+len(one.Differences) > 0 || !slices.Contains(one.Holds, server) {
				t.Errorf("before the damage: compared %q, about %s %+v", all.Differences, about, one)
			}
			test.damage(t, k)
			all, one := compare(), compare(about)
			begins := func(line string) bool { return test.line != "" && strings.HasPrefix(line, test.line) }
			if len(all.Differences) == 0 || slices.ContainsFunc(one.Differences, begins) != (test.line != "") || test.line == "" && len(one.Differences) > 0 {
				t.Errorf("compared %q, and about %s %q, want %q", all.Differences, about, one.Differences, test.line)
			}
			wantChanged("after the damage", test.noticed)
			found, err := p.Repair(t.Context())
			if err != nil || len(found.Objects) == 0 || !strings.HasPrefix(found.Objects[0], test.found) || !found.NeedsFullWrite {
				t.Errorf("found %+v, %v, want %q", found, err, test.found)
			}
			syncAll(t, p, desired)
			wantChanged("after the repair", false)
			if found, err := p.Repair(t.Context()); err != nil || len(found.Objects) > 0 {
				t.Errorf("after the repair: found %+v, %v", found, err)
			}
			if diff := cmp.Diff(intact, text()); diff != "" {
				t.Errorf("the repair makes something else (-before +after)\n%s", diff)
			}
		})
	}
}

// TestFailedRemoval: if the table refuses to lose an address that no longer drains, that is
// reported until Repair has compared everything.
func TestFailedRemoval(t *testing.T) {
	w := world{plan.IPv4}
	for _, test := range []struct {
		name, damage string
		found        []string
	}{
		{"table removed", "flush ruleset", []string{"the table is missing"}},
		{"element removed", "delete element ip " + tableName + " vips { " + w.vip(1).String() + " }", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			k := newFakeIPVS(t)
			p, empty := k.proxier(t, time.Now), w.plan()
			waits := func(want bool) {
				t.Helper()
				if waits, err := p.serversDiffer(); waits != want || err != nil {
					t.Errorf("a difference is reported: %v, %v", waits, err)
				}
			}
			syncAll(t, p, w.plan(w.service("web", plan.TCP, w.pods(1), clusterIP(w.vip(1), 80, w.pods(1)))))
			syncAll(t, p, empty)
			waits(false)
			nstest.NFT(t, "", test.damage)
			p.drainOnce(time.Now())
			waits(true)
			waits(true)
			if c, err := p.Compare(t.Context()); err != nil || (len(c.Differences) > 0) != (test.found != nil) {
				t.Errorf("Compare finds %+v, %v", c, err)
			}
			found, err := p.Repair(t.Context())
			if err != nil || !slices.Equal(found.Objects, test.found) || found.NeedsFullWrite != (test.found != nil) {
				t.Errorf("found %+v, %v", found, err)
			}
			if found.NeedsFullWrite {
				syncAll(t, p, empty)
			}
			waits(false)
			if found, err := p.Repair(t.Context()); err != nil || len(found.Objects) > 0 {
				t.Errorf("after the repair: found %+v, %v", found, err)
			}
			if p.current() == nil {
				t.Error("the next change writes everything again")
			}
		})
	}
}

// TestRepairAfterKubeProxy: while kube-proxy has its ipsets, nothing is repaired. What it has
// removed is repaired when they are gone, although nothing else changes then.
func TestRepairAfterKubeProxy(t *testing.T) {
	k, w := newFakeIPVS(t), world{plan.IPv4}
	hasIPSet(t)
	p, desired := k.proxier(t, time.Now), w.example()
	syncAll(t, p, desired)
	set := kernel.KubeProxySetName("KUBE-CLUSTER-IP", w.family)
	makeSet(t, set, "hash:ip,port", w.family)
	k.do(kernel.Op{Verb: kernel.RemoveServer, Key: kernel.ServerKey{Addr: w.vip(1), Port: 80, Protocol: plan.TCP}})
	removeAddr(t, w.vip(1))
	for range 3 {
		if differ, err := p.serversDiffer(); !differ || err != nil {
			t.Errorf("with kube-proxy's ipsets: differ %v, %v", differ, err)
		}
		if found, err := p.Repair(t.Context()); err != nil || len(found.Objects) > 0 {
			t.Errorf("with kube-proxy's ipsets: found %+v, %v", found, err)
		}
	}
	if err := netlink.IpsetDestroy(set); err != nil {
		t.Fatal(err)
	}
	if differ, err := p.serversDiffer(); !differ || err != nil {
		t.Errorf("without kube-proxy's ipsets: differ %v, %v", differ, err)
	}
	if found, err := p.Repair(t.Context()); err != nil || len(found.Objects) != 2 || !found.NeedsFullWrite {
		t.Errorf("without kube-proxy's ipsets: found %+v, %v", found, err)
	}
	syncAll(t, p, desired)
	if differ, err := p.serversDiffer(); differ || err != nil {
		t.Errorf("after the repair: differ %v, %v", differ, err)
	}
}

// serviceAt is the Service port of a virtual server.
func serviceAt(t *testing.T, p *plan.Plan, key kernel.ServerKey) plan.ServicePortName {
	t.Helper()
	for name, sp := range p.Services {
		for i := range sp.Frontends {
			if f := &sp.Frontends[i]; f.Addr == key.Addr && f.Port == key.Port && name.Protocol == key.Protocol {
				return name
			}
		}
	}
	t.Fatalf("nobody has %s", key)
	return plan.ServicePortName{}
}

// watched runs Watch until the test ends.
func watched(t *testing.T, p *Proxier) <-chan proxier.Writer {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	drifted, done := make(chan proxier.Writer), make(chan struct{})
	go func() {
		defer close(done)
		p.Watch(ctx, func(w proxier.Writer) {
			select {
			case drifted <- w:
			case <-ctx.Done():
			}
		})
	}()
	t.Cleanup(func() { cancel(); <-done })
	return drifted
}

func removeDevice(t *testing.T) {
	t.Helper()
	link, err := netlink.LinkByName(kernel.DeviceName)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestAddressWatch: the kernel notifies of addresses. Own changes are expected, and
// changes by other programs are reported. The fake IPVS is never polled.
func TestAddressWatch(t *testing.T) {
	k, w := newFakeIPVS(t), world{plan.IPv4}
	p := k.proxier(t, time.Now)
	updates, done := make(chan netlink.AddrUpdate, 1000), make(chan struct{})
	if err := netlink.AddrSubscribe(updates, done); err != nil {
		t.Fatal(err)
	}
	defer close(done)
	next := func(a netip.Addr, added, unexpected bool) {
		t.Helper()
		u := <-updates
		if got, _ := netip.AddrFromSlice(u.LinkAddress.IP); got.Unmap() != a || u.NewAddr != added {
			t.Fatalf("notified of %s, added %v; not of %s, %v", got, u.NewAddr, a, added)
		}
		if got := p.unexpected(u); got != unexpected {
			t.Errorf("%s, added %v: unexpected %v", a, added, got)
		}
	}
	one := func(n int) *plan.Plan {
		return w.plan(w.service("web", plan.TCP, w.pods(1), clusterIP(w.vip(n), 80, w.pods(1))))
	}
	syncAll(t, p, one(1))
	next(w.vip(1), true, false)
	syncAll(t, p, one(2)) // the first address drains
	next(w.vip(2), true, false)
	p.drainOnce(time.Now())
	next(w.vip(1), false, false)
	removeAddr(t, w.vip(2))
	next(w.vip(2), false, true)
	syncAll(t, p, one(2))
	next(w.vip(2), true, false)

	drifted := watched(t, p)
	removeAddr(t, w.vip(2))
	<-drifted
	next(w.vip(2), false, true)
	syncAll(t, p, one(2))
	next(w.vip(2), true, false)
	removeDevice(t)
	<-drifted
	if differ, err := p.addrsDiffer(); !differ || err != nil {
		t.Errorf("without the device, addresses differ: %v, %v", differ, err)
	}
}

// makePersistent changes a virtual server as "ipvsadm -E ... -p 300" does.
func makePersistent(t *testing.T, key kernel.ServerKey) {
	t.Helper()
	h, err := lvs.New("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	s := &lvs.Service{
		Address: key.Addr.AsSlice(), Port: key.Port, Protocol: uint16(key.Protocol), AddressFamily: unix.AF_INET, Netmask: 0xffffffff,
		SchedName: "rr", Flags: 1, Timeout: 300,
	}
	if key.Addr.Is6() {
		s.AddressFamily, s.Netmask = unix.AF_INET6, 128
	}
	if err := h.UpdateService(s); err != nil {
		t.Fatal(err)
	}
}

// TestWatch: what another program removes or changes is reported, and repaired.
func TestWatch(t *testing.T) {
	eachFamily(t, func(t *testing.T, w world) {
		desired := w.example()
		p, _ := start(t, w.family, nil)
		syncAll(t, p, desired)
		drifted := watched(t, p)
		other, err := kernel.OpenIPVS(w.family)
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		key := kernel.ServerKey{Addr: w.vip(1), Port: 80, Protocol: plan.TCP}
		held := heldAddrs(t, w.family)
		slices.SortFunc(held, netip.Addr.Compare)
		for _, test := range []struct {
			name   string
			damage func()
		}{
			{"server", func() {
				if err := other.Send([]kernel.Op{{Verb: kernel.RemoveServer, Key: key}}, func(kernel.Op) {}); err != nil {
					t.Fatal(err)
				}
			}},
			{"scheduler", func() {
				if err := other.Send([]kernel.Op{{Verb: kernel.SetServer, Key: key, Scheduler: "sh"}}, func(kernel.Op) {}); err != nil {
					t.Fatal(err)
				}
			}},
			{"forwarding method", func() {
				pod := w.pods(1).Endpoints[0].AddrPort
				tunnel := kernel.Op{Verb: kernel.SetDestination, Key: key, Destination: pod, Weight: 1, Method: kernel.Tunnel}
				if err := other.Send([]kernel.Op{tunnel}, func(kernel.Op) {}); err != nil {
					t.Fatal(err)
				}
			}},
			{"persistence", func() { makePersistent(t, key) }},
			{"address", func() { removeAddr(t, w.vip(1)) }},
			{"device", func() { removeDevice(t) }},
		} {
			test.damage()
			began := time.Now()
			if by := <-drifted; by != (proxier.Writer{}) {
				t.Errorf("%s: reported by %s", test.name, by)
			}
			t.Logf("%s: reported after %v", test.name, time.Since(began))
			if found, err := p.Repair(t.Context()); err != nil || len(found.Objects) != 1 {
				t.Errorf("%s: found %+v, %v", test.name, found, err)
			}
			syncAll(t, p, desired)
			if dests, err := other.Destinations(key); err != nil || len(dests) != 3 {
				t.Errorf("%s: the server has the destinations %v, %v", test.name, dests, err)
			}
			now := heldAddrs(t, w.family)
			slices.SortFunc(now, netip.Addr.Compare)
			if diff := cmp.Diff(held, now, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("%s: addresses after the repair (-before +after)\n%s", test.name, diff)
			}
		}
	})
}
