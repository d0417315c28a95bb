// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

// checkTotals compares sums that follow the plan with those made at once.
func checkTotals(t *testing.T, p *planner) {
	t.Helper()
	fresh := newTotals()
	for _, sp := range p.plan.Services {
		fresh.replace(nil, sp)
	}
	if p.totals.Totals != fresh.Totals || !maps.Equal(p.totals.health, fresh.health) {
		t.Fatalf("%s: sums that followed the plan are %+v %v, those of the plan %+v %v",
			p.plan.Family, p.totals.Totals, p.totals.health, fresh.Totals, fresh.health)
	}
}

func (b *rig) pending() time.Time {
	b.t.Helper()
	pending, served := b.Progress().Pending[plan.IPv4]
	if !served {
		b.t.Fatal("IPv4 is not in Pending")
	}
	return pending
}

func TestUpdatesArePendingUntilTheKernelHasThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newRig(t)
		b.Apply(newService("web", clusterIP(0)))
		if since := b.pending(); !since.IsZero() {
			t.Errorf("before the source has synced, something waits since %v", since)
		}
		time.Sleep(time.Hour)
		synced := time.Now()
		b.Synced()
		time.Sleep(time.Second)
		if since := b.pending(); !since.Equal(synced) {
			t.Errorf("waits since %v, want since the source synced, at %v", since, synced)
		}
		b.mustSync()
		if since := b.pending(); !since.IsZero() {
			t.Errorf("after the sync something waits since %v", since)
		}

		b.mode.refuse = func(*plan.Plan, plan.Change) error { return errors.New("no") }
		changed := time.Now()
		b.Apply(newService("web", clusterIP(1)))
		for range 3 {
			time.Sleep(time.Second)
			b.Apply(newService("other", clusterIP(2)))
			_ = b.syncNow()
			if since := b.pending(); !since.Equal(changed) {
				t.Errorf("waits since %v, want since the first change, at %v", since, changed)
			}
		}
		b.mode.refuse = nil
		b.mustSync()
		if since := b.pending(); !since.IsZero() {
			t.Errorf("after all went in something waits since %v", since)
		}
		if r := b.reports[len(b.reports)-1]; !r.Current || !r.Queued.Equal(changed) {
			t.Errorf("the report is %+v, want one about the change at %v", r, changed)
		}
	})
}

func TestAQuarantinedServiceHoldsNothingUp(t *testing.T) {
	b := filled(t, 'c')
	b.mode.refuse = refusing("b")
	b.Apply(newService("b", clusterIP(10)))
	b.Apply(newService("c", clusterIP(11)))
	if err := b.syncNow(); err == nil {
		t.Fatal("the refusal was not told")
	}
	if since := b.pending(); !since.IsZero() {
		t.Errorf("something waits since %v", since)
	}
	if r := b.reports[len(b.reports)-1]; !r.Current || r.Quarantined != 1 {
		t.Errorf("the report is %+v", r)
	}
}

func TestWhatChangesNothingIsNotPending(t *testing.T) {
	b := filled(t, 'a')
	b.Apply(newService("a", clusterIP(0)))
	if b.pending().IsZero() {
		t.Error("what was not looked at does not wait")
	}
	b.mustSyncNothing()
	if since := b.pending(); !since.IsZero() {
		t.Errorf("something waits since %v", since)
	}
}

// A mode that hangs must not keep anybody from seeing that it does.
func TestProgressWhileASyncHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := filled(t, 'a')
		hang := make(chan struct{})
		b.mode.refuse = func(*plan.Plan, plan.Change) error { <-hang; return nil }
		b.run()
		changed := time.Now()
		b.Apply(newService("a", clusterIP(5)))
		synctest.Wait()
		time.Sleep(time.Minute)
		b.Apply(newSlice("a", "10.244.2.9"))
		if since := b.pending(); !since.Equal(changed) {
			t.Errorf("waits since %v, want since %v", since, changed)
		}
		// One of each was there before; the sync at work has taken the Service.
		want := EventCounts{Total: 2, Pending: 1}
		if p := b.Progress(); p.Services != want || p.EndpointSlices != want {
			t.Errorf("Services %+v, EndpointSlices %+v, want %+v", p.Services, p.EndpointSlices, want)
		}
		close(hang)
		time.Sleep(time.Minute)
		synctest.Wait()
		if p := b.Progress(); !p.Pending[plan.IPv4].IsZero() || p.Services.Pending != 0 || p.EndpointSlices.Pending != 0 {
			t.Errorf("at rest: %+v", p)
		}
	})
}

