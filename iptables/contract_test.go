// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// world makes plans of every shape that the contract allows.
type world struct {
	*rand.Rand
	family  plan.Family
	node    plan.Node
	podIPs  []netip.Addr // local Pods
	nodeIP  netip.Addr
	outside []netip.Addr
	claimed map[plan.FrontendKey]bool
}

const podInterface = "cali42"

func newWorld(family plan.Family, seed uint64) *world {
	w := &world{Rand: rand.New(rand.NewPCG(seed, 7)), family: family, claimed: map[plan.FrontendKey]bool{}}
	pick := func(v4, v6 string) netip.Addr {
		if family == plan.IPv6 {
			return netip.MustParseAddr(v6)
		}
		return netip.MustParseAddr(v4)
	}
	prefix := func(a netip.Addr, v4, v6 int) netip.Prefix {
		if family == plan.IPv6 {
			v4 = v6
		}
		return netip.PrefixFrom(a, v4).Masked()
	}
	w.nodeIP = pick("192.168.0.1", "fd00:192::1")
	w.podIPs = []netip.Addr{pick("10.1.0.5", "fd00:1::5"), pick("10.2.0.5", "fd00:2::5")}
	w.outside = []netip.Addr{pick("203.0.113.7", "2001:db8::7"), pick("198.51.100.9", "2001:db8:1::9")}
	pods := []netip.Prefix{prefix(w.podIPs[0], 16, 64), prefix(w.podIPs[1], 16, 64)}
	switch w.IntN(5) {
	case 0: // cannot be told apart
	case 1:
		w.node.LocalPods.Prefixes = pods[:1]
	case 2:
		w.node.LocalPods.Prefixes = pods
	case 3:
		w.node.LocalPods.Interface = podInterface
	case 4:
		w.node.LocalPods.InterfacePrefix = "cali"
	}
	w.node.NodePortAddrs.All = w.IntN(2) == 0
	if !w.node.NodePortAddrs.All {
		w.node.NodePortAddrs.Addrs = []netip.Addr{w.nodeIP}
	}
	return w
}

func (w *world) addr(net, n int) netip.Addr {
	if w.family == plan.IPv6 {
		return netip.MustParseAddr(fmt.Sprintf("fd00:%x::%x", net, n))
	}
	return netip.AddrFrom4([4]byte{10, byte(net), byte(n >> 8), byte(n)})
}

func (w *world) set(limit int) *plan.EndpointSet {
	s := &plan.EndpointSet{}
	for range w.IntN(limit + 1) {
		s.Endpoints = append(s.Endpoints, plan.Endpoint{
			AddrPort:   netip.AddrPortFrom(w.addr(128, 1+w.IntN(200)), uint16(8000+w.IntN(3))),
			MayHairpin: w.IntN(4) == 0,
		})
	}
	slices.SortFunc(s.Endpoints, func(a, b plan.Endpoint) int { return a.AddrPort.Compare(b.AddrPort) })
	s.Endpoints = slices.CompactFunc(s.Endpoints, func(a, b plan.Endpoint) bool { return a.AddrPort == b.AddrPort })
	return s
}

// service makes one ServicePort whose frontends nobody else has.
func (w *world) service(n int) *plan.ServicePort {
	sp := &plan.ServicePort{Name: plan.ServicePortName{
		ServiceName: plan.ServiceName{Namespace: "ns", Name: fmt.Sprintf("s%d", n)},
		Port:        "p", Protocol: plan.Protocols[w.IntN(3)],
	}}
	if w.IntN(3) == 0 {
		sp.AffinityTimeout = 90 * time.Second
	}
	if w.IntN(6) == 0 {
		sp.HealthCheckNodePort = uint16(40000 + n)
	}
	sets := []*plan.EndpointSet{w.set(6), w.set(3)}
	if w.IntN(12) == 0 {
		sets[0] = w.set(300)
	}
	sp.Usable = sets[0]
	for range w.IntN(5) {
		f := plan.Frontend{
			Kind: plan.FrontendKind(w.IntN(4)), Port: uint16(80 + w.IntN(40)),
			Internal: sets[w.IntN(2)], External: sets[w.IntN(2)],
			WhenEmpty: plan.Verdict(w.IntN(2)), Masquerade: plan.TrafficSources(w.IntN(8)),
		}
		if f.Kind == plan.NodePort {
			f.Port += 30000
		} else {
			f.Addr = w.addr(96, 1+w.IntN(8)*1000+w.IntN(30))
		}
		switch w.IntN(6) {
		case 0:
			f.Sources = []netip.Prefix{netip.PrefixFrom(w.outside[0], w.outside[0].BitLen())}
		case 1:
			f.Sources = []netip.Prefix{}
		}
		if key := f.Key(sp.Name.Protocol); !w.claimed[key] {
			w.claimed[key] = true
			sp.Frontends = append(sp.Frontends, f)
		}
	}
	return sp
}

