// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"signalbox/internal/nstest"
	"signalbox/nft"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// fleetSizes are the sizes of the fleets that are measured, in Services.
var fleetSizes = []int{1000, 10_000, 50_000}

// eachFleet runs a benchmark over fleets with 10 endpoints per Service and,
// at the middle size, with 5 to 10.
func eachFleet(b *testing.B, run func(b *testing.B, plan *plan.Plan)) {
	for _, n := range fleetSizes {
		b.Run(fmt.Sprintf("%dx10", n), func(b *testing.B) { run(b, conformance.Fleet(plan.IPv4, n, 10)) })
	}
	b.Run("10000x5-10", func(b *testing.B) { run(b, mixedFleet(10_000)) })
}

// mixedFleet has 5 to 10 endpoints per Service.
func mixedFleet(services int) *plan.Plan {
	desired := conformance.Fleet(plan.IPv4, services, 10)
	desired.Services = make(map[plan.ServicePortName]*plan.ServicePort, services)
	for i := range services {
		sp := conformance.FleetService(plan.IPv4, i, i*10, 5+i%6)
		desired.Services[sp.Name] = sp
	}
	return desired
}

// BenchmarkCompile makes all elements of a plan, without a kernel.
func BenchmarkCompile(b *testing.B) {
	eachFleet(b, func(b *testing.B, plan *plan.Plan) {
		b.ReportAllocs()
		elements := 0
		for b.Loop() {
			st, err := stateOf(nft.FamilyOf(plan.Family), plan, nil, nil)
			if err != nil {
				b.Fatal(err)
			}
			elements = 0
			compileAll(st, func(nft.Element) { elements++ })
		}
		b.ReportMetric(float64(elements), "elements")
	})
}

// BenchmarkRepair reads the table back and writes the element that another program removed.
func BenchmarkRepair(b *testing.B) {
	eachFleet(b, func(b *testing.B, desired *plan.Plan) {
		nstest.Enter(b)
		p, other := newProxier(b, desired.Family), newProxier(b, desired.Family)
		if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
			b.Fatal(err)
		}
		var frontend nft.Element
		compileAll(p.state, func(e nft.Element) {
			if e.Set == frontends {
				frontend = e
			}
		})
		forgetPeak(b)
		for b.Loop() {
			b.StopTimer()
			other.table.RemoveElements([]nft.Element{frontend})
			if err := other.table.Commit(); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			if found, err := p.Repair(context.Background()); err != nil || len(found.Objects) != 1 {
				b.Fatalf("found %+v, %v", found, err)
			}
		}
		b.ReportMetric(memoryMiB(b, "VmHWM"), "MiB-peak")
	})
}

// BenchmarkSyncCold writes a whole plan into a kernel that has no table.
func BenchmarkSyncCold(b *testing.B) {
	eachFleet(b, func(b *testing.B, desired *plan.Plan) {
		nstest.Enter(b)
		forgetPeak(b)
		for b.Loop() {
			b.StopTimer()
			if _, _, err := (Dataplane{}).Cleanup(desired.Family, false); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			p := newProxier(b, desired.Family)
			if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			p.Close()
			b.StartTimer()
		}
		b.ReportMetric(memoryMiB(b, "VmHWM"), "MiB-peak")
	})
}

// BenchmarkSyncSame starts a process over the table of another one, with nothing changed.
func BenchmarkSyncSame(b *testing.B) {
	eachFleet(b, benchmarkRestart)
}

// BenchmarkSyncAgain is the same where every Service has affinity: a process keeps the
// numbers of Service ports and endpoints, whatever it writes.
func BenchmarkSyncAgain(b *testing.B) {
	eachFleet(b, func(b *testing.B, desired *plan.Plan) {
		for _, sp := range desired.Services {
			sp.AffinityTimeout = 3 * time.Hour
		}
		benchmarkRestart(b, desired)
	})
}

func benchmarkRestart(b *testing.B, desired *plan.Plan) {
	nstest.Enter(b)
	p := newProxier(b, desired.Family)
	if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
		b.Fatal(err)
	}
	forgetPeak(b)
	for b.Loop() {
		again := newProxier(b, desired.Family)
		err := onAnyThread(func() error { return again.Sync(context.Background(), desired, plan.Change{All: true}) })
		if err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(memoryMiB(b, "VmHWM"), "MiB-peak")
}

