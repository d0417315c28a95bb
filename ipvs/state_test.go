// SPDX-License-Identifier: Apache-2.0

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
	at := func(weights map[int]int32) map[netip.AddrPort]forwarding {
		dests := make(map[netip.AddrPort]forwarding)
		for n, weight := range weights {
			dests[w.pods(n).Endpoints[0].AddrPort] = forwarding{weight: weight}
		}
		return dests
	}
	have := func(weights map[int]int32) *server { return &server{scheduler: "rr", dests: at(weights)} }
	want := func(scheduler string, serving *plan.EndpointSet, pods ...int) *desiredServer {
		return &desiredServer{scheduler: scheduler, dests: destinations(w.pods(pods...)), usable: serving}
	}
	heavier := func(pods ...int) *desiredServer {
		set := w.pods(pods...)
		for i := range set.Endpoints {
			set.Endpoints[i].Weight = 5
		}
		return &desiredServer{scheduler: "rr", dests: destinations(set)}
	}
	for _, test := range []struct {
		name                string
		protocol            plan.Protocol
		have                *server
		want                *desiredServer
		additions, removals string
	}{
		{"new", plan.TCP, nil, want("lc", nil, 1, 2),
			"-A -t V -s lc\n-a -t V -r 1 -m -w 1\n-a -t V -r 2 -m -w 1\n", ""},
		{"as it is", plan.TCP, have(map[int]int32{1: 1}), want("rr", nil, 1), "", ""},
		{"another scheduler", plan.TCP, have(map[int]int32{1: 1}), want("sh", nil, 1), "-E -t V -s sh\n", ""},
		{"other weights", plan.TCP, have(map[int]int32{1: 1, 2: 5, 3: 2}), heavier(1, 2, 4),
			"-e -t V -r 1 -m -w 5\n-a -t V -r 4 -m -w 5\n", "-e -t V -r 3 -m -w 0\n"},
		{"one replaced", plan.TCP, have(map[int]int32{1: 1, 2: 1}), want("rr", nil, 2, 3),
			"-a -t V -r 3 -m -w 1\n", "-e -t V -r 1 -m -w 0\n"},
		{"one comes back", plan.TCP, have(map[int]int32{1: 0, 2: 1}), want("rr", nil, 1, 2), "-e -t V -r 1 -m -w 1\n", ""},
		{"one still drains", plan.TCP, have(map[int]int32{1: 0, 2: 1}), want("rr", nil, 2), "", ""},
		{"goes", plan.TCP, have(map[int]int32{1: 1, 2: 0}), nil, "", "-e -t V -r 1 -m -w 0\n"},
		{"goes, and nothing is left", plan.TCP, have(nil), nil, "", "-D -t V\n"},
		{"was not there", plan.TCP, nil, nil, "", ""},
		{"UDP that still answers", plan.UDP, have(map[int]int32{1: 1, 2: 1}), want("rr", w.pods(1), 2), "", "-e -u V -r 1 -m -w 0\n"},
		{"UDP that answers no more", plan.UDP, have(map[int]int32{1: 0, 2: 1}), want("rr", w.pods(2), 2), "", "-d -u V -r 1\n"},
		{"UDP goes", plan.UDP, have(map[int]int32{1: 1}), nil, "", "-d -u V -r 1\n-D -u V\n"},
		{"UDP whose server is replaced", plan.UDP, have(map[int]int32{1: 1, 2: 1}),
			&desiredServer{scheduler: "rr", usable: w.pods(1), replaced: true}, "", "-e -u V -r 1 -m -w 0\n-d -u V -r 2\n"},
		{"UDP whose server is replaced, and nothing is left", plan.UDP, have(map[int]int32{2: 1}),
			&desiredServer{scheduler: "rr", usable: w.pods(1), replaced: true}, "", "-d -u V -r 2\n-D -u V\n"},
		{"SCTP drains as TCP does", plan.SCTP, have(map[int]int32{1: 1}), nil, "", "-e --sctp-service V -r 1 -m -w 0\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := &batch{}
			b.compareServer(key(test.protocol), test.have, test.want)
			short := strings.NewReplacer("10.96.0.1:80", "V", "10.244.1.", "", ":8080", "")
			if got := short.Replace(kernel.OpsText(b.additions)); got != test.additions {
				t.Errorf("before the rules: got\n%s\nwant\n%s", got, test.additions)
			}
			if got := short.Replace(kernel.OpsText(b.removals)); got != test.removals {
				t.Errorf("after the rules: got\n%s\nwant\n%s", got, test.removals)
			}
		})
	}
}

