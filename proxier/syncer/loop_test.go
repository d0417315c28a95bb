// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"signalbox/internal/budget"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// rig is a Loop with one family, and what it does its work on.
type rig struct {
	*Loop
	t        *testing.T
	mode     *fakeProxier
	flows    *recorder
	problems []plan.Problem
	reports  []SyncReport
}

func newRig(t *testing.T, change ...func(*LoopOptions)) *rig {
	b := &rig{t: t, mode: &fakeProxier{}, flows: &recorder{}}
	opts := LoopOptions{
		NodeName: "node1", Proxiers: map[plan.Family]proxier.Proxier{plan.IPv4: b.mode}, Flows: b.flows, Logger: slog.New(slog.DiscardHandler),
		Report: func(p plan.Problem) { b.problems = append(b.problems, p) },
		Synced: func(r SyncReport) { b.reports = append(b.reports, r) },
	}
	for _, c := range change {
		c(&opts)
	}
	b.Loop = NewLoop(opts)
	return b
}

// run starts Run and ends it with the test, which must be in a synctest
// bubble.
func (b *rig) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- b.Run(ctx) }()
	b.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("Run: %v", err)
		}
		b.check()
	})
}

// check fails the test where the Loop broke the contract of Proxier.
func (b *rig) check() {
	b.t.Helper()
	for _, broken := range b.mode.broken {
		b.t.Errorf("contract of Proxier: %s", broken)
	}
}

func (b *rig) syncNow() error {
	b.t.Helper()
	err := b.SyncNow(context.Background())
	b.check()
	return err
}

func (b *rig) mustSync() {
	b.t.Helper()
	if err := b.syncNow(); err != nil {
		b.t.Fatal(err)
	}
	b.wantInKernel()
}

// wantInKernel checks that the kernel holds the plan but for the Services
// named.
func (b *rig) wantInKernel(but ...string) {
	b.t.Helper()
	for name, sp := range b.Plan(plan.IPv4).Services {
		if slices.Contains(but, name.Name) {
			continue
		}
		if b.mode.kernel[name] != sp {
			b.t.Errorf("the kernel has %v of %s", b.mode.kernel[name], name)
		}
	}
	for name := range b.mode.kernel {
		if b.Plan(plan.IPv4).Services[name] == nil && !slices.Contains(but, name.Name) {
			b.t.Errorf("the kernel still has %s", name)
		}
	}
}

// last describes the last call of Sync.
func (b *rig) last() call {
	b.t.Helper()
	if len(b.mode.calls) == 0 {
		b.t.Fatal("no Sync was called")
	}
	return b.mode.calls[len(b.mode.calls)-1]
}

func names(change plan.Change) string {
	var out []string
	for _, n := range change.Services {
		out = append(out, n.Name)
	}
	return strings.Join(out, " ")
}

// refusing makes a mode refuse changes that write one of the Services.
func refusing(services ...string) func(*plan.Plan, plan.Change) error {
	return func(plan *plan.Plan, change plan.Change) error {
		for name := range plan.Services {
			if slices.Contains(services, name.Name) && (change.All || slices.Contains(change.Services, name)) {
				return errors.New("refused " + name.Name)
			}
		}
		return nil
	}
}

func TestNothingIsWrittenBeforeTheSourceHasSynced(t *testing.T) {
	b := newRig(t)
	b.Apply(newService("web", "10.96.0.1"))
	b.mustSyncNothing()
	b.Synced()
	b.mustSync()
	if c := b.last(); !c.change.All || len(b.mode.calls) != 1 {
		t.Errorf("the first sync is %+v", c.change)
	}
}

func (b *rig) mustSyncNothing() {
	b.t.Helper()
	before := len(b.mode.calls)
	if err := b.syncNow(); err != nil {
		b.t.Fatal(err)
	}
	if n := len(b.mode.calls) - before; n != 0 {
		b.t.Errorf("%d syncs: %+v", n, b.last().change)
	}
}

// filled is a rig with Services a to the given letter written.
func filled(t *testing.T, to byte, change ...func(*LoopOptions)) *rig {
	b := newRig(t, change...)
	for c := byte('a'); c <= to; c++ {
		b.Apply(newService(string(c), clusterIP(int(c-'a'))))
		b.Apply(newSlice(string(c), "10.244.2.1"))
	}
	b.Synced()
	b.mustSync()
	return b
}

