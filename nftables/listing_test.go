// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"signalbox/internal/nstest"
	"signalbox/nft"
	"signalbox/proxier"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

var update = flag.Bool("update", false, "write golden files anew")

// blocks takes a listing apart: the lines of each set and chain by its first
// line. Elements come sorted, one to a line.
func blocks(t testing.TB, listing string) map[string][]string {
	t.Helper()
	result := map[string][]string{}
	head, elements := "", ""
	for line := range strings.Lines(listing) {
		line = strings.TrimSpace(line)
		switch {
		case elements != "" || strings.HasPrefix(line, "elements = {"):
			elements += line + " "
			if !strings.HasSuffix(line, "}") {
				continue
			}
			elements = strings.TrimSuffix(strings.TrimPrefix(elements, "elements = {"), "} ")
			list := strings.Split(elements, ",")
			for i := range list {
				list[i] = strings.TrimSpace(list[i])
			}
			slices.Sort(list)
			result[head] = append(result[head], list...)
			elements = ""
		case strings.HasSuffix(line, "{"):
			head = line
			result[head] = []string{}
		case line != "" && line != "}":
			result[head] = append(result[head], line)
		}
	}
	if len(result) < int(setCount) {
		t.Fatalf("a listing of %d blocks:\n%s", len(result), listing)
	}
	return result
}

// compareKernel fails unless nft lists exactly what the Proxier believes to be
// in the kernel.
func compareKernel(t testing.TB, p *Proxier, node plan.Node) {
	t.Helper()
	want := blocks(t, rulesetOf(p.IPFamily, p.mark, node).render(p.state))
	got := blocks(t, runNft(t, "list", "table", p.Word, tableName))
	// Packets fill the affinity map, so only its declaration is compared.
	head := "map " + allSets[affinity].Name + " {"
	got[head] = slices.DeleteFunc(got[head], func(line string) bool { return strings.Contains(line, " expires ") })
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("the kernel's table differs (- believed, + listed):\n%s", diff)
	}
}

// generator makes plans and changes at random. Services share the frontends
// of a small pool only through their own numbers, as resolved plans do.
type generator struct {
	*rand.Rand
	family plan.Family
}

func (g generator) addr(a, b int) netip.Addr {
	if g.family == plan.IPv6 {
		return netip.MustParseAddr(fmt.Sprintf("fd00:%x::%x", a+1, b+1))
	}
	return netip.AddrFrom4([4]byte{10, byte(a), byte(b >> 8), byte(b)})
}

func (g generator) chance(percent int) bool { return g.IntN(100) < percent }

func (g generator) set() *plan.EndpointSet {
	s := &plan.EndpointSet{}
	n := g.IntN(6)
	if g.chance(5) {
		n = 20 + g.IntN(30)
	}
	for _, i := range g.Perm(60)[:n] {
		s.Endpoints = append(s.Endpoints, plan.Endpoint{
			AddrPort: netip.AddrPortFrom(g.addr(128, i), 8080+uint16(i%2)), MayHairpin: i%3 == 0,
		})
	}
	slices.SortFunc(s.Endpoints, func(a, b plan.Endpoint) int { return a.AddrPort.Compare(b.AddrPort) })
	return s
}

func (g generator) prefix() netip.Prefix {
	return netip.PrefixFrom(g.addr(g.IntN(3), 0), g.family.HostBits()-g.IntN(g.family.HostBits()+1)).Masked()
}

func (g generator) prefixes() []netip.Prefix {
	list := []netip.Prefix{}
	for range g.IntN(4) {
		list = append(list, g.prefix())
	}
	return list
}

// port is a random Service port number n, whose frontends no other number has.
func (g generator) port(n int) *plan.ServicePort {
	sp := &plan.ServicePort{Name: plan.ServicePortName{
		ServiceName: plan.ServiceName{Namespace: "test", Name: fmt.Sprintf("svc-%d", n)},
		Port:        "p", Protocol: plan.Protocols[n%3],
	}}
	if g.chance(40) {
		sp.AffinityTimeout = []time.Duration{10 * time.Second, 3*time.Hour + 5*time.Second}[g.IntN(2)]
	}
	sets := []*plan.EndpointSet{g.set(), g.set(), g.set()}
	for i := range g.IntN(5) {
		f := plan.Frontend{
			Kind: plan.FrontendKind(i), Addr: g.addr(96+i, n), Port: uint16(80 + n),
			Internal: sets[0], External: sets[g.IntN(len(sets))],
			WhenEmpty: plan.Verdict(g.IntN(2)), Masquerade: plan.TrafficSources(g.IntN(8)),
		}
		if i == int(plan.NodePort) {
			f.Addr = netip.Addr{}
		}
		if g.chance(30) {
			f.Sources = g.prefixes()
		}
		sp.Frontends = append(sp.Frontends, f)
	}
	return sp
}

