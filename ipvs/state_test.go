package ipvs

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"signalbox/ipvs/internal/kernel"

	"github.com/google/go-cmp/cmp"

	"signalbox/nft"
	"signalbox/proxier/plan"
)

func TestDiff(t *testing.T) {
	w := world{plan.IPv4}
	key := func(p plan.Protocol) kernel.ServerKey { return kernel.ServerKey{Addr: w.vip(1), Port: 80, Protocol: p} }
	at := func(weights map[int]int) map[netip.AddrPort]int {
		dests := make(map[netip.AddrPort]int)
		for n, weight := range weights {
			dests[w.pods(n).Endpoints[0].AddrPort] = weight
		}
		return dests
	}
	have := func(weights map[int]int) *server { return &server{scheduler: "rr", dests: at(weights)} }
	want := func(scheduler string, serving *plan.EndpointSet, pods ...int) *wanted {
		return &wanted{scheduler: scheduler, dests: destsOf(w.pods(pods...)), serving: serving}
	}
	heavier := func(pods ...int) *wanted {
		set := w.pods(pods...)
		for i := range set.Endpoints {
			set.Endpoints[i].Weight = 5
		}
		return &wanted{scheduler: "rr", dests: destsOf(set)}
	}
	for _, test := range []struct {
		name         string
		protocol     plan.Protocol
		have         *server
		want         *wanted
		grow, shrink string
	}{
		{"new", plan.TCP, nil, want("lc", nil, 1, 2),
			"-A -t V -s lc\n-a -t V -r 1 -m -w 1\n-a -t V -r 2 -m -w 1\n", ""},
		{"as it is", plan.TCP, have(map[int]int{1: 1}), want("rr", nil, 1), "", ""},
		{"another scheduler", plan.TCP, have(map[int]int{1: 1}), want("sh", nil, 1), "-E -t V -s sh\n", ""},
		{"other weights", plan.TCP, have(map[int]int{1: 1, 2: 5, 3: 2}), heavier(1, 2, 4),
			"-e -t V -r 1 -m -w 5\n-a -t V -r 4 -m -w 5\n", "-e -t V -r 3 -m -w 0\n"},
		{"one replaced", plan.TCP, have(map[int]int{1: 1, 2: 1}), want("rr", nil, 2, 3),
			"-a -t V -r 3 -m -w 1\n", "-e -t V -r 1 -m -w 0\n"},
		{"one comes back", plan.TCP, have(map[int]int{1: 0, 2: 1}), want("rr", nil, 1, 2), "-e -t V -r 1 -m -w 1\n", ""},
		{"one still drains", plan.TCP, have(map[int]int{1: 0, 2: 1}), want("rr", nil, 2), "", ""},
		{"goes", plan.TCP, have(map[int]int{1: 1, 2: 0}), nil, "", "-e -t V -r 1 -m -w 0\n"},
		{"goes, and nothing is left", plan.TCP, have(nil), nil, "", "-D -t V\n"},
		{"was not there", plan.TCP, nil, nil, "", ""},
		{"UDP that still answers", plan.UDP, have(map[int]int{1: 1, 2: 1}), want("rr", w.pods(1), 2), "", "-e -u V -r 1 -m -w 0\n"},
		{"UDP that answers no more", plan.UDP, have(map[int]int{1: 0, 2: 1}), want("rr", w.pods(2), 2), "", "-d -u V -r 1\n"},
		{"UDP goes", plan.UDP, have(map[int]int{1: 1}), nil, "", "-d -u V -r 1\n-D -u V\n"},
		{"UDP whose server is replaced", plan.UDP, have(map[int]int{1: 1, 2: 1}),
			&wanted{scheduler: "rr", serving: w.pods(1), replaced: true}, "", "-e -u V -r 1 -m -w 0\n-d -u V -r 2\n"},
		{"UDP whose server is replaced, and nothing is left", plan.UDP, have(map[int]int{2: 1}),
			&wanted{scheduler: "rr", serving: w.pods(1), replaced: true}, "", "-d -u V -r 2\n-D -u V\n"},
		{"SCTP drains as TCP does", plan.SCTP, have(map[int]int{1: 1}), nil, "", "-e --sctp-service V -r 1 -m -w 0\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			grow, shrink := diff(test.have, test.want, key(test.protocol))
			short := strings.NewReplacer("10.96.0.1:80", "V", "10.244.1.", "", ":8080", "")
			if got := short.Replace(kernel.OpsText(grow)); got != test.grow {
				t.Errorf("before the rules: got\n%s\nwant\n%s", got, test.grow)
			}
			if got := short.Replace(kernel.OpsText(shrink)); got != test.shrink {
				t.Errorf("after the rules: got\n%s\nwant\n%s", got, test.shrink)
			}
		})
	}
}

