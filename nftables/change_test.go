// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"signalbox/internal/nstest"
	"signalbox/proxier"

	"signalbox/nft"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// expectedElements lists the elements that the table should have by the state.
func expectedElements(st *state) []string {
	var lines []string
	compileAll(st, func(e nft.Element) {
		lines = append(lines, allSets[e.Set].Name+" "+allSets[e.Set].ElementText(&e, st.IPFamily))
	})
	slices.Sort(lines)
	return lines
}

// writtenState is the state after a full write.
func writtenState(t *testing.T, desired *plan.Plan) *state {
	t.Helper()
	st, err := stateOf(nft.FamilyOf(plan.IPv4), desired, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	st.elements = compileAll(st, func(nft.Element) {})
	return st
}

// FuzzChange makes changes of which some are refused or undone. A model of the kernel
// follows them. The state, the model and the state after one full write must be
// equal.
func FuzzChange(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(seed, seed*7)
	}
	f.Fuzz(changeByChange)
}

// TestRandomChanges is FuzzChange with other seeds each time. `make soak` repeats it for
// 10,000 sequences.
func TestRandomChanges(t *testing.T) {
	for range 50 {
		a, b := rand.Uint64(), rand.Uint64()
		t.Run(fmt.Sprintf("%d,%d", a, b), func(t *testing.T) { changeByChange(t, a, b) })
	}
}

// changeByChange makes the changes of two seeds.
func changeByChange(t *testing.T, a, b uint64) {
	g := generator{rand.New(rand.NewPCG(a, b)), plan.Families[a%2]}
	st := newState(nft.FamilyOf(g.family))
	kernel := map[nft.ElementID]nft.Element{}
	st.elements = compileAll(st, func(e nft.Element) { kernel[e.ID()] = e })
	plan := &plan.Plan{Family: g.family, Services: map[plan.ServicePortName]*plan.ServicePort{}}
	for range 30 {
		before, old := expectedElements(st), maps.Clone(plan.Services)
		change := g.step(plan)
		conflict := g.chance(10) && stealFrontend(plan, change.Services)
		s, err := st.prepare(plan, change.Services)
		if (err != nil) != conflict {
			t.Fatalf("prepare: error %v, conflict %v", err, conflict)
		}
		if err == nil && g.chance(20) {
			st.undo(s)
			err = errors.New("undone")
		}
		if err != nil {
			if diff := cmp.Diff(before, expectedElements(st)); diff != "" {
				t.Fatalf("after an error the state is another (- before, + after):\n%s", diff)
			}
			plan.Services = old
			continue
		}
		apply(t, st, kernel, s)
		st.commit(s)
		compareModel(t, kernel, st)
		compareMeaning(t, st, plan)
	}
}

// stealFrontend gives a changed Service port a frontend of an unchanged one, if there is
// one.
func stealFrontend(desired *plan.Plan, changed []plan.ServicePortName) bool {
	thief := desired.Services[changed[0]]
	if thief == nil {
		return false
	}
	for _, name := range desired.Names() {
		sp := desired.Services[name]
		if !slices.Contains(changed, name) && len(sp.Frontends) > 0 && name.Protocol == thief.Name.Protocol {
			robbed := *thief
			robbed.Frontends = append(slices.Clone(thief.Frontends), sp.Frontends[0])
			robbed.AffinityTimeout = 0
			desired.Services[changed[0]] = &robbed
			return true
		}
	}
	return false
}

// apply makes the change in a model of the kernel, and fails where the kernel would.
func apply(t *testing.T, st *state, kernel map[nft.ElementID]nft.Element, s *pendingChange) {
	t.Helper()
	for _, e := range s.Remove {
		if kernel[e.ID()] != e {
			t.Fatalf("%s %s is removed and not there", allSets[e.Set].Name, allSets[e.Set].ElementText(&e, st.IPFamily))
		}
		delete(kernel, e.ID())
	}
	for _, e := range s.Add {
		if _, exists := kernel[e.ID()]; exists {
			t.Fatalf("%s %s is added and there already", allSets[e.Set].Name, allSets[e.Set].ElementText(&e, st.IPFamily))
		}
		kernel[e.ID()] = e
	}
}

