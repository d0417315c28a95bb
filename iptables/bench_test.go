// SPDX-License-Identifier: Apache-2.0

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

// writers are what writes rules: the tools of a variant, or netlink.
var writers = []struct {
	name    string
	backend Backend
	netlink bool
}{{"legacy", Legacy, false}, {"nft", NFT, true}, {"nft-tools", NFT, false}}

// kernelSizes are numbers of Services.
var kernelSizes = []int{1000, 10000}

func BenchmarkSyncCold(b *testing.B) {
	for _, w := range writers {
		for _, services := range kernelSizes {
			b.Run(fmt.Sprintf("%s/%d", w.name, services), func(b *testing.B) {
				desired := conformance.Fleet(plan.IPv4, services, endpointsEach)
				for b.Loop() {
					b.StopTimer()
					nstest.Enter(b)
					p := newProxier(b, plan.IPv4, w.backend)
					p.triedNetlink = !w.netlink
					b.StartTimer()
					mustSync(b, p, desired, plan.Change{All: true})
				}
			})
		}
	}
}

func BenchmarkSyncOne(b *testing.B) {
	for _, w := range writers {
		for _, services := range kernelSizes {
			b.Run(fmt.Sprintf("%s/%d", w.name, services), func(b *testing.B) {
				nstest.Enter(b)
				desired := conformance.Fleet(plan.IPv4, services, endpointsEach)
				p := newProxier(b, plan.IPv4, w.backend)
				p.triedNetlink = !w.netlink
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

// BenchmarkCompare compares the kernel with the rules of one Service port, as `signalbox
// explain` does, and with all, as `signalbox diff` does.
func BenchmarkCompare(b *testing.B) {
	for _, backend := range []Backend{Legacy, NFT} {
		for _, services := range kernelSizes {
			desired := conformance.Fleet(plan.IPv4, services, endpointsEach)
			one := conformance.FleetService(plan.IPv4, 7, 0, endpointsEach).Name
			for name, about := range map[string][]plan.ServicePortName{"one": {one}, "all": nil} {
				b.Run(fmt.Sprintf("%s/%d/%s", backend, services, name), func(b *testing.B) {
					nstest.Enter(b)
					p := newProxier(b, plan.IPv4, backend)
					mustSync(b, p, desired, plan.Change{All: true})
					for b.Loop() {
						c, err := p.Compare(context.Background(), about...)
						if err != nil || len(c.Differences) > 0 || (len(c.Holds) > 0) != (about != nil) {
							b.Fatalf("compared %+v, %v", c, err)
						}
					}
				})
			}
		}
	}
}