// model is a kernel that follows every message, and refuses what the real one
// would.
type model struct {
	t        *testing.T
	servers  map[kernel.ServerKey]*server
	elements map[nft.ElementID]nft.Element
}

func (m *model) do(o kernel.Op) {
	m.t.Helper()
	id := o.Key.ID()
	s := m.servers[id]
	if (s == nil) != (o.Verb == kernel.AddServer) {
		m.t.Fatalf("%s: the server's existence is the other way round", o)
	}
	switch o.Verb {
	case kernel.AddServer:
		m.servers[id] = &server{scheduler: o.Scheduler, dests: map[netip.AddrPort]int{}}
	case kernel.SetServer:
		s.scheduler = o.Scheduler
	case kernel.AddDestination, kernel.SetDestination, kernel.RemoveDestination:
		if _, exists := s.dests[o.Destination]; exists == (o.Verb == kernel.AddDestination) {
			m.t.Fatalf("%s: the destination's existence is the other way round", o)
		}
		s.dests[o.Destination] = o.Weight
		if o.Verb == kernel.RemoveDestination {
			delete(s.dests, o.Destination)
		}
	case kernel.RemoveServer:
		delete(m.servers, id)
	}
}

func (m *model) apply(st *state, b *batch) {
	m.t.Helper()
	for _, o := range b.grow {
		m.do(o)
		st.note(o)
	}
	for _, e := range b.remove {
		k := e.ID()
		if _, there := m.elements[k]; !there {
			m.t.Fatalf("an element of %s is removed that is not there", setNames[e.Set])
		}
		delete(m.elements, k)
	}
	for _, e := range b.add {
		k := e.ID()
		if _, there := m.elements[k]; there {
			m.t.Fatalf("an element of %s is added twice", setNames[e.Set])
		}
		m.elements[k] = e
	}
	for _, a := range b.newVIPs {
		st.held[a] = true
	}
	for _, o := range b.shrink {
		m.do(o)
		st.note(o)
	}
	st.commit(b, time.Time{})
}