func compareModel(t *testing.T, kernel map[nft.ElementID]nft.Element, st *state) {
	t.Helper()
	if counted := compileAll(st, func(nft.Element) {}); !reflect.DeepEqual(st.elements, counted) {
		t.Fatalf("counts of shared elements: %v, want %v", st.elements, counted)
	}
	var lines []string
	for _, e := range kernel {
		lines = append(lines, allSets[e.Set].Name+" "+allSets[e.Set].ElementText(&e, st.IPFamily))
	}
	slices.Sort(lines)
	if diff := cmp.Diff(expectedElements(st), lines); diff != "" {
		t.Fatalf("the kernel holds something else (- expected, + kernel):\n%s", diff)
	}
}

// TestChangeIsSmall counts the elements that changes of one Service write.
func TestChangeIsSmall(t *testing.T) {
	fleet := func(firstPod, n int) *plan.ServicePort {
		return conformance.FleetService(plan.IPv4, 5, firstPod, n)
	}
	sticky := func(sp *plan.ServicePort) *plan.ServicePort {
		sp.AffinityTimeout = time.Hour
		return sp
	}
	for _, test := range []struct {
		name        string
		before      *plan.ServicePort
		after       *plan.ServicePort
		remove, add int
	}{
		{"nothing", fleet(51, 10), fleet(51, 10), 0, 0},
		{"an endpoint is replaced by another", fleet(51, 10), fleet(52, 10), 1, 1},
		// The frontend's id names the chain, so it changes too.
		{"an endpoint comes", fleet(51, 10), fleet(51, 11), 1, 2},
		{"the first endpoint goes", fleet(51, 10), fleet(52, 9), 3, 2},
		{"the last endpoint goes", fleet(51, 10), fleet(51, 9), 2, 1},
		{"a sticky endpoint is replaced", sticky(fleet(51, 10)), sticky(fleet(52, 10)), 2, 2},
		{"the Service goes", fleet(51, 10), nil, 13, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			desired := conformance.Fleet(plan.IPv4, 20, 10)
			desired.Services[test.before.Name] = test.before
			st := writtenState(t, desired)
			desired.Services[test.before.Name] = test.after
			s, err := st.prepare(desired, []plan.ServicePortName{test.before.Name})
			if err != nil {
				t.Fatal(err)
			}
			if len(s.Remove) != test.remove || len(s.Add) != test.add {
				t.Errorf("%d elements removed and %d added, want %d and %d", len(s.Remove), len(s.Add), test.remove, test.add)
			}
		})
	}
}

// TestSyncOneAllocations: what a Sync allocates does not grow with the number
// of Services that do not change.
func TestSyncOneAllocations(t *testing.T) {
	allocations := func(services int) float64 {
		desired := conformance.Fleet(plan.IPv4, services, 3)
		st := writtenState(t, desired)
		round := 0
		return testing.AllocsPerRun(50, func() {
			sp := conformance.FleetService(plan.IPv4, 5, 15+round%2, 3)
			round++
			desired.Services[sp.Name] = sp
			s, err := st.prepare(desired, []plan.ServicePortName{sp.Name})
			if err != nil {
				t.Fatal(err)
			}
			st.commit(s)
		})
	}
	if few, many := allocations(10), allocations(5000); many > few*1.2 {
		t.Errorf("%v allocations with 10 Services, %v with 5,000", few, many)
	}
}