func (w *world) plan(services int) *plan.Plan {
	plan := &plan.Plan{Family: w.family, Node: w.node, Services: map[plan.ServicePortName]*plan.ServicePort{}}
	for n := range services {
		sp := w.service(n)
		plan.Services[sp.Name] = sp
	}
	return plan
}

// packets are one from each traffic source to the frontend.
func (w *world) packets(f *plan.Frontend, proto plan.Protocol) map[packet]plan.TrafficSources {
	out := map[packet]plan.TrafficSources{}
	add := func(src netip.Addr, in string, from plan.TrafficSources) {
		p := packet{src: src, dst: f.Addr, proto: proto, dport: f.Port, in: in, srcLocal: from == plan.FromNode}
		if f.Kind == plan.NodePort {
			p.dst, p.dstLocal = w.nodeIP, true
		}
		out[p] = from
	}
	l := w.node.LocalPods
	for i, src := range w.podIPs {
		from := plan.FromOutside
		if l.Interface != "" || l.InterfacePrefix != "" || i < len(l.Prefixes) {
			from = plan.FromPods
		}
		add(src, podInterface, from)
	}
	add(w.nodeIP, "", plan.FromNode)
	for _, src := range w.outside {
		add(src, "eth0", plan.FromOutside)
	}
	return out
}

// expected is what the Frontend says of a connection from that traffic source.
func expected(f *plan.Frontend, from plan.TrafficSources, src netip.Addr) outcomes {
	if f.Sources != nil && !slices.ContainsFunc(f.Sources, func(p netip.Prefix) bool { return p.Contains(src) }) {
		return outcomes{"DROP": 1}
	}
	set := f.Internal
	if from == plan.FromOutside {
		set = f.External
	}
	if set.Len() == 0 {
		return outcomes{map[plan.Verdict]string{plan.Drop: "DROP", plan.Reject: "REJECT"}[f.WhenEmpty]: 1}
	}
	out := outcomes{}
	for _, e := range set.Endpoints {
		mark := ""
		if f.Masquerade&from != 0 || e.MayHairpin && e.Addr() == src {
			mark = "masqueraded "
		}
		out[mark+"-> "+e.AddrPort.String()] = 1 / float64(set.Len())
	}
	return out
}

func (o outcomes) near(want outcomes) bool {
	if !slices.Equal(o.keys(), want.keys()) {
		return false
	}
	for key, p := range o {
		if math.Abs(p-want[key]) > 1e-6 {
			return false
		}
	}
	return true
}

// TestEveryFrontendDoesWhatItSays takes packets from every traffic source to every
// frontend of random plans and compares what the rules do with what the
// Frontend says.
func TestEveryFrontendDoesWhatItSays(t *testing.T) {
	opts := proxier.Options{MasqueradeMark: proxier.DefaultMasqueradeMark}
	for seed := range uint64(60) {
		opts.Family = plan.Families[seed%2]
		w := newWorld(opts.Family, seed)
		plan := w.plan(1 + w.IntN(60))
		input, err := new(Dataplane).Render(opts, plan)
		if err != nil {
			t.Fatal(err)
		}
		m := newModel()
		m.mustApply(t, input)
		for _, sp := range plan.Services {
			for i := range sp.Frontends {
				f := &sp.Frontends[i]
				for p, from := range w.packets(f, sp.Name.Protocol) {
					want := expected(f, from, p.src)
					if got, _ := m.fate(p); !got.near(want) {
						t.Fatalf("seed %d: %s %s\nfrontend %+v, local Pods %+v\npacket %+v from traffic source %v:\ngot  %v\nwant %v\n%s",
							seed, sp.Name, f.Kind, f, w.node.LocalPods, p, from, got, want, input)
					}
				}
			}
		}
	}
}

