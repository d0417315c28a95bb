// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"

	"signalbox/proxier/plan"
)

func externalIPs(n int) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprintf("198.18.%d.%d", i/250, i%250+1))
	}
	return out
}

// A large Service and small ones change together: the small ones go in first, and
// the large one in slices of whole Service ports, between which others go in.
func TestSmallChangesOvertakeLargeOnes(t *testing.T) {
	b := filled(t, 'c')
	b.mode.calls = nil
	b.Apply(newService("huge", clusterIP(20), ports(100, externalIPs(200)...)))
	b.Apply(newSlice("a", "10.244.2.2"))
	late := 0
	b.mode.setRefuse(func(*plan.Plan, plan.Change) error {
		if late++; late == 3 {
			b.Apply(newSlice("b", "10.244.2.2"))
		}
		return nil
	})
	b.mustSync()
	if c := b.mode.calls[0].change; names(c) != "a" {
		t.Errorf("the first sync wrote %q", names(c))
	}
	seen := map[plan.ServicePortName]bool{}
	for i, c := range b.mode.calls {
		size := 0
		for _, name := range c.change.Services {
			size += entriesOf(b.Plan(plan.IPv4).Services[name])
			if seen[name] {
				t.Errorf("%s was written twice", name)
			}
			seen[name] = true
		}
		if size > sliceEntries {
			t.Errorf("sync %d wrote %d entries", i, size)
		}
	}
	if n := b.mode.writtenAfter("b"); n == 0 || n == len(b.mode.calls) {
		t.Errorf("a change that came during the third sync is in after sync %d of %d", n, len(b.mode.calls))
	}
}

// While slices are written, the family is as healthy as its last sync is recent.
func TestSlicesAreProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := filled(t, 'a')
		b.mode.takes = time.Second
		b.run()
		b.Apply(newService("huge", clusterIP(20), ports(100, externalIPs(200)...)))
		hangs := make(chan struct{})
		for range 20 {
			time.Sleep(time.Second)
			synctest.Wait()
			if since := b.pending(); !since.IsZero() && time.Since(since) > 3*time.Second {
				t.Fatalf("something waits since %v", time.Since(since))
			}
		}
		b.mode.setRefuse(func(*plan.Plan, plan.Change) error { <-hangs; return nil })
		b.Apply(newService("huge", clusterIP(21), ports(100, externalIPs(201)...)))
		time.Sleep(time.Minute)
		if since := b.pending(); since.IsZero() || time.Since(since) < 50*time.Second {
			t.Errorf("a sync hangs, and something waits since %v", since)
		}
		close(hangs)
	})
}

// Beyond the bound a Service is not planned at all, and one report says so for
// both families.
func TestTooLargeServices(t *testing.T) {
	inSlices := func(b *rig, service string, ports, endpoints int) {
		for i := range endpoints / 1000 {
			s := newSlice(service)
			s.Name = fmt.Sprintf("%s-%d", service, i)
			s.Ports = nil
			for p := range ports {
				s.Ports = append(s.Ports, newSlice("x").Ports[0])
				s.Ports[p].Name = new(fmt.Sprintf("p%04d", p))
			}
			for e := range 1000 {
				s.Endpoints = append(s.Endpoints, newSlice("x", fmt.Sprintf("10.1%02d.%d.%d", i, e/250, e%250+1)).Endpoints...)
			}
			b.Apply(s)
		}
	}
	for _, test := range []struct {
		what  string
		apply func(*rig)
		want  string
	}{
		{"48 kB of YAML", func(b *rig) { b.Apply(newService("huge", clusterIP(5), ports(800, externalIPs(1000)...), dualStack)) },
			"800 ports at 1001 addresses and source ranges make more than 65536 frontends"},
		{"one port", func(b *rig) { b.Apply(newService("huge", clusterIP(5), ports(1, externalIPs(20000)...))) },
			"each port has 20001 addresses and source ranges, more than 16384"},
		{"source ranges", func(b *rig) {
			b.Apply(newService("huge", clusterIP(5), ports(10), func(s *corev1.Service) {
				for i := range 100 {
					s.Spec.LoadBalancerSourceRanges = append(s.Spec.LoadBalancerSourceRanges, fmt.Sprintf("10.%d.0.0/16", i))
					s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: externalIPs(100)[i]})
				}
			}))
		}, "10 ports at 10101 addresses and source ranges make more than 65536 frontends"},
		{"endpoints", func(b *rig) {
			b.Apply(newService("huge", clusterIP(5), ports(100)))
			inSlices(b, "huge", 100, 3000)
		}, "100 ports with their endpoints make more than 262144"},
	} {
		t.Run(test.what, func(t *testing.T) {
			b := newRig(t, func(o *LoopOptions) { o.Proxiers[plan.IPv6] = &fakeProxier{} })
			b.Apply(newService("small", clusterIP(1)))
			test.apply(b)
			b.Synced()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			b.mustSync()
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
				t.Errorf("it took %d MB to find out", n>>20)
			}
			if len(b.Plan(plan.IPv4).Services) != 1 {
				t.Errorf("%d Service ports are planned", len(b.Plan(plan.IPv4).Services))
			}
			if len(b.problems) != 1 || !strings.HasPrefix(b.problems[0].Reason, test.want) {
				t.Errorf("reported %v, want %q", b.problems, test.want)
			}
			if r := b.reports[0]; r.Quarantined == 0 || !r.Current {
				t.Errorf("the report is %+v", r)
			}
			b.Apply(newSlice("huge", "10.244.2.3")) // still too large
			b.mustSync()
			if len(b.problems) != 1 {
				t.Errorf("reported again: %v", b.problems[1:])
			}
			b.Apply(newService("huge", clusterIP(5), ports(2)))
			b.mustSync()
			if r := b.reports[len(b.reports)-1]; len(b.Plan(plan.IPv4).Services) != 3 || r.Quarantined != 0 {
				t.Errorf("once it is small, %d Service ports are served; %+v", len(b.Plan(plan.IPv4).Services), r)
			}
		})
	}
}