// TestRefused: the error for a Service that cannot be written names the Service and the
// object. It changes nothing.
func TestRefused(t *testing.T) {
	v6 := netip.MustParseAddr("fd00::1")
	for _, test := range []struct {
		want   string
		change func(sp *plan.ServicePort)
	}{
		{"default/svc-1:http: cluster IP fd00::1 is not an IPv4 address", func(sp *plan.ServicePort) { sp.Frontends[0].Addr = v6 }},
		{"default/svc-1:http: endpoint [fd00::1]:80 is not an IPv4 address", func(sp *plan.ServicePort) {
			sp.Frontends[0].Internal = &plan.EndpointSet{Endpoints: []plan.Endpoint{{AddrPort: netip.AddrPortFrom(v6, 80)}}}
		}},
		{"source range fd00::/64 is not of IPv4", func(sp *plan.ServicePort) {
			sp.Frontends[0].Sources = []netip.Prefix{netip.MustParsePrefix("fd00::/64")}
		}},
		{"default/svc-1:http: cluster IP 10.96.0.1:80/tcp is held by default/svc-0:http", func(sp *plan.ServicePort) {
			sp.Frontends[0].Addr = netip.MustParseAddr("10.96.0.1")
		}},
		{"timeout 1.5s is not in whole seconds", func(sp *plan.ServicePort) { sp.AffinityTimeout = 1500 * time.Millisecond }},
		{"5 different endpoint sets with session affinity", func(sp *plan.ServicePort) {
			sp.AffinityTimeout = time.Hour
			for i := range 5 {
				set := conformance.FleetService(plan.IPv4, 1, i*10, 2).Usable
				sp.Frontends = append(sp.Frontends, plan.Frontend{Port: 80, Addr: netip.AddrFrom4([4]byte{1, 1, 1, byte(i)}), Internal: set, External: set})
			}
			sp.Frontends = sp.Frontends[1:]
		}},
		{"70000 endpoints with session affinity, at most 65536", func(sp *plan.ServicePort) {
			*sp = *conformance.FleetService(plan.IPv4, 1, 0, 70_000)
			sp.AffinityTimeout = time.Hour
		}},
	} {
		t.Run(test.want, func(t *testing.T) {
			desired := conformance.Fleet(plan.IPv4, 3, 3)
			st := writtenState(t, desired)
			before := expectedElements(st)
			sp := conformance.FleetService(plan.IPv4, 1, 3, 3)
			test.change(sp)
			desired.Services[sp.Name] = sp
			// Another that is fine is in the same change.
			other := conformance.FleetService(plan.IPv4, 2, 100, 40)
			desired.Services[other.Name] = other
			_, err := st.prepare(desired, []plan.ServicePortName{other.Name, sp.Name})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			if diff := cmp.Diff(before, expectedElements(st)); diff != "" {
				t.Errorf("the refused change left traces:\n%s", diff)
			}
			if _, err := stateOf(nft.FamilyOf(plan.IPv4), desired, nil, nil); err == nil {
				t.Error("the same Service is taken when everything is written anew")
			}
		})
	}
}

// TestSwap: two Services exchange their cluster IPs in one change.
func TestSwap(t *testing.T) {
	nstest.Enter(t)
	desired := conformance.Fleet(plan.IPv4, 2, 3)
	p := newProxier(t, plan.IPv4)
	sync := func(change plan.Change) {
		t.Helper()
		if err := p.Sync(context.Background(), desired, change); err != nil {
			t.Fatal(err)
		}
	}
	sync(plan.Change{All: true})
	var names []plan.ServicePortName
	for i := range 2 {
		sp := conformance.FleetService(plan.IPv4, i, i*3, 3)
		sp.Frontends[0].Addr = conformance.FleetService(plan.IPv4, 1-i, 0, 3).Frontends[0].Addr
		desired.Services[sp.Name] = sp
		names = append(names, sp.Name)
	}
	sync(plan.Change{Services: names})
	compareKernel(t, p, desired.Node)
	compareMeaning(t, p.state, desired)
}

