// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"

	"signalbox/proxier/plan"
)

// ports gives a Service so many ports, and external IPs.
func ports(n int, addresses ...string) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.Ports = nil
		for i := range n {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: fmt.Sprintf("p%04d", i), Protocol: corev1.ProtocolTCP, Port: int32(1000 + i)})
		}
		s.Spec.ExternalIPs = addresses
	}
}

func dualStack(s *corev1.Service) { s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, "fd00:96::1") }

// refusesPorts refuses changes that write a port that is bad.
func refusesPorts(bad func(plan.ServicePortName) bool) func(*plan.Plan, plan.Change) error {
	return func(plan *plan.Plan, change plan.Change) error {
		names := change.Services
		if change.All {
			for name := range plan.Services {
				names = append(names, name)
			}
		}
		for _, name := range names {
			if bad(name) && plan.Services[name] != nil {
				return fmt.Errorf("refused %s", name)
			}
		}
		return nil
	}
}

// writtenAfter is how many calls of Sync it took to write a Service; 0 for never.
func (f *fakeProxier) writtenAfter(service string) int {
	for i, c := range f.calls {
		if c.err == nil && slices.ContainsFunc(c.change.Services, func(n plan.ServicePortName) bool { return n.Name == service }) {
			return i + 1
		}
	}
	return 0
}

// A Service of which the kernel refuses each of a thousand ports: a new Service
// waits neither for the search nor behind the retries, health is not hurt, and
// one line tells it.
func TestNobodyWaitsForASearch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		six := &fakeProxier{takes: 50 * time.Millisecond}
		b := newRig(t, func(o *LoopOptions) {
			o.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn}))
			o.Proxiers[plan.IPv6] = six
		})
		b.mode.takes = 50 * time.Millisecond
		b.Apply(newService("old", clusterIP(1)))
		b.Synced()
		b.run()
		time.Sleep(time.Minute)
		isBad := func(n plan.ServicePortName) bool { return n.Name == "bad" }
		b.mode.setRefuse(refusesPorts(isBad))
		six.setRefuse(refusesPorts(isBad))
		b.Apply(newService("bad", clusterIP(2), ports(1000), dualStack))
		longest := time.Duration(0)
		for i := range 100 {
			time.Sleep(500 * time.Millisecond)
			name := fmt.Sprintf("new%d", i)
			asked := time.Now()
			b.Apply(newService(name, clusterIP(10+i)))
			for b.inKernel(name).IsZero() {
				time.Sleep(10 * time.Millisecond)
				if time.Since(asked) > time.Minute {
					t.Fatal("a new Service is not served")
				}
			}
			longest = max(longest, b.inKernel(name).Sub(asked))
		}
		synctest.Wait()
		// What is under way may be a turn of either family, and the pause after it.
		if limit := 3 * (maxTurn + 200*time.Millisecond); longest > limit {
			t.Errorf("a new Service waited for %v, want %v at most", longest, limit)
		}
		if since := b.pending(); !since.IsZero() && time.Since(since) > time.Second {
			t.Errorf("something waits since %v", since)
		}
		if len(b.problems) != 1 || b.problems[0].Object != "default/bad" {
			t.Errorf("reported: %v", b.problems)
		}
		if log.Len() > 0 {
			t.Errorf("the log has warnings beside the report:\n%s", log.String())
		}
		calls := len(b.mode.syncs())
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(b.mode.syncs()) - calls; n > 130*maxTries {
			t.Errorf("%d syncs in an hour", n)
		}
	})
}

// inKernel is when the kernel was told of a Service; zero for not yet.
func (b *rig) inKernel(service string) time.Time {
	b.mode.mu.Lock()
	defer b.mode.mu.Unlock()
	if n := b.mode.writtenAfter(service); n > 0 {
		return b.mode.calls[n-1].at
	}
	return time.Time{}
}

func TestATurnHasAnEnd(t *testing.T) {
	b := filled(t, 'c')
	b.mode.setRefuse(refusing("bad"))
	b.Apply(newService("bad", clusterIP(20), ports(1000)))
	for turn := range 20 {
		before := len(b.mode.calls)
		_, _ = b.sync(context.Background(), true)
		if n := len(b.mode.calls) - before; n > maxTries+4 {
			t.Errorf("turn %d had %d syncs", turn, n)
		}
	}
}