// While no sync reads the events, because the Loop is paused or its kernel hangs, the queue
// has the last form of each object. Afterwards that form is written.
func TestQueueHasTheLastForms(t *testing.T) {
	b := filled(t, 'c')
	const changes = 100_000
	most := 0
	for i := range changes {
		s := newSlice("a", netip.AddrFrom4([4]byte{10, 244, byte(i >> 8), byte(i)}).String())
		b.Apply(s)
		most = max(most, len(b.events))
	}
	if most > fewestDrops {
		t.Errorf("%d events were queued", most)
	}
	if got := b.Progress().EndpointSlices; got.Pending != changes {
		t.Errorf("the counts are %+v", got)
	}
	b.mustSync()
	last := netip.AddrFrom4([4]byte{10, 244, (changes - 1) >> 8 & 255, (changes - 1) & 255})
	for name, sp := range b.mode.kernel {
		if e := sp.Usable.Endpoints; name.Name == "a" && (len(e) != 1 || e[0].Addr() != last) {
			t.Errorf("the kernel has %v, want %v", e, last)
		}
	}
	// Many objects make a long queue. It grows no further while they change, and the next
	// one is short again.
	most = 0
	for i := range 20_000 {
		b.Apply(newService(fmt.Sprint("s", i%1000), netip.AddrFrom4([4]byte{10, 97, byte(i >> 8), byte(i)}).String()))
		most = max(most, len(b.events))
	}
	if most > 2000 {
		t.Errorf("%d events of 1000 objects were queued", most)
	}
	b.mustSync()
	for range 1000 {
		b.Apply(newSlice("a"))
	}
	if len(b.events) > fewestDrops {
		t.Errorf("%d events of one object are queued", len(b.events))
	}
}

// A Node that was changed and deleted, while no sync read the events, keeps the change. A
// Service that was deleted and made again exists.
func TestQueueOfDeletedObjects(t *testing.T) {
	b := newRig(t, func(o *LoopOptions) { o.Settings.DetectLocal = service.DetectLocalNodeCIDR })
	b.Synced()
	b.mustSync()
	node := &corev1.Node{}
	node.Name, node.Spec.PodCIDRs = "node1", []string{"10.244.7.0/24"}
	b.Apply(node)
	b.Delete(node)
	b.Apply(newService("a", clusterIP(0)))
	b.Delete(newService("a", clusterIP(0)))
	b.Delete(newService("b", clusterIP(1)))
	b.Apply(newService("b", clusterIP(1)))
	b.dropOutdated()
	if len(b.events) != 4 {
		t.Errorf("%d events are left of a Node's two and of two Services", len(b.events))
	}
	b.mustSync()
	if !b.Plan(plan.IPv4).Node.LocalPods.Known() {
		t.Error("the Node's Pod range is lost")
	}
	if services := b.Plan(plan.IPv4).Services; len(services) != 1 {
		t.Errorf("the Services are %v", services)
	}
}

func TestHeld(t *testing.T) {
	b := filled(t, 'c')
	node := &corev1.Node{}
	node.Name = "node1"
	cidr := &networkingv1.ServiceCIDR{}
	cidr.Name, cidr.Spec.CIDRs = "kubernetes", []string{"10.96.0.0/16"}
	b.Apply(node)
	b.Apply(cidr)
	b.Delete(newSlice("a"))
	_ = b.syncNow()
	if diff := cmp.Diff(service.ObjectCounts{Services: 3, EndpointSlices: 2, Nodes: 1, ServiceCIDRs: 1}, b.Progress().Objects); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	b.Delete(node)
	_ = b.syncNow()
	if n := b.Progress().Objects.Nodes; n != 0 {
		t.Errorf("%d Nodes are held after the deletion", n)
	}
}