func (g generator) node() plan.Node {
	n := plan.Node{ServiceCIDRs: g.prefixes()}
	switch g.IntN(4) {
	case 0:
		n.LocalPods.Prefixes = g.prefixes()
	case 1:
		n.LocalPods.Interface = "cni0"
	case 2:
		n.LocalPods.InterfacePrefix = "veth"
	}
	n.NodePortAddrs.All, n.LocalhostNodePorts = g.chance(30), g.chance(50)
	for i := range g.IntN(4) {
		s := plan.RouteSource{Link: fmt.Sprintf("eth%d", g.IntN(2)), Destination: g.prefix()}
		if g.chance(70) {
			s.Source = g.addr(192, i)
		}
		n.RouteSources = append(n.RouteSources, s)
	}
	for i := range g.IntN(3) {
		n.NodePortAddrs.Addrs = append(n.NodePortAddrs.Addrs, g.addr(192, i))
	}
	return n
}

// step changes the plan at random and says how.
func (g generator) step(desired *plan.Plan) plan.Change {
	var change plan.Change
	for _, n := range g.Perm(12)[:1+g.IntN(3)] {
		sp := g.port(n)
		change.Services = append(change.Services, sp.Name)
		switch old := desired.Services[sp.Name]; {
		case g.chance(25):
			delete(desired.Services, sp.Name)
		case g.chance(20) && old != nil:
			again := *old // the same in a new value
			desired.Services[sp.Name] = &again
		default:
			desired.Services[sp.Name] = sp
		}
	}
	if g.chance(20) {
		change.Node, desired.Node = true, g.node()
	}
	return change
}

// TestKernelFollows: after any changes the kernel has what the Proxier
// expects, as nft lists it, and a table that is written anew means the same.
func TestKernelFollows(t *testing.T) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) {
			nstest.Enter(t)
			g := generator{rand.New(rand.NewPCG(1, uint64(f))), f}
			desired := &plan.Plan{Family: f, Node: g.node(), Services: map[plan.ServicePortName]*plan.ServicePort{}}
			p := newProxier(t, f)
			for i := range 150 {
				change := g.step(desired)
				if err := p.Sync(context.Background(), desired, change); err != nil {
					t.Fatalf("step %d: %v", i, err)
				}
				if i%5 == 0 {
					compareKernel(t, p, desired.Node)
				}
				compareMeaning(t, p.state, desired)
				compareCounts(t, p, desired.Node)
			}
			if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
				t.Fatal(err)
			}
			compareKernel(t, p, desired.Node)
			compareCounts(t, p, desired.Node)
		})
	}
}

// compareCounts fails unless Counts are what is believed to be in the kernel.
func compareCounts(t testing.TB, p *Proxier, node plan.Node) {
	t.Helper()
	want := map[string]int{}
	rules := rulesetOf(p.IPFamily, p.mark, node)
	for _, c := range rules.chains(p.state) {
		want["chain"]++
		want["rule"] += len(c.Rules)
	}
	want["element"] += len(rules.NodeElements())
	compileAll(p.state, func(nft.Element) { want["element"]++ })
	got := map[string]int{}
	for _, k := range p.Counts() {
		got[k.Kind] = k.Count
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("Counts (- held, + counted):\n%s", diff)
	}
}