func TestOnlyWhatChangedIsWritten(t *testing.T) {
	service := newService("b", clusterIP(1))
	for _, test := range []struct {
		what string
		do   func(b *rig)
		want string // names of Services; "node" for the Node
	}{
		{"a new endpoint", func(b *rig) { b.Apply(newSlice("b", "10.244.2.1", "10.244.2.2")) }, "b"},
		{"the same again", func(b *rig) { b.Apply(newSlice("b", "10.244.2.1")); b.Apply(service) }, ""},
		{"the same in another slice", func(b *rig) {
			s := newSlice("b", "10.244.2.1")
			s.Name = "b-2"
			b.Apply(s)
		}, ""},
		{"there and back", func(b *rig) { b.Apply(newSlice("b")); b.Apply(newSlice("b", "10.244.2.1")) }, ""},
		{"gone and here again", func(b *rig) { b.Delete(service); b.Apply(service) }, ""},
		{"gone", func(b *rig) { b.Delete(service) }, "b"},
		{"two", func(b *rig) { b.Delete(service); b.Apply(newService("z", "10.96.9.9")) }, "b z"},
		{"a slice of nobody", func(b *rig) { b.Apply(newSlice("x", "10.244.2.1")) }, ""},
		{"another node", func(b *rig) {
			n := &corev1.Node{}
			n.Name = "node2"
			n.Spec.PodCIDR = "10.244.2.0/24"
			b.Apply(n)
		}, ""},
		{"a zone that nobody hints at", func(b *rig) {
			n := &corev1.Node{}
			n.Name = "node1"
			n.Labels = map[string]string{corev1.LabelTopologyZone: "east"}
			b.Apply(n)
		}, ""},
		{"a kind of object that says nothing", func(b *rig) { b.Apply(&corev1.Pod{}); b.Delete(&corev1.Pod{}) }, ""},
		{"local addresses where all serve node ports", func(b *rig) { b.SetLocalAddrs([]netip.Addr{netip.MustParseAddr("192.168.0.1")}) }, ""},
	} {
		t.Run(test.what, func(t *testing.T) {
			b := filled(t, 'c')
			test.do(b)
			if test.want == "" {
				b.mustSyncNothing()
				return
			}
			b.mustSync()
			if c := b.last().change; names(c) != test.want || c.All || c.Node || len(b.mode.calls) != 2 {
				t.Errorf("%d syncs, the last %+v; want one of %q", len(b.mode.calls), c, test.want)
			}
		})
	}
}

func TestNodeChangeIsWrittenAlone(t *testing.T) {
	b := filled(t, 'c', func(o *LoopOptions) {
		o.Settings.NodePortAddresses.CIDRs = []netip.Prefix{netip.MustParsePrefix("192.168.0.0/16")}
	})
	b.SetLocalAddrs([]netip.Addr{netip.MustParseAddr("192.168.0.1")})
	b.mustSync()
	if c := b.last().change; !c.Node || c.All || len(c.Services) != 0 {
		t.Errorf("wrote %+v", c)
	}
	b.SetLocalAddrs([]netip.Addr{netip.MustParseAddr("192.168.0.1"), netip.MustParseAddr("10.0.0.1")})
	b.mustSyncNothing()
}

func TestRouteSourcesAreWrittenAlone(t *testing.T) {
	b := filled(t, 'c')
	sources := []plan.RouteSource{
		{Link: "eth0", Destination: netip.MustParsePrefix("10.1.0.0/16"), Source: netip.Addr{}},
		{Link: "eth0", Destination: netip.MustParsePrefix("fd00:1::/64"), Source: netip.MustParseAddr("fd00::7")},
		{Link: "eth0", Destination: netip.MustParsePrefix("10.0.0.0/8"), Source: netip.MustParseAddr("192.0.2.7")},
	}
	b.SetRouteSources(sources)
	b.mustSync()
	if c := b.last().change; !c.Node || c.All || len(c.Services) != 0 {
		t.Errorf("wrote %+v", c)
	}
	const want = "\n  source by eth0 to 10.1.0.0/16: masquerade\n  source by eth0 to 10.0.0.0/8: 192.0.2.7\n"
	if text := b.Plan(plan.IPv4).String(); !strings.Contains(text, want) || strings.Contains(text, "fd00::7") {
		t.Errorf("the plan is\n%s\nwant in it%s", text, want)
	}
	b.SetRouteSources(slices.Clone(sources))
	b.mustSyncNothing()
	b.SetRouteSources(nil)
	b.mustSync()
	if text := b.Plan(plan.IPv4).String(); strings.Contains(text, "source by") {
		t.Errorf("the plan still has sources:\n%s", text)
	}
}

func TestSetsKeepTheirIdentity(t *testing.T) {
	b := filled(t, 'a')
	name := plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "default", Name: "a"}, Port: "http", Protocol: plan.TCP}
	before := b.Plan(plan.IPv4).Services[name]
	b.Apply(newService("a", clusterIP(0), nodePort(30001)))
	b.mustSync()
	after := b.Plan(plan.IPv4).Services[name]
	if len(after.Frontends) != 2 {
		t.Fatalf("no node port: %+v", after)
	}
	for _, f := range after.Frontends {
		if f.Internal != before.Usable || f.External != before.Usable {
			t.Errorf("the set of %s is another one, though its endpoints are the same", f.Key(plan.TCP))
		}
	}
	if before.Usable != after.Usable {
		t.Error("Serving is another one")
	}
}

func TestRunWritesASingleChangeAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newRig(t, func(o *LoopOptions) { o.MinSyncPeriod = time.Second })
		b.Synced()
		b.run()
		time.Sleep(time.Hour)
		start := time.Now()
		b.Apply(newService("web", "10.96.0.1"))
		synctest.Wait()
		if b.last().at != start || len(b.mode.calls) != 2 {
			t.Errorf("%d syncs, the last at %v, the change was at %v", len(b.mode.calls), b.last().at, start)
		}
	})
}

// A question is answered at once in a pause, and the pause stays as long.
func TestQuestionsInAPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newRig(t, func(o *LoopOptions) { o.MinSyncPeriod = time.Minute })
		b.Synced()
		b.run()
		synctest.Wait()
		start := time.Now()
		b.Apply(newService("web", "10.96.0.1")) // waits for the end of the pause
		for range 3 {
			time.Sleep(10 * time.Second)
			ctx, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
			if err := b.Ask(ctx, func() {}); err != nil {
				t.Errorf("a question in the pause: %v", err)
			}
			cancel()
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := b.last().at.Sub(start); got != time.Minute || len(b.mode.calls) != 2 {
			t.Errorf("%d syncs, the second after %v", len(b.mode.calls), got)
		}
	})
}

func TestMinSyncPeriodCountsFromTheEndOfASync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newRig(t, func(o *LoopOptions) { o.MinSyncPeriod = time.Second })
		b.mode.takes = 300 * time.Millisecond
		b.Synced()
		b.run()
		start := time.Now()
		for i := range 50 { // one change each 100 ms
			b.Apply(newService("web", clusterIP(i)))
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		for i, c := range b.mode.calls {
			// A call notes its end.
			if want := start.Add(time.Duration(i)*1300*time.Millisecond + 300*time.Millisecond); c.at != want {
				t.Errorf("sync %d ended at %v, want %v", i, c.at.Sub(start), want.Sub(start))
			}
		}
		if n := len(b.mode.calls); n != 5 {
			t.Errorf("%d syncs, want 5", n)
		}
		b.wantInKernel()
	})
}

func TestPauseAfterASyncIsAsLongAsItTook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newRig(t)
		b.mode.takes = 40 * time.Millisecond
		b.Synced()
		b.run()
		start := time.Now()
		time.Sleep(50 * time.Millisecond) // within the pause
		b.Apply(newService("web", "10.96.0.1"))
		time.Sleep(time.Second)
		synctest.Wait()
		if got := b.last().at.Sub(start); got != 120*time.Millisecond {
			t.Errorf("the second sync ended after %v, want 120ms", got)
		}
	})
}

// TestStorm: in a storm there is one sync for each stormPause, and no change waits for
// longer. Before and after it, a change is written at once, and so is the next.
func TestStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newRig(t)
		b.Synced()
		b.run()
		n := 0
		change := func() { b.Apply(newService("web", clusterIP(n))); n++ }
		atOnce := func(when string) {
			t.Helper()
			start := time.Now()
			if change(); b.wait().at != start {
				t.Errorf("%s: a change waits", when)
			}
		}
		pair := func(when string) {
			t.Helper()
			time.Sleep(time.Minute)
			atOnce(when)
			time.Sleep(10 * time.Millisecond)
			atOnce(when + ", the second")
			time.Sleep(time.Second)
		}
		pair("before")
		before := len(b.mode.syncs())
		for range 200 { // two seconds
			change()
			time.Sleep(10 * time.Millisecond)
		}
		synctest.Wait()
		syncs := b.mode.syncs()[before:]
		if len(syncs) < 35 || len(syncs) > 42 {
			t.Errorf("%d syncs in two seconds", len(syncs))
		}
		for i := range len(syncs) - 1 {
			if d := syncs[i+1].at.Sub(syncs[i].at); d > stormPause+10*time.Millisecond {
				t.Errorf("%v between two syncs", d)
			}
		}
		pair("after")
		b.wantInKernel()
	})
}

// wait waits until the Loop sleeps, and returns the last call of Sync.
func (b *rig) wait() call {
	b.t.Helper()
	synctest.Wait()
	return b.last()
}

