// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"signalbox/internal/nstest"
	"signalbox/proxier/plan"
)

// sticky is a lab with one Service port that has affinity, at a cluster IP and
// a node port.
type sticky struct {
	*lab
	plan     *plan.Plan
	proxier  *Proxier
	proto    plan.Protocol
	timeout  time.Duration
	cluster  netip.AddrPort
	nodePort netip.AddrPort
}

func newSticky(l *lab, proto plan.Protocol, timeout time.Duration, pods ...int) *sticky {
	s := &sticky{lab: l, plan: l.plan(), proto: proto, timeout: timeout,
		cluster: netip.AddrPortFrom(l.vip(1), 80), nodePort: netip.AddrPortFrom(l.client.nodeAddr, 30001)}
	s.fill(l.set(pods...), nil)
	s.proxier = l.synced(s.plan)
	return s
}

// fill puts the Service port into the plan. The node port can have another external set.
func (s *sticky) fill(all, external *plan.EndpointSet) plan.ServicePortName {
	if external == nil {
		external = all
	}
	return put(s.plan, "web", s.proto, s.timeout,
		plan.Frontend{Addr: s.cluster.Addr(), Port: 80, Internal: all, External: all},
		plan.Frontend{Kind: plan.NodePort, Port: 30001, Internal: all, External: external})
}

// become syncs the Service port with other endpoints.
func (s *sticky) become(all, external *plan.EndpointSet) {
	s.t.Helper()
	name := s.fill(all, external)
	s.must(s.proxier.Sync(context.Background(), s.plan, plan.Change{Services: []plan.ServicePortName{name}}))
}

// clients lists the client's addresses.
func (s *sticky) clients() []netip.Addr {
	list := []netip.Addr{s.client.addr}
	for len(list) < clientAddrs {
		list = append(list, list[len(list)-1].Next())
	}
	return list
}

// homes returns the endpoint of each client, and fails if a client is sent to
// more than one over several connections to the frontends.
func (s *sticky) homes(to ...netip.AddrPort) map[netip.Addr]string {
	s.t.Helper()
	homes := map[netip.Addr]string{}
	for range 4 {
		for _, to := range to {
			for _, c := range s.clients() {
				a := s.mustAnswerFrom(s.client, c, s.proto, to)
				if home, known := homes[c]; known && home != a.name {
					s.t.Fatalf("client %s was sent to %s and then, at %s, to %s", c, home, to, a.name)
				}
				homes[c] = a.name
			}
		}
	}
	return homes
}

func TestAffinity(t *testing.T) {
	for _, proto := range protocols {
		t.Run(proto.String(), func(t *testing.T) {
			eachFamily(t, func(t *testing.T, l *lab) { followEndpoints(newSticky(l, proto, 3*time.Hour, 1, 2, 3)) })
		})
	}
}

// followEndpoints takes endpoints away and adds them, and looks who moves.
func followEndpoints(s *sticky) {
	t := s.t
	first := s.homes(s.cluster, s.nodePort)
	// The first client's endpoint goes, and another comes.
	goes, stay := first[s.client.addr], []int{4}
	for n := 1; n <= 3; n++ {
		if fmt.Sprintf("pod%d", n) != goes {
			stay = append([]int{n}, stay...)
		}
	}
	s.become(s.set(stay...), nil)
	second := s.homes(s.nodePort, s.cluster)
	for c, home := range first {
		if home != goes && second[c] != home {
			t.Errorf("client %s moved from %s to %s, though only %s went", c, home, second[c], goes)
		}
		if second[c] == goes {
			t.Errorf("client %s is still sent to %s, which is gone", c, goes)
		}
	}
	// The endpoint comes back: nobody moves.
	s.become(s.set(1, 2, 3, 4), nil)
	for c, home := range s.homes(s.cluster, s.nodePort) {
		if second[c] != home {
			t.Errorf("client %s moved from %s to %s when an endpoint came", c, second[c], home)
		}
	}
	// A change of something else keeps everyone where they are, and none left
	// is an end of it.
	s.become(s.set(1, 2, 3, 4), s.set(1, 2, 3, 4))
	for c, home := range s.homes(s.cluster, s.nodePort) {
		if second[c] != home {
			t.Errorf("client %s moved from %s to %s when only the sets were split", c, second[c], home)
		}
	}
	s.become(s.set(), nil)
	s.mustFail(s.client, s.proto, s.cluster, errRefused)
}

// TestAffinityAcrossSets: a client whose endpoint is not in the set of the frontend gets
// one of the set. That one is its endpoint in all sets that have it.
func TestAffinityAcrossSets(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		s := newSticky(l, plan.TCP, time.Hour, 1)
		s.become(s.set(3, 4), nil)
		s.homes(s.cluster) // now at pod3 or pod4
		s.become(s.set(1, 2, 3, 4), s.set(1, 2))
		moved := s.homes(s.nodePort)
		for c, home := range moved {
			if home != "pod1" && home != "pod2" {
				t.Errorf("client %s was sent to %s, which is not in the node port's set", c, home)
			}
		}
		for c, home := range s.homes(s.cluster, s.nodePort) {
			if home != moved[c] {
				t.Errorf("client %s moved from %s to %s", c, moved[c], home)
			}
		}
	})
}