// compareMeaning fails unless a state of many changes means the same as one
// made at once.
func compareMeaning(t testing.TB, st *state, plan *plan.Plan) {
	t.Helper()
	fresh, err := stateOf(st.IPFamily, plan, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(meaning(t, fresh), meaning(t, st)); diff != "" {
		t.Fatalf("the table means something else than one written anew (- anew, + after the changes):\n%s", diff)
	}
}

// meaning resolves a state's ids: each frontend with the endpoints that a
// packet can be sent to, and all elements that hold no id as they are.
func meaning(t testing.TB, st *state) []string {
	t.Helper()
	byKey := map[nft.SetID]map[string]nft.Element{}
	compileAll(st, func(e nft.Element) {
		if byKey[e.Set] == nil {
			byKey[e.Set] = map[string]nft.Element{}
		}
		if twice, seen := byKey[e.Set][e.Key+e.End]; seen {
			t.Fatalf("two elements of %s share a key: %s and %s", allSets[e.Set].Name, allSets[twice.Set].ElementText(&twice, st.IPFamily), allSets[e.Set].ElementText(&e, st.IPFamily))
		}
		byKey[e.Set][e.Key+e.End] = e
	})
	chains := map[uint32]pickChain{}
	for c, n := range st.chains {
		chains[n] = c
	}
	var lines []string
	for set, elements := range byKey {
		for _, e := range elements {
			switch set {
			case pickChains, endpoints, affinitySlots, affinityEndpoints, affinityEndpoints + 1, affinityEndpoints + 2, affinityEndpoints + 3:
			case frontends, internalFrontends, nodePorts, internalNodePorts:
				id := bigEndian(e.Data)
				lines = append(lines, fmt.Sprintf("%s %s: %s", allSets[set].Name, nft.FieldsText(st.IPFamily, allSets[set].Key, e.Key, ""),
					strings.Join(reach(t, st, byKey, chains, id), " ")))
			default:
				lines = append(lines, allSets[set].Name+" "+allSets[e.Set].ElementText(&e, st.IPFamily))
			}
		}
	}
	slices.Sort(lines)
	return lines
}

func bigEndian(s string) uint32 {
	return uint32(s[0])<<24 | uint32(s[1])<<16 | uint32(s[2])<<8 | uint32(s[3])
}

// reach does for an id what the rules do for a packet: it lists the endpoints
// in all slots of the chain.
func reach(t testing.TB, st *state, byKey map[nft.SetID]map[string]nft.Element, chains map[uint32]pickChain, id uint32) []string {
	t.Helper()
	if id == noSet {
		return nil
	}
	c, known := chains[id&chainMask]
	if !known {
		t.Fatalf("id %s leads to no chain", nft.ClassIDText(id))
	}
	list := []string{fmt.Sprintf("affinity %s", c.timeout)}
	for slot := range c.size {
		var e nft.Element
		if c.timeout == 0 {
			e, known = byKey[endpoints][slotKey(id&^chainMask, slot)]
		} else if e, known = byKey[affinitySlots][slotKey(id&rangeMask(c.large)|uint32(c.setIndex), slot)]; known {
			e, known = byKey[affinityEndpoints+nft.SetID(c.setIndex)][nft.MarkKey(bigEndian(e.Data))]
		}
		if !known {
			t.Fatalf("id %s: slot %d of %s leads nowhere", nft.ClassIDText(id), slot, c.name())
		}
		list = append(list, nft.FieldsText(st.IPFamily, addrPort, e.Data, ""))
	}
	slices.Sort(list)
	return list
}

// examplePlan has a Service of every sort.
func examplePlan(f plan.Family) *plan.Plan {
	g := generator{family: f}
	vip := func(n int) netip.Addr { return g.addr(96, n) }
	pods := func(numbers ...int) *plan.EndpointSet {
		s := &plan.EndpointSet{}
		for _, n := range numbers {
			s.Endpoints = append(s.Endpoints, plan.Endpoint{AddrPort: netip.AddrPortFrom(g.addr(128, n), 8080), MayHairpin: n < 10})
		}
		return s
	}
	desired := &plan.Plan{Family: f, Services: map[plan.ServicePortName]*plan.ServicePort{}, Node: plan.Node{
		LocalPods:     plan.LocalPods{Prefixes: []netip.Prefix{netip.PrefixFrom(g.addr(128, 0), f.HostBits()*3/4).Masked()}},
		NodePortAddrs: plan.NodePortAddrs{Addrs: []netip.Addr{g.addr(192, 1)}},
		ServiceCIDRs:  []netip.Prefix{netip.PrefixFrom(g.addr(96, 0), f.HostBits()/2).Masked()},

		LocalhostNodePorts: true,
	}}
	outsiders := plan.FromNode | plan.FromOutside
	all, local, none := pods(1, 20, 30), pods(1), pods()
	office := netip.PrefixFrom(g.addr(50, 0), f.HostBits()-8)
	put(desired, "web", plan.TCP, 0,
		plan.Frontend{Addr: vip(1), Port: 80, Internal: all, External: all, Masquerade: outsiders},
		plan.Frontend{Kind: plan.LoadBalancerIP, Addr: g.addr(198, 1), Port: 80, Internal: all, External: local, WhenEmpty: plan.Drop,
			Masquerade: plan.FromNode, Sources: []netip.Prefix{office}},
		plan.Frontend{Kind: plan.NodePort, Port: 30080, Internal: all, External: local, WhenEmpty: plan.Drop, Masquerade: plan.FromNode})
	dns := pods(21, 31)
	put(desired, "dns", plan.UDP, 0, plan.Frontend{Addr: vip(2), Port: 53, Internal: dns, External: dns, Masquerade: outsiders})
	cart := pods(2, 22)
	put(desired, "cart", plan.TCP, 3*time.Hour,
		plan.Frontend{Addr: vip(3), Port: 443, Internal: cart, External: cart, Masquerade: outsiders},
		plan.Frontend{Kind: plan.NodePort, Port: 30443, Internal: cart, External: cart, Masquerade: plan.AnySource})
	put(desired, "empty", plan.TCP, 0, plan.Frontend{Addr: vip(4), Port: 80, Internal: none, External: none, Masquerade: outsiders})
	remote := pods(32)
	put(desired, "elsewhere", plan.TCP, 0,
		plan.Frontend{Addr: vip(5), Port: 80, Internal: remote, External: remote, Masquerade: outsiders},
		plan.Frontend{Kind: plan.NodePort, Port: 30081, Internal: remote, External: none, WhenEmpty: plan.Drop, Masquerade: plan.FromNode})
	return desired
}

// TestRender compares the rendered plan with a golden file and with the
// kernel's own listing.
func render(t *testing.T, opts proxier.Options, desired *plan.Plan) string {
	t.Helper()
	text, err := Dataplane{}.Render(opts, desired)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestRender(t *testing.T) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) {
			desired, opts := examplePlan(f), testOptions
			opts.Family = f
			got := render(t, opts, desired)
			golden := filepath.Join("testdata", "render-"+f.String()+".nft")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("rendered (- %s, +):\n%s", golden, diff)
			}
			nstest.Enter(t)
			p := newProxier(t, f)
			if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
				t.Fatal(err)
			}
			listed := blocks(t, runNft(t, "list", "ruleset"))
			if diff := cmp.Diff(blocks(t, got), listed); diff != "" {
				t.Errorf("nft lists something else (- rendered, + listed):\n%s", diff)
			}
		})
	}
}

