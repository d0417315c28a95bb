// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"context"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	"signalbox/internal/nstest"
	"signalbox/proxier/plan"
)

// adopted is a Proxier of a new process, after its first Sync.
func adopted(t *testing.T, desired *plan.Plan) *Proxier {
	t.Helper()
	p := newProxier(t, desired.Family)
	if err := p.Sync(context.Background(), desired, plan.Change{}); err != nil {
		t.Fatal(err)
	}
	compareKernel(t, p, desired.Node)
	compareMeaning(t, p.state, desired)
	return p
}

// rangesOf returns the range of numbers of each Service port with affinity.
func rangesOf(p *Proxier) map[plan.ServicePortName]uint32 {
	ranges := make(map[plan.ServicePortName]uint32)
	for name, port := range stickyPorts(p.state.ports) {
		ranges[name] = port.idRange
	}
	return ranges
}

// TestAdopt: a new process that finds the table it would write writes nothing. If the
// plan changed meanwhile, it writes the change.
func TestAdopt(t *testing.T) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) {
			nstest.Enter(t)
			g := generator{rand.New(rand.NewPCG(1, uint64(f))), f}
			plan := &plan.Plan{Family: f, Node: g.node(), Services: map[plan.ServicePortName]*plan.ServicePort{}}
			for range 40 {
				g.step(plan)
			}
			p := adopted(t, plan)
			for round := range 20 {
				for range 3 {
					if err := p.Sync(context.Background(), plan, g.step(plan)); err != nil {
						t.Fatal(err)
					}
				}
				p.Close()
				before := nstest.Generation(t)
				p = adopted(t, plan)
				if now := nstest.Generation(t); now != before {
					t.Errorf("round %d: with nothing changed, %d transactions", round, now-before)
				}
				// This one ends too, and misses a change.
				p.Close()
				g.step(plan)
				before = nstest.Generation(t)
				p = adopted(t, plan)
				if now := nstest.Generation(t); now > before+1 {
					t.Errorf("round %d: %d transactions for what changed meanwhile, want one", round, now-before)
				}
			}
		})
	}
}

// TestAdoptMany: a new process writes a table with too many endpoints to read anew.
// Service ports with affinity keep their numbers, so that clients keep their endpoints.
func TestAdoptMany(t *testing.T) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) {
			nstest.Enter(t)
			desired := examplePlan(f)
			before := rangesOf(adopted(t, desired))
			if len(before) == 0 {
				t.Fatal("no Service port has affinity")
			}
			p := newProxier(t, f)
			p.maxEndpointsRead = 0
			generation := nstest.Generation(t)
			if err := p.Sync(t.Context(), desired, plan.Change{}); err != nil {
				t.Fatal(err)
			}
			if n := nstest.Generation(t) - generation; n != 1 {
				t.Errorf("%d transactions, want one", n)
			}
			compareKernel(t, p, desired.Node)
			compareMeaning(t, p.state, desired)
			if after := rangesOf(p); !maps.Equal(before, after) {
				t.Errorf("ranges of numbers before %v, after %v", before, after)
			}
		})
	}
}

// TestAdoptDamaged: a table that other software changed is corrected.
func TestAdoptDamaged(t *testing.T) {
	for name, damage := range map[string][]string{
		"a rule is gone":         {"flush", "chain", "ip", tableName, "nat-prerouting"},
		"a rule is new":          {"insert", "rule", "ip", tableName, "services", "ip", "daddr", "10.0.0.0/8", "drop"},
		"a chain is new":         {"add", "chain", "ip", tableName, "mine"},
		"a set is new":           {"add", "set", "ip", tableName, "mine", "{ type ipv4_addr; }"},
		"all frontends are gone": {"flush", "map", "ip", tableName, "frontends"},
		"an element is new":      {"add", "element", "ip", tableName, "rejected", "{ 10.0.0.99 . tcp . 80 }"},
		"all endpoints are gone": {"flush", "map", "ip", tableName, "endpoints"},
		"a pick chain is empty":  {"flush", "chain", "ip", tableName, "pick-2"},
		"the chains' map":        {"flush", "map", "ip", tableName, "pick-chains"},
		"nothing is left":        {"flush", "ruleset"},
		"a rule is another":      {"flush chain ip " + tableName + " filter-output; add rule ip " + tableName + " filter-output accept"},
		"a policy is another":    {"add chain ip " + tableName + " filter-output { policy drop; }"},
		"the table is dormant":   {"add table ip " + tableName + " { flags dormant; }"},
	} {
		t.Run(name, func(t *testing.T) {
			nstest.Enter(t)
			plan := examplePlan(plan.IPv4)
			adopted(t, plan)
			runNft(t, damage...)
			adopted(t, plan)
		})
	}
}

// TestAdoptAfterNodeChange: rules of other facts of the node are replaced.
func TestAdoptAfterNodeChange(t *testing.T) {
	nstest.Enter(t)
	desired := examplePlan(plan.IPv4)
	adopted(t, desired)
	desired.Node.LocalPods.Interface = "cni0"
	p := adopted(t, desired)
	desired.Node.LocalPods.Interface = "cni1"
	if err := p.Sync(context.Background(), desired, plan.Change{Node: true}); err != nil {
		t.Fatal(err)
	}
	compareKernel(t, p, desired.Node)
	before := nstest.Generation(t)
	adopted(t, desired)
	if now := nstest.Generation(t); now != before {
		t.Errorf("%d transactions after a change of the node's facts, want none", now-before)
	}
}

func TestParseChainName(t *testing.T) {
	for _, c := range []pickChain{
		{size: 1}, {size: 600}, {size: 3, timeout: time.Hour}, {size: 3, timeout: time.Second, setIndex: 2}, {size: 2000, timeout: time.Minute, setIndex: 1, large: true},
	} {
		if got, ok := parseChainName(c.name()); !ok || got != c {
			t.Errorf("%s: read as %+v, %v", c.name(), got, ok)
		}
	}
	for _, name := range []string{"", "services", "pick-", "pick-x", "pick-03", "pick-endpoint", "pick-3-affinity-s", "pick-3-affinity-5s-set-x", "pick-3-large-"} {
		if c, ok := parseChainName(name); ok {
			t.Errorf("%q was read as %+v", name, c)
		}
	}
}
