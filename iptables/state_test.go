// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"signalbox/internal/xtables"
	"signalbox/proxier"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// compiledState is a state that compiles plans itself.
type compiledState struct {
	*state
	*compiler
}

func (s *compiledState) change(desired *plan.Plan, change plan.Change) *transition {
	return s.state.change(s.compile(desired, change))
}

func stateOf(t testing.TB, plan *plan.Plan) (*compiledState, *model) {
	t.Helper()
	c, err := newCompiler(proxier.Options{Family: plan.Family, MasqueradeMark: proxier.DefaultMasqueradeMark}, &plan.Node, true)
	if err != nil {
		t.Fatal(err)
	}
	m := newModel()
	s := &compiledState{newState(plan.Family), c}
	tr := s.change(plan, everything(plan))
	m.mustApply(t, tr.fullScript([tableCount]*xtables.Listing{{}, {}}, jumps).String())
	tr.commit()
	return s, m
}

// FuzzChanges applies a sequence of changes, of which some fail and are rolled
// back. Kernel and state must then be what a full write makes of them.
func FuzzChanges(f *testing.F) {
	for seed := range uint64(12) {
		f.Add(seed, uint8(1+seed*seed%20))
	}
	f.Fuzz(changeByChange)
}

// TestRandomChanges is FuzzChanges with other seeds each time. `make soak` repeats it for
// 10,000 sequences.
func TestRandomChanges(t *testing.T) {
	for range 10 {
		seed, changes := rand.Uint64(), uint8(1+rand.IntN(12))
		t.Run(fmt.Sprintf("%d,%d", seed, changes), func(t *testing.T) { changeByChange(t, seed, changes) })
	}
}

// changeByChange makes as many changes of a seed.
func changeByChange(t *testing.T, seed uint64, changes uint8) {
	w := newWorld(plan.Families[seed%2], seed)
	plan := w.plan(w.IntN(80))
	s, kernel := stateOf(t, plan)
	for range changes {
		before := maps.Clone(plan.Services)
		change := w.change(plan)
		tr := s.change(plan, change)
		if w.IntN(4) == 0 {
			tr.rollback()
			plan.Services, plan.Node = before, s.node
			continue
		}
		kernel.mustApply(t, tr.script().String())
		tr.commit()
	}
	fresh, want := stateOf(t, plan)
	if diff := cmp.Diff(want.dump(), kernel.dump()); diff != "" {
		t.Errorf("a full write writes something else than %d changes (-full +changes):\n%s", changes, diff)
	}
	known := func(s *compiledState) []string {
		return slices.Sorted(func(yield func(string) bool) {
			for name := range s.services {
				yield(name.String())
			}
		})
	}
	if s.totals != fresh.totals || !maps.Equal(s.written[nat], fresh.written[nat]) || !maps.Equal(s.written[filter], fresh.written[filter]) ||
		!slices.Equal(known(s), known(fresh)) {
		t.Errorf("the state after %d changes is not that of a full write: %+v, want %+v", changes, s.totals, fresh.totals)
	}
}

// change replaces, removes and adds some Services.
func (w *world) change(desired *plan.Plan) plan.Change {
	var change plan.Change
	touched := map[plan.ServicePortName]bool{}
	touch := func(name plan.ServicePortName) bool {
		if touched[name] {
			return false
		}
		touched[name] = true
		change.Services = append(change.Services, name)
		return true
	}
	names := desired.Names()
	for range w.IntN(30) {
		if len(names) > 0 && w.IntN(2) == 0 {
			name := names[w.IntN(len(names))]
			if !touch(name) {
				continue
			}
			if w.IntN(2) == 0 {
				delete(desired.Services, name)
				continue
			}
			sp := w.service(w.IntN(100))
			sp.Name = name
			desired.Services[name] = sp
			continue
		}
		sp := w.service(100 + w.IntN(1000))
		if touch(sp.Name) {
			desired.Services[sp.Name] = sp
		}
	}
	if w.IntN(5) == 0 {
		change.Node = true
		desired.Node = cloneNode(desired.Node)
		desired.Node.NodePortAddrs.All = !desired.Node.NodePortAddrs.All
		desired.Node.NodePortAddrs.Addrs = []netip.Addr{w.nodeIP}
		desired.Node.RouteSources = nil
		if desired.Node.NodePortAddrs.All {
			desired.Node.RouteSources = w.routeSources()
		}
	}
	return change
}

func (w *world) routeSources() []plan.RouteSource {
	return []plan.RouteSource{
		{Link: "eth0", Destination: netip.PrefixFrom(w.nodeIP, 16).Masked()},
		{Link: "eth0", Destination: netip.PrefixFrom(w.nodeIP, 8).Masked(), Source: w.nodeIP},
		{Link: "eth1", Destination: netip.PrefixFrom(w.nodeIP, 0).Masked(), Source: w.nodeIP},
	}
}