// TestMaxProcessor: a storm takes no more processor time than the limit allows. A lone
// change before and after it is written at once.
func TestMaxProcessor(t *testing.T) {
	const share, each = 0.02, 30 * time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		b := newRig(t)
		var syncs atomic.Int64
		b.processor = budget.Of(share, func() time.Duration { return each * time.Duration(syncs.Load()) })
		b.mode.refuse = func(*plan.Plan, plan.Change) error { syncs.Add(1); return nil }
		b.Synced()
		b.run()
		n := 0
		lone := func(when string) {
			t.Helper()
			time.Sleep(time.Minute)
			start := time.Now()
			b.Apply(newService("web", clusterIP(n)))
			if n++; b.wait().at != start {
				t.Errorf("%s: a lone change waits", when)
			}
		}
		lone("before the storm")
		lone("before the storm, the second")
		before, minute := syncs.Load(), 60
		for range minute * 100 {
			b.Apply(newService("web", clusterIP(n)))
			n = (n + 1) % 200
			time.Sleep(10 * time.Millisecond)
		}
		// What was saved in ten seconds may be spent.
		used, most := time.Duration(syncs.Load()-before)*each, time.Duration(share*float64(70*time.Second))+each
		if used > most || used < most/2 {
			t.Errorf("the storm takes %v, want at most %v", used, most)
		}
		lone("after the storm")
		lone("after the storm, the second")
		b.wantInKernel()
	})
}

func TestEventsThatChangeNothingCauseNoPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newRig(t, func(o *LoopOptions) { o.MinSyncPeriod = time.Minute })
		b.Synced()
		b.run()
		time.Sleep(time.Hour)
		b.Apply(&corev1.Node{})
		synctest.Wait()
		start := time.Now()
		b.Apply(newService("web", "10.96.0.1"))
		synctest.Wait()
		if b.last().at != start {
			t.Errorf("waited although nothing was written before")
		}
	})
}

func TestFullWritePeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newRig(t, func(o *LoopOptions) { o.FullWritePeriod = time.Hour })
		b.Apply(newService("web", "10.96.0.1"))
		b.Synced()
		b.run()
		time.Sleep(150 * time.Minute)
		synctest.Wait()
		if n := len(b.mode.calls); n != 3 || !b.last().change.All {
			t.Errorf("%d syncs in 150 minutes, the last %+v", n, b.last().change)
		}
		b.RequestFullWrite()
		synctest.Wait()
		if n := len(b.mode.calls); n != 4 || !b.last().change.All {
			t.Errorf("RequestFullWrite: %d syncs, the last %+v", n, b.last().change)
		}
	})
}

func TestFamiliesFailAlone(t *testing.T) {
	six := &fakeProxier{refuse: func(*plan.Plan, plan.Change) error { return errors.New("no IPv6 today") }}
	b := newRig(t, func(o *LoopOptions) { o.Proxiers[plan.IPv6] = six })
	b.Apply(newService("web", "10.96.0.1"))
	b.Synced()
	err := b.syncNow()
	if err == nil || !strings.Contains(err.Error(), "sync of IPv6: no IPv6 today") {
		t.Errorf("SyncNow: %v", err)
	}
	b.wantInKernel()
}

func TestLocalAddrsAreTheCallers(t *testing.T) {
	b := newRig(t)
	addrs := []netip.Addr{netip.MustParseAddr("192.168.0.1")}
	b.SetLocalAddrs(addrs)
	addrs[0] = netip.MustParseAddr("192.168.0.2")
	if got := b.LocalAddrs(); got[0].String() != "192.168.0.1" {
		t.Errorf("LocalAddrs is %v", got)
	}
}

func TestNonUTF8NamesAreRefused(t *testing.T) {
	b := newRig(t)
	b.Apply(newService("web\xff", "10.96.0.1"))
	b.Apply(newService("web", "10.96.0.2", func(s *corev1.Service) { s.Spec.Ports[0].Name = "\xff" }))
	b.Synced()
	b.mustSync()
	if len(b.Plan(plan.IPv4).Services) != 0 || len(b.problems) != 2 {
		t.Errorf("%v\n%s", b.problems, b.Plan(plan.IPv4))
	}
	for _, p := range b.problems {
		if strings.Contains(p.String(), "\xff") {
			t.Errorf("%q is not fit to print", p.String())
		}
	}
}

func TestTenThousandEndpointsOfOneService(t *testing.T) {
	b := newRig(t)
	s := newSlice("web")
	for i := range 10_000 {
		pod := netip.AddrFrom4([4]byte{10, 128, byte(i * 7 >> 8), byte(i * 7)}).String() // repeats
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{pod}})
	}
	b.Apply(newService("web", "10.96.0.1"))
	b.Apply(s)
	b.Synced()
	b.mustSync()
	checkPlan(t, b.Plan(plan.IPv4))
	for _, sp := range b.Plan(plan.IPv4).Services {
		if n := sp.Usable.Len(); n != 10_000 {
			t.Errorf("%d endpoints", n)
		}
	}
}