// inUse is what new connections meet, whatever marks it goes by.
func (m *model) inUse() string {
	var lines []string
	for key, s := range m.servers {
		if key.Mark != 0 {
			key = kernel.ServerKey{}
		}
		var dests []string
		for _, d := range sortedDests(s.dests) {
			if s.dests[d] > 0 {
				dests = append(dests, fmt.Sprint(d, "=", s.dests[d]))
			}
		}
		if len(dests) > 0 {
			lines = append(lines, fmt.Sprint(key, " ", s.scheduler, " ", dests))
		}
	}
	for k, e := range m.elements {
		data := e.Data
		if data != "" || k.Set >= affinityMembers {
			lines = append(lines, fmt.Sprintf("%s %d", setNames[k.Set], len(k.Key))) // holds a mark
			continue
		}
		lines = append(lines, fmt.Sprintf("%s %x-%x", setNames[k.Set], k.Key, k.End))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// randomService is one of few shapes, with few endpoints.
func (w world) randomService(r *rand.Rand, n int) *plan.ServicePort {
	some := func() *plan.EndpointSet {
		var numbers []int
		for n := range 5 {
			if r.IntN(2) == 0 {
				numbers = append(numbers, n+1)
			}
		}
		return w.pods(numbers...)
	}
	all, here := some(), some()
	for i := range all.Endpoints {
		all.Endpoints[i].Weight = uint16(r.IntN(4))
	}
	protocol := plan.Protocols[n%3]
	sp := w.service(fmt.Sprint("s", n), protocol, all, clusterIP(w.vip(n+1), 80, all))
	if r.IntN(2) == 0 {
		sp.Frontends = append(sp.Frontends, local(plan.LoadBalancerIP, w.external(n%3+1), uint16(80+n), all, here))
	}
	if r.IntN(2) == 0 {
		sp.Frontends = append(sp.Frontends, local(plan.NodePort, netip.Addr{}, uint16(30000+n), all, all))
	}
	sp.Scheduler = []string{"", "", "sh"}[r.IntN(3)]
	sp.AffinityTimeout = []time.Duration{0, 0, time.Hour, time.Minute}[r.IntN(4)]
	return sp
}

// TestChangesEndAsAFreshStart makes many random changes, and compares what they
// lead to with what one sync of the last plan makes.
func TestChangesEndAsAFreshStart(t *testing.T) {
	for _, family := range plan.Families {
		for seed := range uint64(20) {
			t.Run(fmt.Sprint(family, "/", seed), func(t *testing.T) {
				w, r := world{family}, rand.New(rand.NewPCG(seed, 1))
				desired := w.plan()
				p := &Proxier{IPFamily: nft.FamilyOf(family), schedulers: newSchedulerChoice("", anyScheduler)}
				grown := &model{t, map[kernel.ServerKey]*server{}, map[nft.ElementID]nft.Element{}}
				st := newState(rulesetOf(p.IPFamily, 0, plan.Node{}, nil))
				st.others = map[netip.Addr]bool{}
				for range 60 {
					names := make(map[plan.ServicePortName]bool)
					for range 1 + r.IntN(3) {
						sp := w.randomService(r, r.IntN(8))
						names[sp.Name] = true
						desired.Services[sp.Name] = sp
						if r.IntN(4) == 0 {
							delete(desired.Services, sp.Name)
						}
					}
					step(t, p, st, desired, slices.Collect(maps.Keys(names)), grown)
				}
				fresh := &model{t, map[kernel.ServerKey]*server{}, map[nft.ElementID]nft.Element{}}
				anew := newState(rulesetOf(p.IPFamily, 0, plan.Node{}, nil))
				step(t, p, anew, desired, slices.Collect(maps.Keys(desired.Services)), fresh)
				if diff := cmp.Diff(fresh.inUse(), grown.inUse()); diff != "" {
					t.Errorf("-fresh +grown:\n%s", diff)
				}
				compareStates(t, anew, st)
			})
		}
	}
}

func step(t *testing.T, p *Proxier, st *state, desired *plan.Plan, names []plan.ServicePortName, m *model) {
	t.Helper()
	slices.SortFunc(names, plan.ServicePortName.Compare)
	st.others = map[netip.Addr]bool{}
	before := func(name plan.ServicePortName) func(markKey) uint32 {
		return func(k markKey) uint32 {
			if r := st.records[name]; r != nil {
				return r.marks[k]
			}
			return 0
		}
	}
	b, err := st.stage(desired, names, p.compilerBy(st, before))
	if err != nil {
		t.Fatal(err)
	}
	m.apply(st, b)
}

// compareStates compares what two states, which came to the same plan by
// different ways, keep for it.
func compareStates(t *testing.T, want, got *state) {
	t.Helper()
	if d := cmp.Diff(len(want.uses), len(got.uses)); d != "" {
		t.Errorf("elements in use: %s", d)
	}
	if !maps.Equal(want.wanted, got.wanted) {
		t.Errorf("addresses wanted: %v, not %v", got.wanted, want.wanted)
	}
	if len(want.live) != len(got.live) {
		t.Errorf("%d virtual servers are wanted, not %d", len(got.live), len(want.live))
	}
	for a := range got.held {
		if _, leaves := got.leaving[a]; leaves == (got.wanted[a] > 0) {
			t.Errorf("%s is wanted %d times, and leaves: %v", a, got.wanted[a], leaves)
		}
	}
	for key, s := range got.servers {
		for d, weight := range s.dests {
			if _, drains := got.draining[key][d]; drains != (weight == 0) {
				t.Errorf("%s of %s has weight %d, and drains: %v", d, key, weight, drains)
			}
		}
	}
	// Every base is held by its record and by the servers under it, and no
	// other.
	bases := make(map[uint32]int)
	for _, r := range got.records {
		for _, b := range r.bases {
			bases[b]++
		}
	}
	for key := range got.servers {
		if key.Mark != 0 {
			bases[baseOf(key.Mark)]++
		}
	}
	if in := got.pool.sets.InUse() + got.pool.blocks.InUse(); in != len(bases) {
		t.Errorf("%d marks are in use, the pool says %d", len(bases), in)
	}
	for base, n := range bases {
		if uses := got.pool.of(base).Uses(base); uses != n {
			t.Errorf("mark %#x has %d uses, the pool says %d", base, n, uses)
		}
	}
}

// TestMarksStay checks that a change of endpoints keeps the marks: open
// connections are under them.
func TestMarksStay(t *testing.T) {
	w := world{plan.IPv4}
	p := &Proxier{IPFamily: nft.FamilyOf(w.family), schedulers: newSchedulerChoice("", anyScheduler)}
	st := newState(rulesetOf(p.IPFamily, 0, plan.Node{}, nil))
	m := &model{t, map[kernel.ServerKey]*server{}, map[nft.ElementID]nft.Element{}}
	service := func(all, here *plan.EndpointSet) *plan.ServicePort {
		sp := w.service("web", plan.TCP, all, clusterIP(w.vip(1), 80, all), local(plan.NodePort, netip.Addr{}, 30080, all, here))
		return sp
	}
	for _, timeout := range []time.Duration{0, time.Hour} {
		marks := func(pods ...int) map[markKey]uint32 {
			sp := service(w.pods(pods...), w.pods(pods[0]))
			sp.AffinityTimeout = timeout
			step(t, p, st, w.plan(sp), []plan.ServicePortName{sp.Name}, m)
			return st.records[sp.Name].marks
		}
		if before, after := marks(1, 2), marks(2, 3, 4); len(before) == 0 || !maps.Equal(before, after) {
			t.Errorf("marks were %v and are %v", before, after)
		}
	}
}

// TestMarkPool checks that marks come back only when all others had their turn.
func TestMarkPool(t *testing.T) {
	p := newMarkPool()
	p.blocks.StartAt(stickyLast)
	last, err := p.takeBlock()
	first, err2 := p.takeBlock()
	if last != stickyLast || first != stickySpace || err != nil || err2 != nil {
		t.Fatalf("got %#x and %#x (%v, %v)", last, first, err, err2)
	}
	p.hold(first | endpointFlag | 7)
	p.release(first)
	p.blocks.StartAt(stickySpace)
	if next, _ := p.takeBlock(); next == first {
		t.Errorf("a block is given out while a server is under it")
	}
	p.release(first | endpointFlag | 7)
	p.blocks.StartAt(stickySpace)
	if next, _ := p.takeBlock(); next != first {
		t.Errorf("a free block is not given out: %#x", next)
	}
	for m := setFirst; m < setFirst+3; m++ {
		p.hold(m)
	}
	if m, _ := p.takeSet(); m != setFirst+3 {
		t.Errorf("got %#x", m)
	}
}

// TestMarksPartWays checks that two Service ports which come by frontends of one
// do not share its mark.
func TestMarksPartWays(t *testing.T) {
	w := world{plan.IPv4}
	set := w.pods(1)
	port := func(n uint16) plan.Frontend {
		return plan.Frontend{Kind: plan.NodePort, Port: n, Internal: set, External: set}
	}
	for _, timeout := range []time.Duration{0, time.Hour} {
		one, other := w.service("one", plan.TCP, set, port(30001)), w.service("other", plan.TCP, set, port(30002))
		one.AffinityTimeout, other.AffinityTimeout = timeout, timeout
		mark := setFirst + 5
		if timeout > 0 {
			mark = stickySpace + 5<<blockBits
		}
		p := &Proxier{IPFamily: nft.FamilyOf(w.family), schedulers: newSchedulerChoice("", anyScheduler)}
		st := newState(rulesetOf(p.IPFamily, 0, plan.Node{}, nil))
		b, err := st.stage(w.plan(one, other), []plan.ServicePortName{one.Name, other.Name}, p.compiler(st, func(markKey) uint32 { return mark }))
		if err != nil {
			t.Fatal(err)
		}
		if first, second := b.new[0].bases[0], b.new[1].bases[0]; first != mark || second == mark {
			t.Errorf("the mark %#x became %#x and %#x", mark, first, second)
		}
	}
}
