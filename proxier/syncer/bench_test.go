// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"signalbox/internal/alloctest"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// nothing is a mode that writes nothing.
type nothing struct{ proxier.Defaults }

func (nothing) Sync(context.Context, *plan.Plan, plan.Change) error { return nil }
func (nothing) Close() error                                        { return nil }

func slicesOf(i, endpoints, moved int) *discoveryv1.EndpointSlice {
	addresses := make([]string, endpoints)
	for n := range addresses {
		pod := i*endpoints + n + moved
		addresses[n] = netip.AddrFrom4([4]byte{10, byte(128 + pod>>16), byte(pod >> 8), byte(pod)}).String()
	}
	s := newSlice(fmt.Sprintf("svc-%d", i), addresses...)
	for n := range s.Endpoints {
		s.Endpoints[n].NodeName = new(fmt.Sprintf("node%d", n+i%100))
		s.Endpoints[n].TargetRef = &corev1.ObjectReference{Name: fmt.Sprintf("svc-%d-5d78c9869d-%05d", i, n+moved)}
	}
	return s
}

// fleet is a Loop that has planned Services of ten endpoints each.
func fleet(services int) *Loop {
	l := NewLoop(LoopOptions{NodeName: "node1", Proxiers: map[plan.Family]proxier.Proxier{plan.IPv4: nothing{}, plan.IPv6: nothing{}}, Logger: slog.New(slog.DiscardHandler)})
	for i := range services {
		l.Apply(newService(fmt.Sprintf("svc-%d", i), netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}).String()))
		l.Apply(slicesOf(i, 10, 0))
	}
	l.Synced()
	_ = l.SyncNow(context.Background())
	return l
}

// BenchmarkEvent is one Service's endpoints changing, from the event to the
// plan and to the call of Sync. What it allocates must not depend on the
// number of other Services.
func BenchmarkEvent(b *testing.B) {
	for _, services := range []int{100, 1_000, 10_000} {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			l := fleet(services)
			forms := []*discoveryv1.EndpointSlice{slicesOf(7, 10, 1), slicesOf(7, 10, 2)}
			b.ReportAllocs()
			for n := 0; b.Loop(); n++ {
				l.Apply(forms[n%2])
				if err := l.SyncNow(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestAllocationsOfOneEvent guards the way from an event to the changed plan.
func TestAllocationsOfOneEvent(t *testing.T) {
	l := fleet(100)
	forms := []*discoveryv1.EndpointSlice{slicesOf(7, 10, 1), slicesOf(7, 10, 2)}
	n := 0
	alloctest.Check(t, 66, func() {
		n++
		l.Apply(forms[n%2])
		_ = l.SyncNow(t.Context())
	})
}

// TestAnEventCostsTheSameAmongMany is what BenchmarkEvent measures, as a test.
func TestAnEventCostsTheSameAmongMany(t *testing.T) {
	allocs := func(services int) float64 {
		l := fleet(services)
		forms := []*discoveryv1.EndpointSlice{slicesOf(7, 10, 1), slicesOf(7, 10, 2)}
		n := 0
		return testing.AllocsPerRun(100, func() {
			n++
			l.Apply(forms[n%2])
			_ = l.SyncNow(context.Background())
		})
	}
	if few, many := allocs(20), allocs(5_000); many > few+1 {
		t.Errorf("an event among 20 Services allocates %.0f times, among 5000 %.0f times", few, many)
	}
}

// BenchmarkStart is everything from nothing, and what is held then.
func BenchmarkStart(b *testing.B) {
	for _, services := range []int{1_000, 10_000, 50_000} {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			var before, after runtime.MemStats
			for b.Loop() {
				runtime.GC()
				runtime.ReadMemStats(&before)
				l := fleet(services)
				runtime.GC()
				runtime.ReadMemStats(&after)
				runtime.KeepAlive(l)
			}
			held := float64(after.HeapAlloc) - float64(before.HeapAlloc)
			b.ReportMetric(held/float64(services), "B/service")
			b.ReportMetric(held/float64(services*10), "B/endpoint")
			b.ReportMetric(held/(1<<20), "MiB")
		})
	}
}
