package iptables

import (
	"context"
	"fmt"
	"testing"

	"signalbox/proxier"
	"signalbox/proxier/proxiertest"
)

const endpointsEach = 10

func BenchmarkCompile(b *testing.B) {
	for _, services := range []int{1000, 10000, 50000} {
		b.Run(fmt.Sprintf("%d", services), func(b *testing.B) {
			plan := proxiertest.Fleet(proxier.IPv4, services, endpointsEach)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Render(proxier.Options{Family: proxier.IPv4, MasqueradeMark: proxier.DefaultMasqueradeMark}, plan); err != nil {
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
			plan := proxiertest.Fleet(proxier.IPv4, services, endpointsEach)
			s, err := newState(proxier.Options{Family: proxier.IPv4, MasqueradeMark: proxier.DefaultMasqueradeMark}, plan.Node, facts{})
			if err != nil {
				b.Fatal(err)
			}
			s.full(plan, [tableCount][]string{}, nil)
			b.ReportAllocs()
			b.ResetTimer()
			for n := 0; b.Loop(); n++ {
				s.change(plan, moved(plan, n)).commit()
			}
		})
	}
}

// moved gives one Service of the plan other endpoints.
func moved(plan *proxier.Plan, n int) proxier.Change {
	sp := proxiertest.FleetService(plan.Family, 7, 1000000+n%1000*endpointsEach, endpointsEach)
	plan.Services[sp.Name] = sp
	return proxier.Change{Services: []proxier.ServicePortName{sp.Name}}
}

// kernelSizes are numbers of Services.
var kernelSizes = []int{1000, 10000}

func BenchmarkSyncCold(b *testing.B) {
	for _, backend := range []Backend{Legacy, NFT} {
		for _, services := range kernelSizes {
			b.Run(fmt.Sprintf("%s/%d", backend, services), func(b *testing.B) {
				plan := proxiertest.Fleet(proxier.IPv4, services, endpointsEach)
				for b.Loop() {
					b.StopTimer()
					ownNamespace(b)
					p := newProxier(b, proxier.IPv4, backend)
					b.StartTimer()
					mustSync(b, p, plan, proxier.Change{All: true})
				}
			})
		}
	}
}

func BenchmarkSyncOne(b *testing.B) {
	for _, backend := range []Backend{Legacy, NFT} {
		for _, services := range kernelSizes {
			b.Run(fmt.Sprintf("%s/%d", backend, services), func(b *testing.B) {
				ownNamespace(b)
				plan := proxiertest.Fleet(proxier.IPv4, services, endpointsEach)
				p := newProxier(b, proxier.IPv4, backend)
				mustSync(b, p, plan, proxier.Change{All: true})
				b.ResetTimer()
				for n := 0; b.Loop(); n++ {
					if err := p.Sync(context.Background(), plan, moved(plan, n)); err != nil {
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
			plan := proxiertest.Fleet(proxier.IPv4, services, endpointsEach)
			s, err := newState(proxier.Options{Family: proxier.IPv4, MasqueradeMark: proxier.DefaultMasqueradeMark}, plan.Node, facts{})
			if err != nil {
				b.Fatal(err)
			}
			s.full(plan, [tableCount][]string{}, nil)
			p := &Proxier{state: s}
			b.ReportAllocs()
			b.ResetTimer()
			for b.Loop() {
				p.Counts()
			}
		})
	}
}