// TestRenderRefused: a plan that cannot be programmed is an error.
func TestRenderRefused(t *testing.T) {
	desired := examplePlan(plan.IPv4)
	opts := testOptions
	opts.Family = plan.IPv6
	if got, err := (Dataplane{}).Render(opts, desired); err == nil || !strings.HasPrefix(err.Error(), "node: prefix 10.") {
		t.Errorf("rendered %q, error %v", got, err)
	}
}

// TestNothingIsLost counts in the kernel what a large plan makes.
func TestNothingIsLost(t *testing.T) {
	nstest.Enter(t)
	desired := conformance.Fleet(plan.IPv4, 10_000, 10)
	p := newProxier(t, plan.IPv4)
	if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	want := map[nft.SetID]int{frontends: 10_000, masquerade: 10_000, clusterIPs: 10_000, endpoints: 100_000, hairpin: 1000}
	for set, n := range want {
		elements, err := p.table.Read(set)
		if err != nil {
			t.Fatal(err)
		}
		if len(elements) != n {
			t.Errorf("%d elements in %s, want %d", len(elements), allSets[set].Name, n)
		}
	}
	table, err := p.table.Inspect()
	if err != nil {
		t.Fatal(err)
	}
	small := rulesetOf(p.IPFamily, p.mark, desired.Node).chains(newState(p.IPFamily))
	if len(table.Chains) != len(small) {
		t.Errorf("%d chains with 10,000 Services, %d with none", len(table.Chains), len(small))
	}
}

// TestLongNames: names that no API server lets through reach the listing as
// something readable.
func TestLongNames(t *testing.T) {
	nstest.Enter(t)
	desired := conformance.Fleet(plan.IPv4, 0, 0)
	set := &plan.EndpointSet{Endpoints: []plan.Endpoint{{AddrPort: netip.MustParseAddrPort("10.0.0.1:80")}}}
	for i, name := range []string{"", strings.Repeat("long", 100), "quote\" \\ new\nline \xff ü", "{ }, ; # $x"} {
		desired.Services[plan.ServicePortName{ServiceName: plan.ServiceName{Name: name}}] = &plan.ServicePort{
			Name:      plan.ServicePortName{ServiceName: plan.ServiceName{Name: name}, Protocol: plan.TCP},
			Frontends: []plan.Frontend{{Addr: netip.AddrFrom4([4]byte{10, 96, 0, byte(i)}), Port: 1, Internal: set, External: set}},
		}
	}
	p := newProxier(t, plan.IPv4)
	if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	listing := runNft(t, "list", "map", "ip", tableName, "frontends")
	for _, want := range []string{`"/"`, `"/quote? ? new?line ? ?"`, `"/{ }, ; # $x"`, strings.Repeat("long", 31) + "lo\""} {
		if !strings.Contains(listing, want) {
			t.Errorf("no comment %s in:\n%s", want, listing)
		}
	}
}