// triggered is a slice whose change was made at a time.
func triggered(service string, at time.Time, addresses ...string) *discoveryv1.EndpointSlice {
	s := newSlice(service, addresses...)
	s.Annotations = map[string]string{corev1.EndpointsLastChangeTriggerTime: at.Format(time.RFC3339Nano)}
	return s
}

func TestTriggers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		long := time.Now().Add(-time.Hour)
		b := newRig(t)
		b.Apply(newService("a", clusterIP(0)))
		b.Apply(triggered("a", long, "10.244.2.1"))
		b.Synced()
		b.mustSync()
		b.wantTriggers("of a first list")

		time.Sleep(time.Second)
		first := time.Now()
		b.Apply(triggered("a", first, "10.244.2.2"))
		b.Apply(triggered("a", first, "10.244.2.2", "10.244.2.3")) // the same trigger
		b.mode.refuse = func(*plan.Plan, plan.Change) error { return errors.New("no") }
		_ = b.syncNow()
		b.wantTriggers("of a sync that failed")
		time.Sleep(time.Second)
		second := time.Now()
		b.Apply(triggered("a", second, "10.244.2.4"))
		b.mode.refuse = nil
		b.mustSync()
		b.wantTriggers("of the next that did not", first, second)

		b.Apply(triggered("a", time.Now().Add(time.Second), "10.244.2.4"))
		b.mustSyncNothing()
		nonsense := newSlice("a", "10.244.2.5")
		nonsense.Annotations = map[string]string{corev1.EndpointsLastChangeTriggerTime: "yesterday"}
		b.Apply(nonsense)
		b.mustSync()
		b.wantTriggers("of a slice without")
		b.Delete(triggered("a", time.Now(), "10.244.2.5"))
		b.mustSync()
		b.wantTriggers("of a deletion")
	})
}

// A family that is not served leaves nothing behind, however often its slices change.
func TestTriggersOfAFamilyThatIsNotServed(t *testing.T) {
	b := filled(t, 'a')
	began := time.Now()
	for i := range 100 {
		s := triggered("a", began.Add(time.Duration(i)*time.Second), fmt.Sprintf("fd00::%x", i+1))
		s.Name, s.AddressType = "a-v6", discoveryv1.AddressTypeIPv6
		b.Apply(s)
		b.mustSyncNothing()
	}
	if left := b.tracker.TakeTriggerTimes(); len(left) > 0 {
		t.Errorf("%d trigger times are left", len(left[plan.IPv6]))
	}
}

// wantTriggers checks those of the last report.
func (b *rig) wantTriggers(of string, want ...time.Time) {
	b.t.Helper()
	got := b.reports[len(b.reports)-1].Triggers
	equal := len(got) == len(want)
	for i := range min(len(got), len(want)) {
		equal = equal && got[i].Equal(want[i])
	}
	if !equal {
		b.t.Errorf("triggers %s: %v, want %v", of, got, want)
	}
}

func TestRepairsAreTold(t *testing.T) {
	b := filled(t, 'a')
	if r := b.reports[0]; r.Repaired || !r.All {
		t.Errorf("the first sync: %+v", r)
	}
	b.RequestFullWrite()
	b.mustSync()
	if r := b.reports[1]; r.Repaired || !r.All {
		t.Errorf("a sync that was asked for: %+v", r)
	}
	lost := true
	b.mode.refuse = func(_ *plan.Plan, c plan.Change) error {
		if lost = lost && !c.All; lost {
			return proxier.ErrUnknownState
		}
		return nil
	}
	b.Apply(newService("a", clusterIP(3)))
	b.mustSync()
	if r := b.reports[2]; !r.Repaired || !r.All {
		t.Errorf("after the kernel's state was lost: %+v", r)
	}
}

func balanced(port int32) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		s.Spec.HealthCheckNodePort = port
		s.Spec.Ports[0].NodePort = port + 1
	}
}

