package iptables

import (
	"context"
	"fmt"
	"testing"

	"signalbox/internal/nstest"
	"signalbox/proxier"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

const endpointsEach = 10

func BenchmarkCompile(b *testing.B) {
	for _, services := range []int{1000, 10000, 50000} {
		b.Run(fmt.Sprintf("%d", services), func(b *testing.B) {
			desired := conformance.Fleet(plan.IPv4, services, endpointsEach)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := new(Dataplane).Render(proxier.Options{Family: plan.IPv4, MasqueradeMark: proxier.DefaultMasqueradeMark}, desired); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkCompileOne is the part of one changed Service that is not the
// tools' and the kernel's.
func BenchmarkCompileOne(b *testing.B) {
	for _, services := range []int{1000, 10000, 50000} {
		b.Run(fmt.Sprintf("%d", services), func(b *testing.B) {
			desired := conformance.Fleet(plan.IPv4, services, endpointsEach)
			s, _ := stateOf(b, desired)
			b.ReportAllocs()
			b.ResetTimer()
			for n := 0; b.Loop(); n++ {
				s.change(desired, moved(desired, n)).commit()
			}
		})
	}
}

// moved gives one Service of the plan other endpoints.
func moved(desired *plan.Plan, n int) plan.Change {
	sp := conformance.FleetService(desired.Family, 7, 1000000+n%1000*endpointsEach, endpointsEach)
	desired.Services[sp.Name] = sp
	return plan.Change{Services: []plan.ServicePortName{sp.Name}}
}

// kernelSizes are numbers of Services.
var kernelSizes = []int{1000, 10000}

func BenchmarkSyncCold(b *testing.B) {
	for _, backend := range []Backend{Legacy, NFT} {
		for _, services := range kernelSizes {
			b.Run(fmt.Sprintf("%s/%d", backend, services), func(b *testing.B) {
				desired := conformance.Fleet(plan.IPv4, services, endpointsEach)
				for b.Loop() {
					b.StopTimer()
					nstest.Enter(b)
					p := newProxier(b, plan.IPv4, backend)
					b.StartTimer()
					mustSync(b, p, desired, plan.Change{All: true})
				}
			})
		}
	}
}

func BenchmarkSyncOne(b *testing.B) {
	for _, backend := range []Backend{Legacy, NFT} {
		for _, services := range kernelSizes {
			b.Run(fmt.Sprintf("%s/%d", backend, services), func(b *testing.B) {
				nstest.Enter(b)
				desired := conformance.Fleet(plan.IPv4, services, endpointsEach)
				p := newProxier(b, plan.IPv4, backend)
				mustSync(b, p, desired, plan.Change{All: true})
				b.ResetTimer()
				for n := 0; b.Loop(); n++ {
					if err := p.Sync(context.Background(), desired, moved(desired, n)); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkCounts is what is done beside each sync to tell how many rules
// there are.
func BenchmarkCounts(b *testing.B) {
	for _, services := range []int{1000, 10000, 50000} {
		b.Run(fmt.Sprintf("%d", services), func(b *testing.B) {
			desired := conformance.Fleet(plan.IPv4, services, endpointsEach)
			s, _ := stateOf(b, desired)
			p := &Proxier{state: s.state}
			b.ReportAllocs()
			b.ResetTimer()
			for b.Loop() {
				p.Counts()
			}
		})
	}
}
