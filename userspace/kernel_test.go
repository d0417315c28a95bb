// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// TestCleanupLeavesNothing compares the namespace before and after.
func TestCleanupLeavesNothing(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		before := w.kernel()
		for range 2 { // also where a table is there already
			w.serve(0, 0, 0)
			w.p.state = nil
		}
		if during := w.kernel(); during == before {
			t.Fatal("nothing was written")
		}
		for i := range 2 { // also where nothing is there any more
			removed, _, err := Dataplane{}.Cleanup(w.family, false)
			w.must(err)
			if removed != (i == 0) {
				t.Errorf("Cleanup number %d says %v", i+1, removed)
			}
		}
		if after := w.kernel(); after != before {
			t.Errorf("there are %+v, there were %+v", after, before)
		}
	})
}

// kernelObjects counts what the mode may have made.
type kernelObjects struct{ tables, rules, routes int }

func (w *world) kernel() (k kernelObjects) {
	w.t.Helper()
	conn, err := nftables.New()
	w.must(err)
	tables, err := conn.ListTables()
	w.must(err)
	family := (&routes{family: w.family}).number()
	rules, err := netlink.RuleList(family)
	w.must(err)
	found, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	w.must(err)
	return kernelObjects{len(tables), len(rules), len(found)}
}

// TestRulesOfOtherMarks has the bit of the mark change twice.
func TestRulesOfOtherMarks(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		before := w.kernel()
		w.serve(0, 0, 0)
		during := w.kernel()
		old := w.p.routes.mark
		for _, mark := range []uint32{0x8001, 0x10001} {
			w.p.routes.mark = mark
			w.must(w.p.Sync(t.Context(), w.plan, plan.Change{All: true}))
			if now := w.kernel(); now != during {
				t.Errorf("with the mark %#x there are %+v, there were %+v", mark, now, during)
			}
		}
		w.p.routes.mark = old
		w.must(w.p.routes.ensure()) // a second rule
		_, _, err := Dataplane{}.Cleanup(w.family, false)
		w.must(err)
		if after := w.kernel(); after != before {
			t.Errorf("cleanup leaves %+v, there were %+v", after, before)
		}
	})
}

// TestRepairRoutes: routes and the rule that other programs remove are noticed, named and added
// again. What other programs put before them is noticed once.
func TestRepairRoutes(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.serve(0, 0, 0)
		during := w.kernel()
		own, answers, rule, err := w.p.routes.entries()
		w.must(err)
		foreign, otherMark, blackhole := *rule, *rule, *answers
		foreign.Priority, foreign.Table = answersPriority-1, unix.RT_TABLE_LOCAL+1
		otherMark.Mark++
		blackhole.Type, blackhole.LinkIndex, blackhole.Scope, blackhole.Table = unix.RTN_BLACKHOLE, 0, 0, foreign.Table
		toRelay := fmt.Sprintf("packets to %[1]s do not take the route local %[1]s dev lo table %[2]d", own.Dst, unix.RT_TABLE_LOCAL)
		marked := fmt.Sprintf("packets with the mark %#x do not take the route local %s dev lo table %d", rule.Mark, answers.Dst, answersTable)
		ruleMissing := "the " + ruleName + " is missing"
		ownMissing, answersMissing := fmt.Sprintf("the route of %s to this node is missing", own.Dst), fmt.Sprintf("the route of table %d is missing", answersTable)
		type texts = []string
		for _, step := range []struct {
			name               string
			do                 func() error
			compared, repaired texts
			unnoticed          bool
		}{
			{"nothing", func() error { return nil }, nil, nil, true},
			{"the rule", func() error { return netlink.RuleDel(rule) }, texts{marked, ruleMissing}, texts{ruleMissing}, false},
			{"the relay's route", func() error { return netlink.RouteDel(own) }, texts{toRelay}, texts{ownMissing}, false},
			{"the route of answers", func() error { return netlink.RouteDel(answers) }, texts{marked}, texts{answersMissing}, false},
			{"everything", func() error {
				return errors.Join(netlink.RuleDel(rule), netlink.RouteDel(own), netlink.RouteDel(answers))
			}, texts{toRelay, marked, ruleMissing}, texts{ownMissing, answersMissing, ruleMissing}, false},
			{"another program's rule", func() error { return errors.Join(netlink.RouteAdd(&blackhole), netlink.RuleAdd(&foreign)) }, texts{marked}, nil, false},
			{"nothing behind it", func() error { return nil }, texts{marked}, nil, true},
			{"the rule behind it", func() error { return netlink.RuleDel(rule) }, texts{marked, ruleMissing}, texts{ruleMissing}, false},
			{"that rule is gone", func() error { return errors.Join(netlink.RouteDel(&blackhole), netlink.RuleDel(&foreign)) }, nil, nil, false},
			{"the rule, by a signalbox with another mark", func() error { return errors.Join(netlink.RuleAdd(&otherMark), netlink.RuleDel(rule)) }, nil, texts{ruleMissing}, true},
			{"that signalbox's rule", func() error { return netlink.RuleDel(&otherMark) }, nil, nil, true},
		} {
			w.must(step.do())
			if differ, err := w.p.routes.differ(); differ == step.unnoticed || err != nil {
				t.Errorf("%s: differ %v, %v", step.name, differ, err)
			}
			if c, err := w.p.Compare(t.Context()); !slices.Equal(c.Differences, step.compared) || err != nil {
				t.Errorf("%s: compared %q, %v", step.name, c.Differences, err)
			}
			if found, err := w.p.Repair(t.Context()); !slices.Equal(found.Objects, step.repaired) || found.NeedsFullWrite || err != nil {
				t.Errorf("%s: found %+v, %v", step.name, found, err)
			}
			if differ, err := w.p.routes.differ(); differ || err != nil {
				t.Errorf("%s: after the repair, differ %v, %v", step.name, differ, err)
			}
		}
		if now := w.kernel(); now != during {
			t.Errorf("after the repairs there are %+v, there were %+v", now, during)
		}
		w.p.Pause()
		w.must(netlink.RuleDel(rule))
		differ, err := w.p.routes.differ()
		w.must(err)
		if missing, err := w.p.routes.repair(); differ || len(missing) > 0 || err != nil {
			t.Errorf("a paused relay: differ %v, repaired %q, %v", differ, missing, err)
		}
		w.must(w.p.Sync(t.Context(), w.plan, plan.Change{All: true}))
		if now := w.kernel(); now != during {
			t.Errorf("after the next sync there are %+v, there were %+v", now, during)
		}
	})
}