// model is a kernel that executes each message, and fails the test where the real kernel would
// refuse.
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
		m.servers[id] = &server{scheduler: o.Scheduler, dests: map[netip.AddrPort]forwarding{}}
	case kernel.SetServer:
		s.scheduler = o.Scheduler
	case kernel.AddDestination, kernel.SetDestination, kernel.RemoveDestination:
		if _, exists := s.dests[o.Destination]; exists == (o.Verb == kernel.AddDestination) {
			m.t.Fatalf("%s: the destination's existence is the other way round", o)
		}
		s.dests[o.Destination] = forwarding{int32(o.Weight), o.Method}
		if o.Verb == kernel.RemoveDestination {
			delete(s.dests, o.Destination)
		}
	case kernel.RemoveServer:
		delete(m.servers, id)
	}
}

func (m *model) apply(st *state, b *batch) {
	m.t.Helper()
	for _, o := range b.additions {
		m.do(o)
		st.executed(o, time.Time{})
	}
	for _, e := range b.Remove {
		k := e.ID()
		if _, there := m.elements[k]; !there {
			m.t.Fatalf("an element of %s is removed that is not there", setNames[e.Set])
		}
		delete(m.elements, k)
	}
	for _, e := range b.Add {
		k := e.ID()
		if _, there := m.elements[k]; there {
			m.t.Fatalf("an element of %s is added twice", setNames[e.Set])
		}
		m.elements[k] = e
	}
	for _, a := range b.newAddrs {
		st.onDevice[a] = true
	}
	for _, o := range b.removals {
		m.do(o)
		st.executed(o, time.Time{})
	}
	st.commit(b, time.Time{})
}