// TestTableLost: after other software deleted the table, the next Sync says that the
// state is unknown. One with All writes the table again.
func TestTableLost(t *testing.T) {
	nstest.Enter(t)
	desired := conformance.Fleet(plan.IPv4, 5, 3)
	p := newProxier(t, plan.IPv4)
	if err := p.Sync(context.Background(), desired, plan.Change{}); err != nil {
		t.Fatal(err)
	}
	runNft(t, "delete", "table", "ip", tableName)
	before := expectedElements(p.state)
	sp := conformance.FleetService(plan.IPv4, 2, 100, 30)
	desired.Services[sp.Name] = sp
	err := p.Sync(context.Background(), desired, plan.Change{Services: []plan.ServicePortName{sp.Name}})
	if !errors.Is(err, proxier.ErrUnknownState) || !strings.Contains(fmt.Sprint(err), sp.Name.String()) {
		t.Errorf("error %v, want one that names the Service and wraps ErrUnknownState", err)
	}
	if diff := cmp.Diff(before, expectedElements(p.state)); diff != "" {
		t.Errorf("after the error something else is remembered:\n%s", diff)
	}
	if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	compareKernel(t, p, desired.Node)
}

// TestKernelRefuses: the kernel refuses a change as a whole. The same change without the
// refused part succeeds.
func TestKernelRefuses(t *testing.T) {
	nstest.Enter(t)
	desired := conformance.Fleet(plan.IPv4, 5, 3)
	p := newProxier(t, plan.IPv4)
	if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	good, bad := conformance.FleetService(plan.IPv4, 1, 100, 40), conformance.FleetService(plan.IPv4, 9, 200, 3)
	// An element that is not ours stands in the way.
	runNft(t, "add", "element", "ip", tableName, "frontends", "{ "+bad.Frontends[0].Addr.String()+" . tcp . 80 : 1:1 }")
	desired.Services[good.Name], desired.Services[bad.Name] = good, bad
	if err := p.Sync(context.Background(), desired, plan.Change{Services: []plan.ServicePortName{good.Name, bad.Name}}); err == nil {
		t.Fatal("the change went in")
	}
	runNft(t, "delete", "element", "ip", tableName, "frontends", "{ "+bad.Frontends[0].Addr.String()+" . tcp . 80 }")
	compareKernel(t, p, desired.Node)
	if err := p.Sync(context.Background(), desired, plan.Change{Services: []plan.ServicePortName{good.Name}}); err != nil {
		t.Fatal(err)
	}
	compareKernel(t, p, desired.Node)
}

// TestUnusedChains: chains that no endpoint set uses are deleted.
func TestUnusedChains(t *testing.T) {
	nstest.Enter(t)
	desired := conformance.Fleet(plan.IPv4, 2, 3)
	p := newProxier(t, plan.IPv4)
	if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	for size := permanentChains + 1; size < 100; size++ {
		sp := conformance.FleetService(plan.IPv4, 1, 10, size)
		sp.AffinityTimeout = time.Duration(size%2) * time.Minute
		desired.Services[sp.Name] = sp
		if err := p.Sync(context.Background(), desired, plan.Change{Services: []plan.ServicePortName{sp.Name}}); err != nil {
			t.Fatal(err)
		}
		if n := len(p.state.chains); n > permanentChains+maxUnusedChains+2 {
			t.Fatalf("%d chains for two Services", n)
		}
	}
	compareKernel(t, p, desired.Node)
}

// TestContext: a Sync whose context has ended does nothing.
func TestContext(t *testing.T) {
	nstest.Enter(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	p := newProxier(t, plan.IPv4)
	if err := p.Sync(ctx, conformance.Fleet(plan.IPv4, 1, 1), plan.Change{All: true}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want context.Canceled", err)
	}
	if listing := runNft(t, "list", "ruleset"); listing != "" {
		t.Errorf("something was written:\n%s", listing)
	}
}