func TestSourceMarksForbidClientAddresses(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	r := w.p.routes
	client, endpoint := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	w.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "to-client"}, PeerName: "to-endpoint"}))
	for name, a := range map[string]netip.Addr{"to-client": client, "to-endpoint": endpoint} {
		link, err := netlink.LinkByName(name)
		w.must(err)
		w.must(netlink.LinkSetUp(link))
		w.must(netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(netip.PrefixFrom(a, 32))}))
	}
	for value, want := range []bool{true, false} {
		w.must(os.WriteFile("/proc/sys/net/ipv4/conf/all/src_valid_mark", fmt.Append(nil, value), 0o644))
		r.readSourceMarks()
		if r.onDifferentLinks(client, endpoint) != want {
			t.Errorf("src_valid_mark=%d: a client's address is used: %v", value, !want)
		}
	}
}

func TestSupported(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.must(Dataplane{}.Supported(w.family))
		w.serve(0, 0, 0)
		before := w.kernel()
		w.must(Dataplane{}.Supported(w.family)) // while one is at work
		if after := w.kernel(); after != before {
			t.Errorf("the probe left %+v, there were %+v", after, before)
		}
	})
}

// TestProbeLeavesThePortsAlone has no port free at which a relay could listen:
// the probe must not ask for one, as it would share it with the relay at work.
func TestProbeLeavesThePortsAlone(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		for n := range portTries {
			port := (firstPorts + ports(n)*ports(trafficSourceCount)).of(0)
			l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
			w.must(err)
			defer l.Close()
		}
		w.must(Dataplane{}.Supported(w.family))
	})
}

func TestUnsupportedSaysWhatIsMissing(t *testing.T) {
	w := newWorld(t, plan.IPv6)
	for _, conf := range []string{"all", "lo"} {
		w.must(os.WriteFile("/proc/sys/net/ipv6/conf/"+conf+"/disable_ipv6", []byte("1"), 0o644))
	}
	var missing *proxier.UnsupportedError
	if err := (Dataplane{}).Supported(plan.IPv6); !errors.As(err, &missing) || missing.Family != plan.IPv6 || missing.Mode != Mode {
		t.Errorf("without IPv6 Supported answers %v, want an UnsupportedError for it", err)
	}
}

// TestSCTPIsRefused looks at what the rules and the Proxier say of a port that is not
// relayed.
func TestSCTPIsRefused(t *testing.T) {
	desired := examplePlan(plan.IPv4)
	p := &Proxier{state: newState(nft.FamilyOf(plan.IPv4))}
	p.state.services = desired.Services
	for name := range desired.Services {
		if _, found := p.Problem(name); found != (name.Protocol == plan.SCTP) {
			t.Errorf("%s has a problem: %v", name, found)
		}
	}
	for name, sp := range desired.Services {
		if name.Protocol != plan.SCTP {
			continue
		}
		f := nft.FamilyOf(plan.IPv4)
		for _, e := range compile(f, sp, nil) {
			if e.Set != access.Rejected && e.Set != clusterIPs {
				t.Errorf("an SCTP port is in %s", setNames[e.Set])
			}
		}
		return
	}
	t.Fatal("the example has no SCTP port")
}