// The ports that the kernel takes are served, wherever the others are.
func TestPortsOfAQuarantinedServiceAreServed(t *testing.T) {
	b := filled(t, 'c')
	b.mode.setRefuse(refusesPorts(func(n plan.ServicePortName) bool { return slices.Contains([]string{"p0000", "p0300", "p0999"}, n.Port) }))
	b.Apply(newService("web", clusterIP(20), ports(1000)))
	for range 20 {
		_ = b.syncNow()
	}
	if n := len(b.mode.kernel); n != 3+997 {
		t.Errorf("%d Service ports are served, want %d", n, 3+997)
	}
	if len(b.problems) != 1 {
		t.Errorf("reported: %v", b.problems)
	}
	if r := b.reports[len(b.reports)-1]; r.Quarantined != 3 || !r.Current {
		t.Errorf("the report is %+v", r)
	}

	// Its endpoints change: the ports that are served follow at once.
	b.mode.calls = nil
	slice := newSlice("web", "10.244.2.7")
	slice.Ports[0].Name = new("p0001")
	b.Apply(slice)
	if _, err := b.sync(context.Background(), false); err != nil {
		t.Error(err)
	}
	if n := b.mode.writtenAfter("web"); n != 1 {
		t.Errorf("the change is in after %d syncs", n)
	}
	b.mode.setRefuse(nil)
	b.mustSync()
	b.mustSyncNothing()
	if len(b.families[0].familyCounts) != 0 {
		t.Errorf("in quarantine: %v", b.families[0].familyCounts)
	}
}

// A Service that is known to be refused changes together with others: these go
// in with the first sync.
func TestAQuarantinedServiceHarmsNobodyWhenItChanges(t *testing.T) {
	b := filled(t, 'h')
	b.mode.setRefuse(refusing("bad"))
	b.Apply(newService("bad", clusterIP(20), ports(3)))
	_ = b.syncNow()
	for i := range 5 {
		b.mode.calls = nil
		b.Apply(newService("bad", clusterIP(30+i), ports(3+i)))
		b.Apply(newSlice("a", fmt.Sprintf("10.244.3.%d", i+1)))
		_, _ = b.sync(context.Background(), false)
		if c := b.mode.calls[0]; c.err != nil || names(c.change) != "a" {
			t.Errorf("the first sync wrote %q: %v", names(c.change), c.err)
		}
	}
	if len(b.problems) != 1 {
		t.Errorf("reported: %v", b.problems)
	}
}

// Many Services that the kernel refuses cost the others one turn, and all of
// them are found.
func TestManyRefusedServices(t *testing.T) {
	b := filled(t, 'c')
	bad := func(n plan.ServicePortName) bool { return strings.HasPrefix(n.Name, "bad") }
	b.mode.setRefuse(refusesPorts(bad))
	for i := range 300 {
		b.Apply(newService(fmt.Sprintf("bad%03d", i), clusterIP(100+i)))
		b.Apply(newService(fmt.Sprintf("good%03d", i), clusterIP(500+i)))
	}
	_, _ = b.sync(context.Background(), false)
	b.Apply(newService("late", clusterIP(900)))
	calls := len(b.mode.calls)
	_, _ = b.sync(context.Background(), false)
	if n := b.mode.writtenAfter("late"); n != calls+1 {
		t.Errorf("a change that came during the search is in after %d syncs", n-calls)
	}
	_ = b.syncNow()
	if n := len(b.mode.kernel); n != 3+301 {
		t.Errorf("%d Service ports are served", n)
	}
	if len(b.problems) != 300 {
		t.Errorf("%d reports", len(b.problems))
	}
	// What is mended is served with a few retries, however many they are.
	b.mode.setRefuse(nil)
	for range 300 / maxTries {
		_ = b.syncNow()
	}
	b.mustSync()
}

// A kernel that refuses whatever it is told says nothing about Services.
func TestAKernelThatRefusesEverythingBlamesNobody(t *testing.T) {
	b := filled(t, 'h')
	b.mode.setRefuse(func(*plan.Plan, plan.Change) error { return errors.New("no memory") })
	for c := 'a'; c <= 'h'; c++ {
		b.Apply(newSlice(string(c), "10.244.2.2"))
	}
	for range 3 {
		_ = b.syncNow()
	}
	if len(b.problems) != 0 {
		t.Errorf("blamed: %v", b.problems)
	}
	if b.pending().IsZero() {
		t.Error("nothing is pending")
	}
	b.mode.setRefuse(nil)
	b.mustSync()
}