// reachable lists what new connections meet, without the numbers of marks.
func (m *model) reachable() string {
	var lines []string
	for key, s := range m.servers {
		if key.Mark != 0 {
			key = kernel.ServerKey{}
		}
		var dests []string
		for _, d := range sortedDests(s.dests) {
			if weight := s.dests[d].weight; weight > 0 {
				dests = append(dests, fmt.Sprint(d, "=", weight))
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

// randomService makes one of a few kinds of Service, with few endpoints.
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

// TestChangesEndAsAFreshStart makes many random changes. The result must equal that of one sync
// of the last plan.
func TestChangesEndAsAFreshStart(t *testing.T) {
	for _, family := range plan.Families {
		for seed := range uint64(20) {
			t.Run(fmt.Sprint(family, "/", seed), func(t *testing.T) {
				w, r := world{family}, rand.New(rand.NewPCG(seed, 1))
				desired := w.plan()
				grown := &model{t, map[kernel.ServerKey]*server{}, map[nft.ElementID]nft.Element{}}
				st := w.state()
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
					step(t, st, desired, slices.Collect(maps.Keys(names)), grown)
				}
				fresh := &model{t, map[kernel.ServerKey]*server{}, map[nft.ElementID]nft.Element{}}
				anew := w.state()
				step(t, anew, desired, slices.Collect(maps.Keys(desired.Services)), fresh)
				if diff := cmp.Diff(fresh.reachable(), grown.reachable()); diff != "" {
					t.Errorf("-fresh +grown:\n%s", diff)
				}
				compareStates(t, anew, st)
			})
		}
	}
}

func (w world) state() *state {
	return newState(newRuleset(nft.FamilyOf(w.family), 0, plan.Node{}, nil))
}

func step(t *testing.T, st *state, desired *plan.Plan, names []plan.ServicePortName, m *model) {
	t.Helper()
	slices.SortFunc(names, plan.ServicePortName.Compare)
	m.apply(st, compileBatch(t, st, desired, names))
}

// compileBatch compares the named Service ports with a state.
func compileBatch(t *testing.T, st *state, desired *plan.Plan, names []plan.ServicePortName) *batch {
	t.Helper()
	rules := *st.rules
	rules.timeouts = affinityTimeouts(rules.timeouts, desired.Services)
	c := &compiler{
		IPFamily: rules.IPFamily, schedulers: newSchedulerChoice("", anyScheduler), rules: &rules, marks: st.marks,
		oldMarks: make(map[markKey]uint32), endpointMarks: st.endpointMarks, foreign: func(netip.Addr) bool { return false },
	}
	for _, name := range names {
		if r := st.records[name]; r != nil {
			maps.Copy(c.oldMarks, r.marks)
		}
	}
	records, err := c.compile(desired, names)
	if err != nil {
		t.Fatal(err)
	}
	b := st.compare(names, records)
	b.rules = &rules
	return b
}

// compareStates compares two states that came to the same plan on different ways.
func compareStates(t *testing.T, want, got *state) {
	t.Helper()
	if want.elementCount != got.elementCount {
		t.Errorf("%d elements, not %d", got.elementCount, want.elementCount)
	}
	used := func(st *state) map[netip.Addr]bool {
		addrs := make(map[netip.Addr]bool)
		for _, r := range st.records {
			for _, a := range r.virtualAddrs() {
				addrs[a] = true
			}
		}
		return addrs
	}
	if !maps.Equal(used(want), used(got)) {
		t.Errorf("addresses of Service ports: %v, not %v", used(got), used(want))
	}
	inUse := func(st *state) (n int) {
		for _, s := range st.servers {
			if s.inUse {
				n++
			}
		}
		return n
	}
	if inUse(want) != inUse(got) {
		t.Errorf("%d virtual servers are in use, not %d", inUse(got), inUse(want))
	}
	for a := range got.onDevice {
		if _, drains := got.drainingAddrs[a]; drains == used(got)[a] {
			t.Errorf("%s has a Service port: %v, and drains: %v", a, used(got)[a], drains)
		}
	}
	for key, s := range got.servers {
		for d, f := range s.dests {
			if _, drains := got.draining[key][d]; drains != (f.weight == 0) {
				t.Errorf("%s of %s has weight %d, and drains: %v", d, key, f.weight, drains)
			}
		}
	}
	// The record and each server under a mark hold its allocation, and nothing else does.
	allocated := make(map[uint32]int)
	for _, r := range got.records {
		for _, mark := range r.allocated {
			allocated[mark]++
		}
	}
	for key := range got.servers {
		if key.Mark != 0 {
			allocated[allocationOf(key.Mark)]++
		}
	}
	if in := got.marks.sets.InUse() + got.marks.ranges.InUse(); in != len(allocated) {
		t.Errorf("%d marks are in use, the pool says %d", len(allocated), in)
	}
	for mark, n := range allocated {
		if uses := got.marks.of(mark).Uses(mark); uses != n {
			t.Errorf("mark %#x has %d uses, the pool says %d", mark, n, uses)
		}
	}
}

// TestMarksStay checks that a change of endpoints keeps the marks, because open connections
// belong to them.
func TestMarksStay(t *testing.T) {
	w := world{plan.IPv4}
	st := w.state()
	m := &model{t, map[kernel.ServerKey]*server{}, map[nft.ElementID]nft.Element{}}
	service := func(all, here *plan.EndpointSet) *plan.ServicePort {
		sp := w.service("web", plan.TCP, all, clusterIP(w.vip(1), 80, all), local(plan.NodePort, netip.Addr{}, 30080, all, here))
		return sp
	}
	for _, timeout := range []time.Duration{0, time.Hour} {
		marks := func(pods ...int) map[markKey]uint32 {
			sp := service(w.pods(pods...), w.pods(pods[0]))
			sp.AffinityTimeout = timeout
			step(t, st, w.plan(sp), []plan.ServicePortName{sp.Name}, m)
			return st.records[sp.Name].marks
		}
		if before, after := marks(1, 2), marks(2, 3, 4); len(before) == 0 || !maps.Equal(before, after) {
			t.Errorf("marks were %v and are %v", before, after)
		}
	}
}

// TestMarkPool checks that a range is in use while it has a server.
func TestMarkPool(t *testing.T) {
	p := newMarkPool()
	first, err := p.ranges.Take()
	if first != affinitySpace || err != nil {
		t.Fatalf("got %#x (%v)", first, err)
	}
	p.hold(first | endpointFlag | 7)
	p.release(first)
	p.ranges.StartAt(first)
	if next, _ := p.ranges.Take(); next != first+1<<rangeBits {
		t.Errorf("got %#x although a server is under %#x", next, first)
	}
	p.release(first | endpointFlag | 7)
	p.ranges.StartAt(first)
	if next, _ := p.ranges.Take(); next != first {
		t.Errorf("got %#x although %#x is free", next, first)
	}
	p.ranges.StartAt(affinityLast)
	if last, _ := p.ranges.Take(); last != affinityLast || !isOfAffinity(last) {
		t.Errorf("got %#x", last)
	}
	p.hold(setFirst)
	if m, _ := p.sets.Take(); m != setFirst+1 {
		t.Errorf("got %#x", m)
	}
}

// TestMarksPartWays checks that two Service ports which get the frontends of one do not share
// its mark.
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
			mark = affinitySpace + 5<<rangeBits
		}
		st := w.state()
		old := w.service("old", plan.TCP, set)
		st.records[old.Name] = &record{port: old, marks: make(map[markKey]uint32)}
		for _, sp := range []*plan.ServicePort{one, other} {
			st.records[old.Name].marks[markKey{sp.Frontends[0].Key(plan.TCP), false}] = mark
		}
		b := compileBatch(t, st, w.plan(one, other), []plan.ServicePortName{one.Name, old.Name, other.Name})
		if first, second := b.new[0].allocated[0], b.new[2].allocated[0]; first != mark || second == mark {
			t.Errorf("the mark %#x became %#x and %#x", mark, first, second)
		}
	}
}