// TestNoWrongMoment looks at the rules after each table of changes by which
// Services gain and lose their endpoints: a Service is served or refused, as
// before or as afterwards, but never let through.
func TestNoWrongMoment(t *testing.T) {
	for seed := range uint64(40) {
		w := newWorld(plan.IPv4, seed)
		desired := planOf(w.family)
		desired.Node = w.node
		for n := range 40 {
			sp := w.frontService(n)
			desired.Services[sp.Name] = sp
		}
		s, kernel := stateOf(t, desired)
		var change plan.Change
		before := maps.Clone(desired.Services)
		for n := range 40 {
			sp := w.frontService(n)
			desired.Services[sp.Name] = sp
			change.Services = append(change.Services, sp.Name)
		}
		tr := s.change(desired, change)
		err := kernel.apply(tr.script().String(), func() {
			for name, sp := range desired.Services {
				f, old := &sp.Frontends[0], &before[name].Frontends[0]
				for p, from := range w.packets(f, name.Protocol) {
					got, _ := kernel.fate(p)
					if !got.near(expected(f, from, p.src)) && !got.near(expected(old, from, p.src)) {
						t.Fatalf("seed %d: %s at %s: a packet from traffic source %v meets %v\n%s", seed, name, f.Key(name.Protocol), from, got, tr.script().String())
					}
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// frontService has one frontend that does not depend on chance, with or
// without endpoints.
func (w *world) frontService(n int) *plan.ServicePort {
	cluster, local := w.set(2), w.set(1)
	f := plan.Frontend{Kind: plan.FrontendKind(n % 4), Port: uint16(30000 + n), Internal: cluster, External: cluster, Masquerade: plan.AnySource}
	if f.Kind != plan.NodePort {
		f.Addr = w.addr(96, n+1)
	}
	if f.Kind != plan.ClusterIP && w.IntN(2) == 0 {
		f.External, f.WhenEmpty, f.Masquerade = local, plan.Drop, plan.FromNode
	}
	if w.IntN(3) == 0 {
		for _, a := range w.outside[w.IntN(len(w.outside)+1):] {
			f.Sources = append(f.Sources, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return &plan.ServicePort{
		Name:      plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "ns", Name: fmt.Sprintf("s%d", n)}, Protocol: plan.TCP},
		Frontends: []plan.Frontend{f},
		Usable:    cluster,
	}
}

// TestOneServiceIsWrittenAlone bounds what reaches iptables-restore for one
// changed Service among ten thousand.
func TestOneServiceIsWrittenAlone(t *testing.T) {
	const services, endpoints = 10000, 10
	desired := conformance.Fleet(plan.IPv4, services, endpoints)
	s, _ := stateOf(t, desired)
	script := func(sp *plan.ServicePort) string {
		desired.Services[sp.Name] = sp
		tr := s.change(desired, plan.Change{Services: []plan.ServicePortName{sp.Name}})
		tr.commit()
		return tr.script().String()
	}
	moved := script(conformance.FleetService(plan.IPv4, 7, 500001, endpoints))
	if n := len(moved); n > 1600 || strings.Contains(moved, "*filter") {
		t.Errorf("endpoints that moved make %d bytes:\n%s", n, moved)
	}
	added := script(conformance.FleetService(plan.IPv4, services+1, 500001, endpoints))
	if n := len(added); n > 5000 || strings.Contains(added, "*filter") {
		t.Errorf("a new Service makes %d bytes:\n%s", n, added)
	}
	empty := *desired.Services[conformance.FleetService(plan.IPv4, 7, 1, 1).Name]
	empty.Frontends = slices.Clone(empty.Frontends)
	empty.Frontends[0].Internal, empty.Frontends[0].External = &plan.EndpointSet{}, nil
	emptied := script(&empty)
	if n := len(emptied); n > 5000 || strings.Index(emptied, "*filter") > strings.Index(emptied, "*nat") {
		t.Errorf("a Service without endpoints makes %d bytes, or is not refused before it goes:\n%s", n, emptied)
	}
	if again := script(&empty); again != "" {
		t.Errorf("no change makes %q", again)
	}
}

// TestPacketsPassFewRules bounds the rules that a new connection passes. Ten
// times as many Services add about a dozen.
func TestPacketsPassFewRules(t *testing.T) {
	for _, family := range plan.Families {
		for services, limit := range map[int]int{100: 25, 1000: 38, 10000: 53, 50000: 63} {
			desired := conformance.Fleet(family, services, 1)
			_, m := stateOf(t, desired)
			most := 0
			for i := 0; i < services; i += 1 + services/5000 {
				f := &conformance.FleetService(family, i, 1, 1).Frontends[0]
				_, steps := m.fate(packet{src: nodeAddr(family), dst: f.Addr, proto: plan.TCP, dport: f.Port})
				most = max(most, steps)
			}
			if most > limit {
				t.Errorf("%s: a connection to one of %d Services passes %d rules, want %d at most", family, services, most, limit)
			}
			_, steps := m.fate(packet{src: nodeAddr(family), dst: nodeAddr(family), proto: plan.TCP, dport: 22})
			if steps > 36 {
				t.Errorf("%s: a connection to no Service passes %d rules beside %d", family, steps, services)
			}
		}
	}
}

func nodeAddr(family plan.Family) netip.Addr {
	if family == plan.IPv6 {
		return netip.MustParseAddr("2001:db8::1")
	}
	return netip.MustParseAddr("203.0.113.1")
}

// TestSyncDoesNotAllocateForOthers compares the allocations of one changed
// Service among many with those among few.
func TestSyncDoesNotAllocateForOthers(t *testing.T) {
	bytesFor := func(services int) float64 {
		desired := conformance.Fleet(plan.IPv4, services, 10)
		s, _ := stateOf(t, desired)
		sps := [2]*plan.ServicePort{
			conformance.FleetService(plan.IPv4, 7, 500001, 10), conformance.FleetService(plan.IPv4, 7, 600001, 10),
		}
		n := 0
		return testing.AllocsPerRun(50, func() {
			n++
			desired.Services[sps[0].Name] = sps[n%2]
			s.change(desired, plan.Change{Services: []plan.ServicePortName{sps[0].Name}}).commit()
		})
	}
	few, many := bytesFor(20), bytesFor(5000)
	if many > few*1.1 {
		t.Errorf("one change allocates %.0f times among 20 Services, %.0f times among 5,000", few, many)
	}
}