// BenchmarkSyncOne writes the change of one Service: one of its ten endpoints
// is replaced by another.
func BenchmarkSyncOne(b *testing.B) {
	eachFleet(b, func(b *testing.B, desired *plan.Plan) {
		benchmarkChange(b, desired, func(round int) *plan.ServicePort {
			return conformance.FleetService(desired.Family, 500, 5000+round%2, 10)
		})
	})
}

// BenchmarkSyncScale writes the change of one Service that gets one endpoint
// more or less, and so another chain.
func BenchmarkSyncScale(b *testing.B) {
	eachFleet(b, func(b *testing.B, desired *plan.Plan) {
		benchmarkChange(b, desired, func(round int) *plan.ServicePort {
			return conformance.FleetService(desired.Family, 500, 5000, 10+round%2)
		})
	})
}

// BenchmarkSyncNew adds one Service or removes it.
func BenchmarkSyncNew(b *testing.B) {
	eachFleet(b, func(b *testing.B, desired *plan.Plan) {
		sp := conformance.FleetService(desired.Family, 60_000, 600_000, 10)
		benchmarkChange(b, desired, func(round int) *plan.ServicePort {
			if round%2 == 0 {
				return sp
			}
			return &plan.ServicePort{Name: sp.Name}
		})
	})
}

// BenchmarkSyncSources replaces one endpoint of one Service, and the sources
// allowed at it, where every Service has two source ranges.
func BenchmarkSyncSources(b *testing.B) {
	for _, n := range []int{100, 1000, 10_000} {
		b.Run(fmt.Sprintf("%dx10", n), func(b *testing.B) {
			desired := conformance.Fleet(plan.IPv4, n, 10)
			for _, sp := range desired.Services {
				sp.Frontends[0].Sources = fleetSources(0)
			}
			benchmarkChange(b, desired, func(round int) *plan.ServicePort {
				sp := conformance.FleetService(desired.Family, 50, 500+round%2, 10)
				sp.Frontends[0].Sources = fleetSources(round % 2)
				return sp
			})
		})
	}
}

func fleetSources(n int) []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(n), 0}), 24)}
}

// benchmarkChange measures Syncs of one Service port; one without frontends is
// removed.
func benchmarkChange(b *testing.B, desired *plan.Plan, next func(round int) *plan.ServicePort) {
	nstest.Enter(b)
	p := newProxier(b, desired.Family)
	desired = &plan.Plan{Family: desired.Family, Node: desired.Node, Services: maps.Clone(desired.Services)}
	if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	forgetPeak(b)
	round := 0
	for b.Loop() {
		sp := next(round)
		round++
		desired.Services[sp.Name] = sp
		if len(sp.Frontends) == 0 {
			delete(desired.Services, sp.Name)
		}
		change := plan.Change{Services: []plan.ServicePortName{sp.Name}}
		if err := p.Sync(context.Background(), desired, change); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(memoryMiB(b, "VmRSS"), "MiB-resident")
}

// onAnyThread runs f in a goroutine that no thread is locked to, as in the
// program: on the locked thread of a test each of the library's reads costs two
// changes of thread.
func onAnyThread(f func() error) error {
	done := make(chan error)
	go func() { done <- f() }()
	return <-done
}

// forgetPeak gives back what earlier benchmarks used and starts the peak of the
// resident memory again from here.
func forgetPeak(b *testing.B) {
	debug.FreeOSMemory()
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		b.Fatal(err)
	}
}

// memoryMiB reads a line of this process's memory figures.
func memoryMiB(b *testing.B, name string) float64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			kib, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				b.Fatal(err)
			}
			return float64(kib) / 1024
		}
	}
	b.Fatalf("no %s in /proc/self/status", name)
	return 0
}

// BenchmarkCompare compares the kernel with the elements of one Service port, as `signalbox
// explain` does, and with all, as `signalbox diff` does.
func BenchmarkCompare(b *testing.B) {
	eachFleet(b, func(b *testing.B, desired *plan.Plan) {
		nstest.Enter(b)
		p := newProxier(b, desired.Family)
		if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
			b.Fatal(err)
		}
		for name, about := range map[string][]plan.ServicePortName{"one": {desired.Names()[7]}, "all": nil} {
			b.Run(name, func(b *testing.B) {
				for b.Loop() {
					c, err := p.Compare(context.Background(), about...)
					if err != nil || len(c.Differences) > 0 || (len(c.Holds) > 0) != (about != nil) {
						b.Fatalf("compared %+v, %v", c, err)
					}
				}
			})
		}
	})
}