func TestHealthChecksAreToldWhenTheyChange(t *testing.T) {
	b := filled(t, 'a')
	wantChecks := func(what string, want map[plan.ServiceName]plan.HealthCheck) {
		t.Helper()
		got := b.reports[len(b.reports)-1].HealthChecks
		if diff := cmp.Diff(want, got); diff != "" || (want == nil) != (got == nil) {
			t.Errorf("%s (-want +got)\n%s", what, diff)
		}
	}
	wantChecks("at the start", map[plan.ServiceName]plan.HealthCheck{})
	web := plan.ServiceName{Namespace: "default", Name: "web"}
	b.Apply(newService("web", clusterIP(9), balanced(31000)))
	b.mustSync()
	wantChecks("a new one", map[plan.ServiceName]plan.HealthCheck{web: {Port: 31000, LocalEndpoints: 0}})

	here := newSlice("web", "10.244.1.1", "10.244.1.2", "10.244.1.3", "10.244.2.1")
	for i := range 3 {
		here.Endpoints[i].NodeName = new("node1")
	}
	here.Endpoints[1].Conditions = discoveryv1.EndpointConditions{Ready: new(false), Serving: new(true), Terminating: new(true)}
	// The same addresses at another port, which no Service port is sent to,
	// and once more in another slice.
	twice := here.DeepCopy()
	twice.Name = "web-2"
	b.Apply(here)
	b.Apply(twice)
	b.mustSync()
	wantChecks("with endpoints", map[plan.ServiceName]plan.HealthCheck{web: {Port: 31000, LocalEndpoints: 2}})

	b.Apply(newService("a", clusterIP(20)))
	b.mustSync()
	wantChecks("after another's change", nil)

	b.Apply(newService("web", clusterIP(9), balanced(32000)))
	b.mode.refuse = func(*plan.Plan, plan.Change) error { return errors.New("no") }
	_ = b.syncNow()
	wantChecks("after a failure", nil)
	b.mode.refuse = nil
	b.mustSync()
	wantChecks("with another port", map[plan.ServiceName]plan.HealthCheck{web: {Port: 32000, LocalEndpoints: 2}})

	b.Delete(newService("web", clusterIP(9)))
	b.mustSync()
	wantChecks("gone", map[plan.ServiceName]plan.HealthCheck{})
}

// One address that has ready endpoints for two ports counts once, and one that
// is ready for any port counts.
func TestLocalEndpointsAreOfAllPorts(t *testing.T) {
	b := newRig(t)
	b.Apply(newService("web", clusterIP(0), balanced(31000), func(s *corev1.Service) {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "admin", Port: 81})
	}))
	both := newSlice("web", "10.244.1.1")
	both.Endpoints[0].NodeName = new("node1")
	both.Ports = append(both.Ports, discoveryv1.EndpointPort{Name: new("admin"), Port: new(int32(8081))})
	one := newSlice("web", "10.244.1.2")
	one.Name = "web-2"
	one.Endpoints[0].NodeName = new("node1")
	one.Ports[0].Name = new("admin")
	b.Apply(both)
	b.Apply(one)
	b.Synced()
	b.mustSync()
	want := map[plan.ServiceName]plan.HealthCheck{{Namespace: "default", Name: "web"}: {Port: 31000, LocalEndpoints: 2}}
	if diff := cmp.Diff(want, b.reports[0].HealthChecks); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

func TestTotals(t *testing.T) {
	b := newRig(t)
	local := func(s *corev1.Service) {
		s.Spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyLocal)
		s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	}
	b.Apply(newService("far", clusterIP(0), nodePort(30000), local))
	b.Apply(newSlice("far", "10.244.2.1", "10.244.2.2"))
	b.Apply(newService("none", clusterIP(1), nodePort(30001), local))
	b.Apply(newService("internal", clusterIP(2), local))
	b.Apply(newSlice("internal", "10.244.2.3"))
	b.Synced()
	b.mustSync()
	want := Totals{ServicePorts: 3, Endpoints: 3, NoLocalInternal: 2, NoLocalExternal: 1}
	if got := b.reports[0].Totals; got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	b.SetLocalAddrs([]netip.Addr{netip.MustParseAddr("192.168.0.1")})
	b.Delete(newService("far", clusterIP(0)))
	b.mustSync()
	want = Totals{ServicePorts: 2, Endpoints: 1, NoLocalInternal: 1}
	if got := b.reports[len(b.reports)-1].Totals; got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if err := b.SyncNow(context.Background()); err != nil {
		t.Fatal(err)
	}
}