func TestHairpinIsMasqueraded(t *testing.T) {
	w := newWorld(plan.IPv4, 1)
	set := &plan.EndpointSet{Endpoints: []plan.Endpoint{
		{AddrPort: netip.MustParseAddrPort("10.1.0.5:80"), MayHairpin: true},
		{AddrPort: netip.MustParseAddrPort("10.9.0.5:80")},
	}}
	sp := w.service(1)
	sp.Name.Protocol, sp.AffinityTimeout = plan.TCP, 0
	sp.Frontends = []plan.Frontend{{Addr: netip.MustParseAddr("10.96.0.1"), Port: 80, Internal: set, External: set}}
	m := newModel()
	m.mustApply(t, rendered(t, planOf(plan.IPv4, sp)))
	got, _ := m.fate(packet{src: netip.MustParseAddr("10.1.0.5"), dst: netip.MustParseAddr("10.96.0.1"), proto: plan.TCP, dport: 80})
	if want := (outcomes{"masqueraded -> 10.1.0.5:80": .5, "-> 10.9.0.5:80": .5}); !got.near(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestAffinityIsPerServicePort: a client that the cluster chain sent to an
// endpoint is sent there by the local chain too.
func TestAffinityIsPerServicePort(t *testing.T) {
	e := func(s string) plan.Endpoint { return plan.Endpoint{AddrPort: netip.MustParseAddrPort(s)} }
	cluster := &plan.EndpointSet{Endpoints: []plan.Endpoint{e("10.1.0.1:80"), e("10.1.0.2:80"), e("10.2.0.1:80")}}
	local := &plan.EndpointSet{Endpoints: cluster.Endpoints[:2]}
	sp := &plan.ServicePort{
		Name:            plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "ns", Name: "web"}, Protocol: plan.TCP},
		AffinityTimeout: 3*time.Hour + 100*time.Millisecond,
		Frontends: []plan.Frontend{
			{Addr: netip.MustParseAddr("10.96.0.1"), Port: 80, Internal: cluster, External: cluster},
			{Kind: plan.LoadBalancerIP, Addr: netip.MustParseAddr("192.0.2.1"), Port: 80, Internal: cluster, External: local},
		},
	}
	m := newModel()
	m.mustApply(t, rendered(t, planOf(plan.IPv4, sp)))
	for _, f := range sp.Frontends {
		p := packet{src: netip.MustParseAddr("203.0.113.7"), dst: f.Addr, proto: plan.TCP, dport: 80, known: endpointChain(sp.Name, cluster.Endpoints[1])}
		if got, _ := m.fate(p); !got.near(outcomes{"-> 10.1.0.2:80": 1}) {
			t.Errorf("%s: a known client goes to %v", f.Kind, got)
		}
	}
}

// TestLargeSetsAreNested bounds the rules that a connection to a Service of
// many endpoints can pass.
func TestLargeSetsAreNested(t *testing.T) {
	set := &plan.EndpointSet{}
	for i := range 10000 {
		addr := netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})
		set.Endpoints = append(set.Endpoints, plan.Endpoint{AddrPort: netip.AddrPortFrom(addr, 80)})
	}
	sp := &plan.ServicePort{
		Name:      plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "ns", Name: "big"}, Protocol: plan.UDP},
		Frontends: []plan.Frontend{{Addr: netip.MustParseAddr("10.96.0.1"), Port: 53, Internal: set, External: set}},
	}
	m := newModel()
	m.mustApply(t, rendered(t, planOf(plan.IPv4, sp)))
	longest := 0
	for _, rules := range m[nat] {
		longest = max(longest, len(rules))
	}
	if longest > 2*maxRun {
		t.Errorf("a chain has %d rules", longest)
	}
	got, _ := m.fate(packet{src: netip.MustParseAddr("203.0.113.7"), dst: netip.MustParseAddr("10.96.0.1"), proto: plan.UDP, dport: 53})
	if !got.near(expected(&sp.Frontends[0], plan.FromOutside, netip.MustParseAddr("203.0.113.7"))) {
		t.Errorf("%d endpoints are reached, not all with the same probability", len(got))
	}
}

func planOf(family plan.Family, services ...*plan.ServicePort) *plan.Plan {
	plan := &plan.Plan{Family: family, Services: map[plan.ServicePortName]*plan.ServicePort{}}
	for _, sp := range services {
		plan.Services[sp.Name] = sp
	}
	return plan
}

func rendered(t testing.TB, plan *plan.Plan) string {
	t.Helper()
	input, err := new(Dataplane).Render(proxier.Options{Family: plan.Family, MasqueradeMark: proxier.DefaultMasqueradeMark}, plan)
	if err != nil {
		t.Fatal(err)
	}
	return input
}