// What people have is far below the bounds.
func TestLargeServicesThatAreServed(t *testing.T) {
	b := newRig(t)
	media := newService("media", clusterIP(1), ports(10_000), func(s *corev1.Service) { // RTP
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.1"}}
	})
	b.Apply(media)
	b.Apply(newService("edge", clusterIP(2), ports(20, externalIPs(1000)...)))
	b.Synced()
	b.mustSync()
	if n := len(b.Plan(plan.IPv4).Services); n != 10_020 || len(b.problems) != 0 {
		t.Errorf("%d Service ports are served; %v", n, b.problems)
	}
	if n := len(b.mode.calls); n != 1 {
		t.Errorf("everything was written in %d syncs", n)
	}
}

// Two large Services request the same addresses: that is a few lines and not one
// for each frontend.
func TestConflictsOfLargeServicesAreToldBriefly(t *testing.T) {
	b := newRig(t)
	b.Apply(newService("a", clusterIP(1), ports(100, externalIPs(100)...)))
	b.Apply(newService("b", clusterIP(2), ports(100, externalIPs(100)...)))
	b.Synced()
	b.mustSync()
	if n := len(b.problems); n == 0 || n > 11 {
		t.Errorf("%d reports", n)
	}
}

// The memory that a large Service took is free when it is gone.
func TestMemoryIsGivenBack(t *testing.T) {
	held := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	b := filled(t, 'c')
	b.Loop.opts.Flows = nil
	before := held()
	huge := newService("huge", clusterIP(20), ports(100, externalIPs(200)...))
	b.Apply(huge)
	b.mustSync()
	during := held()
	b.Delete(huge)
	b.mustSync()
	b.mode.kernel = nil
	b.mode.calls, b.reports = nil, nil
	after := held()
	runtime.KeepAlive(b)
	t.Logf("%d kB before, %d kB with it, %d kB after it", before>>10, during>>10, after>>10)
	if after-min(before, after) > (during-before)/10 {
		t.Error("not all of it")
	}
}

// Slices of linked Service ports stay together: ports swap their numbers.
func TestSlicesKeepHandoversWhole(t *testing.T) {
	b := filled(t, 'a')
	huge := newService("huge", clusterIP(20), ports(100, externalIPs(200)...))
	b.Apply(huge)
	b.mustSync()
	swapped := huge.DeepCopy()
	for i := range swapped.Spec.Ports {
		swapped.Spec.Ports[i].Port = int32(1000 + (i ^ 1))
	}
	b.mode.calls = nil
	b.Apply(swapped)
	b.mustSync() // the fake mode refuses a frontend that two have
	if len(b.problems) != 0 || slices.ContainsFunc(b.mode.calls, func(c call) bool { return c.err != nil }) {
		t.Errorf("reported %v", b.problems)
	}
	if len(b.mode.calls) < 5 {
		t.Errorf("written in %d syncs", len(b.mode.calls))
	}
}
