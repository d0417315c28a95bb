// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"net/netip"
	"testing"
	"time"

	"signalbox/internal/nstest"
	"signalbox/ipvs/internal/kernel"

	"github.com/vishvananda/netlink"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// fakeIPVS is an IPVS in memory. With it, Proxiers run on a kernel without IPVS.
type fakeIPVS struct {
	*model
	connections map[netip.AddrPort]int // of a destination, in each server
	refuse      error                  // what the next message is answered with
	noListing   error                  // why the destinations cannot be listed at once
	ops         []kernel.Op
	reads       int
}

func (k *fakeIPVS) Servers() (map[kernel.ServerKey]string, error) {
	k.reads++
	list := make(map[kernel.ServerKey]string)
	for key, s := range k.model.servers {
		list[key] = s.scheduler
	}
	return list, nil
}

func (k *fakeIPVS) Destinations(key kernel.ServerKey) (list []kernel.Destination, _ error) {
	k.reads++
	if s := k.model.servers[key]; s != nil {
		for addr, f := range s.dests {
			list = append(list, kernel.Destination{Addr: addr, Weight: int(f.weight), Method: f.method, Connections: k.connections[addr]})
		}
	}
	return list, nil
}

// Listing returns a wrong listing together with its error.
func (k *fakeIPVS) Listing() (map[kernel.ServerKey]kernel.Server, error) {
	k.reads++
	if k.noListing == nil {
		return nil, nil
	}
	wrong := kernel.ServerKey{Addr: netip.MustParseAddr("10.96.0.1"), Port: 80, Protocol: plan.TCP}
	return map[kernel.ServerKey]kernel.Server{wrong: {Destinations: make([]kernel.Destination, 1)}}, k.noListing
}

func (k *fakeIPVS) Send(ops []kernel.Op, done func(kernel.Op)) error {
	for _, o := range ops {
		if err := k.refuse; err != nil {
			k.refuse = nil
			return err
		}
		k.do(o)
		k.ops = append(k.ops, o)
		done(o)
	}
	return nil
}

func (k *fakeIPVS) Digest() (digest uint64, _ error) {
	for key, s := range k.model.servers {
		digest += maphash.String(seed, fmt.Sprint(key, s.scheduler, s.dests))
	}
	return digest, nil
}

var seed = maphash.MakeSeed()

func (k *fakeIPVS) HasScheduler(string) (bool, error)       { return true, nil }
func (k *fakeIPVS) SetTimeouts(_, _, _ time.Duration) error { return nil }
func (k *fakeIPVS) Close()                                  {}

func (k *fakeIPVS) has(key kernel.ServerKey, d netip.AddrPort) bool {
	s := k.model.servers[key]
	if s == nil {
		return false
	}
	_, exists := s.dests[d]
	return exists
}

// newFakeIPVS makes a network namespace with a fake IPVS. A bridge replaces the dummy device,
// which not every kernel has.
func newFakeIPVS(t *testing.T) *fakeIPVS {
	t.Helper()
	nstest.Enter(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = kernel.DeviceName
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		t.Fatal(err)
	}
	return &fakeIPVS{
		model:       &model{t, map[kernel.ServerKey]*server{}, map[nft.ElementID]nft.Element{}},
		connections: map[netip.AddrPort]int{},
	}
}

// proxier makes a Proxier of IPv4. The test calls its drainOnce.
func (k *fakeIPVS) proxier(t *testing.T, now func() time.Time) *Proxier {
	t.Helper()
	f := nft.FamilyOf(plan.IPv4)
	table, err := nft.Open(f, tableName, newSets())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { table.Close() })
	dev, err := kernel.OpenDevice(plan.IPv4)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(dev.Close)
	return &Proxier{
		IPFamily: f, mark: proxier.DefaultMasqueradeMark, watch: access.NewWatch(table), table: table, ipvs: k, device: dev,
		schedulers: newSchedulerChoice("", anyScheduler), now: now, wake: make(chan struct{}, 1),
	}
}

// TestDrainingEndsDespiteFullWrites checks that a full write does not prolong the time of a
// draining connection, neither hourly nor after a failure. An endpoint that was in use
// meanwhile gets its whole time.
func TestDrainingEndsDespiteFullWrites(t *testing.T) {
	k, w := newFakeIPVS(t), world{plan.IPv4}
	now := time.Now()
	p := k.proxier(t, func() time.Time { return now })
	key := kernel.ServerKey{Addr: w.vip(1), Port: 80, Protocol: plan.TCP}
	one, two := w.pods(1).Endpoints[0].AddrPort, w.pods(2).Endpoints[0].AddrPort
	k.connections[one], k.connections[two] = 1, 1
	web := func(pods ...int) *plan.Plan {
		set := w.pods(pods...)
		return w.plan(w.service("web", plan.TCP, set, clusterIP(w.vip(1), 80, set)))
	}
	syncAll(t, p, web(1, 2))
	last := web(3)
	syncAll(t, p, last)
	for hour := 1; hour <= 25; hour++ {
		now = now.Add(time.Hour)
		switch hour {
		case 5:
			k.refuse = errors.New("refused")
			back := web(2, 3)
			err := p.Sync(context.Background(), back, plan.Change{Services: keysOf(back)})
			if !errors.Is(err, proxier.ErrUnknownState) {
				t.Fatalf("what IPVS refuses: %v", err)
			}
		case 10:
			syncAll(t, p, web(2, 3))
		}
		syncAll(t, p, last)
		p.drainOnce(now)
		if has := k.has(key, one); has != (hour < 24) {
			t.Errorf("hour %d: the endpoint with an open connection is there: %v", hour, has)
		}
		if !k.has(key, two) {
			t.Fatalf("hour %d: the endpoint that was in use at hour 10 is gone", hour)
		}
	}
	now = now.Add(9 * time.Hour) // 34 hours
	syncAll(t, p, last)
	if p.drainOnce(now); k.has(key, two) {
		t.Error("the endpoint that was in use at hour 10 is there at hour 34")
	}
}