// TestAffinityRace: concurrent connections of one client go to one endpoint.
func TestAffinityRace(t *testing.T) {
	l := newLab(t, plan.IPv4)
	s := newSticky(l, plan.TCP, time.Hour, 1, 2, 3, 4)
	for _, c := range s.clients() {
		var all sync.WaitGroup
		answers := make([]answer, 16)
		for i := range answers {
			all.Go(func() {
				a, err := l.probe(l.client, c, s.proto, s.cluster, patience)
				if err != nil {
					t.Error(err)
				}
				answers[i] = a
			})
		}
		all.Wait()
		for _, a := range answers {
			if a.name != answers[0].name {
				t.Errorf("client %s was sent to %s and to %s", c, answers[0].name, a.name)
			}
		}
	}
}

// TestAffinityEnds: the timeout starts with the client's last connection, not with its
// first.
func TestAffinityEnds(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		s := newSticky(l, plan.TCP, 100*time.Second, 1, 2, 3, 4)
		remembered := func() (left []time.Duration) {
			elements, err := s.proxier.table.Read(affinity)
			l.must(err)
			for _, e := range elements {
				left = append(left, e.Expires)
			}
			return left
		}
		connect := func() answer { return l.mustAnswer(l.client, s.proto, s.cluster) }
		first := connect()
		// Left alone, the time can only become less.
		eventually(t, "a connection starts the client's time again", func() bool {
			before := remembered()
			if a := connect(); a.name != first.name {
				t.Fatalf("the client moved from %s to %s", first.name, a.name)
			}
			after := remembered()
			return len(before) == 1 && len(after) == 1 && after[0] > before[0]
		})
		s.timeout = time.Second
		s.become(s.set(1, 2, 3, 4), nil)
		connect()
		eventually(t, "the client is forgotten", func() bool { return len(remembered()) == 0 })
		eventually(t, "the client is sent elsewhere", func() bool {
			if len(remembered()) > 0 {
				return false
			}
			return connect().name != first.name
		})
	})
}

// TestLargeAffinity: a Service port that outgrows a small range of ids, and shrinks
// again, keeps its affinity.
func TestLargeAffinity(t *testing.T) {
	l := newLab(t, plan.IPv4)
	s := newSticky(l, plan.TCP, time.Hour, 1, 2, 3, 4)
	before := s.homes(s.cluster)
	crowd := l.set(1, 2, 3, 4)
	for i := range 2000 {
		crowd.Endpoints = append(crowd.Endpoints, plan.Endpoint{
			AddrPort: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}), podPort)})
	}
	s.become(crowd, nil)
	s.become(l.set(1, 2, 3, 4), nil)
	after := s.homes(s.cluster, s.nodePort)
	s.become(l.set(1, 2, 3), nil)
	for c, home := range s.homes(s.cluster, s.nodePort) {
		if after[c] != home && after[c] != "pod4" {
			t.Errorf("client %s moved from %s to %s (before the crowd: %s)", c, after[c], home, before[c])
		}
	}
}

// TestAffinityOutlivesTheProcess: another Proxier that writes everything anew
// keeps the clients at their endpoints, though other Services came meanwhile
// and would be numbered first. In the last round the sets are those of an older release.
func TestAffinityOutlivesTheProcess(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		s := newSticky(l, plan.TCP, time.Hour, 2, 3, 4)
		before := s.homes(s.cluster)
		for round := range 3 {
			s.proxier.Close()
			for _, name := range []string{"a", "b"} {
				set := l.set(1)
				put(s.plan, fmt.Sprintf("%s-%d", name, round), plan.TCP, time.Minute, plan.Frontend{
					Addr: l.vip(50 + round*2 + int(name[0]-'a')), Port: 80, Internal: set, External: set})
			}
			s.fill(l.set(1, 2, 3, 4), nil)
			if round == 2 {
				table := "ip signalbox"
				if l.family == plan.IPv6 {
					table = "ip6 signalbox"
				}
				runNft(t, "-f", "-", strings.ReplaceAll("flush chain TABLE check-local; flush chain TABLE check-remote; "+
					"delete set TABLE rejected; add set TABLE refused { type inet_service; };", "TABLE", table))
			}
			s.proxier = l.synced(s.plan)
			// The same process writes everything anew too.
			l.must(s.proxier.Sync(context.Background(), s.plan, plan.Change{All: true}))
			compareKernel(t, s.proxier, s.plan.Node)
			for c, home := range s.homes(s.cluster, s.nodePort) {
				if home != before[c] {
					t.Errorf("client %s moved from %s to %s when the table was written anew", c, before[c], home)
				}
			}
			s.become(l.set(1, 2, 3, 4), l.set(1, 2, 3, 4))
		}
	})
}

// TestForeignTable: a table with our name that another program wrote is replaced.
func TestForeignTable(t *testing.T) {
	for name, table := range map[string]string{
		"other sets":         `table ip signalbox { set x { type ipv4_addr; elements = { 1.2.3.4 }; }; chain c { ip saddr @x drop; }; }`,
		"other affinity map": `table ip signalbox { map affinity { type ipv4_addr : ipv4_addr; }; chain c { type filter hook input priority 0; }; }`,
	} {
		t.Run(name, func(t *testing.T) {
			nstest.Enter(t)
			runNft(t, "-f", "-", table)
			desired := examplePlan(plan.IPv4)
			p := newProxier(t, plan.IPv4)
			if err := p.Sync(context.Background(), desired, plan.Change{}); err != nil {
				t.Fatal(err)
			}
			compareKernel(t, p, desired.Node)
		})
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for !condition() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within a minute: %s", what)
		}
	}
}