// TestAddressIsGivenUpDespiteFullWrites checks that a full write does not prolong the time of a
// draining address.
func TestAddressIsGivenUpDespiteFullWrites(t *testing.T) {
	k, w := newFakeIPVS(t), world{plan.IPv4}
	now := time.Now()
	p := k.proxier(t, func() time.Time { return now })
	set := w.pods(1, 2)
	desired := func(externals ...int) *plan.Plan {
		sp := w.service("web", plan.TCP, set, clusterIP(w.vip(1), 80, set))
		for _, n := range externals {
			sp.Frontends = append(sp.Frontends, local(plan.LoadBalancerIP, w.external(n), 80, set, set))
		}
		sp.AffinityTimeout = time.Hour
		return w.plan(sp)
	}
	syncAll(t, p, desired(1, 2))
	change := desired(1)
	if err := p.Sync(context.Background(), change, plan.Change{Services: keysOf(change)}); err != nil {
		t.Fatal(err)
	}
	for minute := 5; minute <= 20; minute += 5 {
		now = now.Add(5 * time.Minute)
		syncAll(t, p, change)
		p.drainOnce(now)
		held, _, err := p.device.Addresses()
		if err != nil {
			t.Fatal(err)
		}
		if held[w.external(2)] != (minute < 15) {
			t.Errorf("minute %d: the address without a Service is held: %v", minute, held[w.external(2)])
		}
	}
}

func keysOf(plan *plan.Plan) (names []plan.ServicePortName) {
	for name := range plan.Services {
		names = append(names, name)
	}
	return names
}

// TestReadsWithoutListing checks that a second process writes nothing if it cannot list all
// destinations at once.
func TestReadsWithoutListing(t *testing.T) {
	k, w := newFakeIPVS(t), world{plan.IPv4}
	plan := w.example()
	syncAll(t, k.proxier(t, time.Now), plan)
	sent := len(k.ops)
	k.noListing = errors.New("line 4 is no destination")
	syncAll(t, k.proxier(t, time.Now), plan)
	if sent == 0 || len(k.ops) != sent {
		t.Errorf("after %d messages the second process sent %v", sent, k.ops[sent:])
	}
}

// TestFlowsOfAReplacedServerGoOn takes over kube-proxy's virtual server by address, for a
// Service with servers by mark. Open UDP flows keep their endpoint while it is usable.
func TestFlowsOfAReplacedServerGoOn(t *testing.T) {
	k, w := newFakeIPVS(t), world{plan.IPv4}
	p := k.proxier(t, time.Now)
	key := kernel.ServerKey{Addr: w.vip(1), Port: 53, Protocol: plan.UDP}
	one, two := w.pods(1).Endpoints[0].AddrPort, w.pods(2).Endpoints[0].AddrPort
	k.connections[one], k.connections[two] = 1, 1
	k.model.servers[key] = &server{scheduler: "rr", dests: map[netip.AddrPort]forwarding{one: {weight: 1}, two: {weight: 1}}}
	if err := p.device.Find(); err != nil {
		t.Fatal(err)
	}
	if err := p.device.Add([]netip.Addr{w.vip(1)}, func(netip.Addr) {}); err != nil {
		t.Fatal(err)
	}
	dns := func(pods ...int) *plan.ServicePort {
		set := w.pods(pods...)
		sp := w.service("dns", plan.UDP, set, clusterIP(w.vip(1), 53, set))
		sp.AffinityTimeout = time.Hour
		return sp
	}
	plan := w.plan(dns(1, 2))
	check := func(when string, wantOne, wantTwo bool) {
		t.Helper()
		p.drainOnce(time.Now())
		if k.has(key, one) != wantOne || k.has(key, two) != wantTwo {
			t.Errorf("%s: %+v", when, k.model.servers[key])
		}
	}
	syncAll(t, p, plan)
	check("after the takeover", true, true)
	if s := k.model.servers[key]; s.dests[one].weight != 0 || s.dests[two].weight != 0 {
		t.Errorf("new flows come to what was taken over: %+v", s)
	}
	syncAll(t, p, plan)
	check("after the hourly writing", true, true)
	syncOne(t, p, plan, dns(2))
	check("without the first endpoint", false, true)
	k.connections[two] = 0
	check("after the last flow", false, false)
	if k.model.servers[key] != nil {
		t.Error("the server outlives its flows")
	}
}

// TestCleanupRemovesProbe: a process that is killed while it looks for dummy devices leaves one.
func TestCleanupRemovesProbe(t *testing.T) {
	nstest.Enter(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "signalbox-probe"
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil { // not every kernel has dummies
		t.Fatal(err)
	}
	for _, found := range []bool{true, false} {
		if removed, _, err := (Dataplane{}).Cleanup(plan.IPv4, false); removed != found || err != nil {
			t.Errorf("removed %v, %v; want %v", removed, err, found)
		}
	}
	if _, err := netlink.LinkByName(attrs.Name); !errors.As(err, new(netlink.LinkNotFoundError)) {
		t.Errorf("the device is there after cleanup: %v", err)
	}
}
