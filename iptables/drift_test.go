// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/util/wait"

	"signalbox/internal/nstest"
	"signalbox/internal/xtables"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// TestRepair: what another program removes is noticed, named, and there again after a full
// write. The own writes are not noticed.
func TestRepair(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		w := newWorld(p.opts.Family, 3)
		desired := w.plan(10)
		desired.Node.LocalhostNodePorts = true
		mustSync(t, p, desired, plan.Change{All: true})
		intact := func() []string {
			lines := strings.Split(saved(t, p), "\n")
			slices.Sort(lines)
			return lines
		}
		quiet := func(after string) {
			t.Helper()
			if by, changed, _ := p.observe(); changed {
				t.Errorf("after %s, a change by %s is noticed", after, by)
			}
			if found, err := p.Repair(t.Context()); err != nil || len(found.Objects) > 0 {
				t.Errorf("after %s: found %+v, %v", after, found, err)
			}
		}
		quiet("the first sync")
		mustSync(t, p, desired, w.change(desired))
		quiet("a change")
		for damage, found := range map[string]string{
			"-t nat -F KUBE-SERVICES":    "chains or rules of table nat differ",
			"-t nat -D PREROUTING 1":     "table nat: the jump from PREROUTING to KUBE-SERVICES is missing",
			"-t filter -F KUBE-FORWARD":  "chains or rules of table filter differ",
			"-t filter -F KUBE-SERVICES": "chains or rules of table filter differ",
			"-t filter -F KUBE-FIREWALL": "the chain KUBE-FIREWALL does not keep other hosts from 127.0.0.1",
			"-t nat -F":                  "chains or rules of table nat differ",
			// The numbers of rules stay. In the legacy variant, the first one's size stays, too.
			"-t nat -R KUBE-SERVICES 1 -j RETURN":   "+" + xtablesName(p.opts.Family) + " -t nat -A KUBE-SERVICES -j RETURN",
			"-t filter -R KUBE-FORWARD 1 -j RETURN": "+" + xtablesName(p.opts.Family) + " -t filter -A KUBE-FORWARD -j RETURN",
		} {
			if !p.opensLoopback(&desired.Node) && strings.Contains(damage, "FIREWALL") || p.tools.Backend == Legacy && strings.Contains(damage, "nat -R") {
				continue
			}
			before := intact()
			run(t, "", p.tools.Command, strings.Fields(damage)...)
			want := ""
			if p.tools.Backend == NFT {
				want = filepath.Base(p.tools.Command)
			}
			if by := noticed(t, p, damage); by.Name != want {
				t.Errorf("%s: by %s, want %q", damage, by, want)
			}
			got, err := p.Repair(t.Context())
			if err != nil || got.NeedsFullWrite == strings.Contains(damage, "FIREWALL") || !slices.Contains(got.Objects, found) {
				t.Errorf("%s: found %+v, %v, want %q", damage, got, err, found)
			}
			mustSync(t, p, desired, plan.Change{All: true})
			if diff := cmp.Diff(before, intact()); diff != "" {
				t.Errorf("%s: the repair makes something else (-before +after)\n%s", damage, diff)
			}
			quiet("the repair of " + damage)
			if p.unreadable {
				t.Errorf("%s: rules are no longer compared", damage)
			}
		}
	})
}

// TestUnknownWords: where the tools print rules in words that the comparison does not know, two
// full writes are the last for that reason. When the tools print known words again, a full write
// ends that.
func TestUnknownWords(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		program := p.tools.Save
		scriptSave(t, p, fmt.Sprintf("%s \"$@\" | sed s/--comment/--remark/", program))
		desired := newWorld(p.opts.Family, 3).plan(10)
		mustSync(t, p, desired, plan.Change{All: true})
		for i, want := range []bool{true, true, false, false} {
			run(t, "", p.tools.Command, "-t", "nat", "-N", fmt.Sprintf("OTHER%d", i))
			noticed(t, p, "a foreign chain")
			if found, err := p.Repair(t.Context()); err != nil || found.NeedsFullWrite != want {
				t.Errorf("comparison %d finds %q, %v", i, found.Objects, err)
			}
			mustSync(t, p, desired, plan.Change{All: true})
		}
		run(t, "", p.tools.Command, "-t", "nat", "-F", servicesChain)
		noticed(t, p, "the flush")
		if found, err := p.Repair(t.Context()); err != nil || !found.NeedsFullWrite {
			t.Errorf("after a flush: found %+v, %v", found, err)
		}
		p.tools.Save = program
		mustSync(t, p, desired, plan.Change{All: true})
		run(t, "", p.tools.Command, "-t", "filter", "-R", forwardChain, "1", "-j", "RETURN")
		if found, err := p.Repair(t.Context()); err != nil || !found.NeedsFullWrite {
			t.Errorf("with known words again, a replaced rule leads to %+v, %v", found, err)
		}
	})
}

// TestReplacedDuringListing: another program replaces a rule whenever signalbox lists the rules,
// also after a full write. That does not end the comparison of rules.
func TestReplacedDuringListing(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		desired := newWorld(p.opts.Family, 3).plan(10)
		mustSync(t, p, desired, plan.Change{All: true})
		scriptSave(t, p, fmt.Sprintf("case $* in *filter*) %s -t filter -R %s 1 -j RETURN;; esac\nexec %s \"$@\"", p.tools.Command, forwardChain, p.tools.Save))
		for i := range 4 {
			found, err := p.Repair(t.Context())
			if err != nil || !found.NeedsFullWrite {
				t.Fatalf("comparison %d finds %+v, %v", i, found, err)
			}
			noticed(t, p, "the replaced rule") // the count has it before the write
			mustSync(t, p, desired, plan.Change{All: true})
		}
	})
}

// TestFirewallDuringPause: after a comparison that took long, other changes wait. What no longer
// keeps other hosts from 127.0.0.1 does not, and Repair adds it again.
func TestFirewallDuringPause(t *testing.T) {
	for _, b := range []Backend{Legacy, NFT} {
		for damage, exposes := range map[string]bool{
			"-N OTHER": false, "-F KUBE-FIREWALL": true, "-D INPUT -j KUBE-FIREWALL": true, "-D OUTPUT -j KUBE-FIREWALL": true,
		} {
			t.Run(string(b)+" "+damage, func(t *testing.T) {
				nstest.Enter(t)
				p := newProxier(t, plan.IPv4, b)
				desired := newWorld(plan.IPv4, 3).plan(3)
				desired.Node.LocalhostNodePorts = true
				mustSync(t, p, desired, plan.Change{All: true})
				run(t, "", p.tools.Command, "-N", "FIRST")
				noticedFirst := false
				p.compareTook = time.Hour
				noticedAgain := false
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				p.Watch(ctx, func(proxier.Writer) {
					if noticedFirst {
						noticedAgain = true
						cancel()
						return
					}
					noticedFirst = true
					run(t, "", p.tools.Command, strings.Fields(damage)...)
					if !exposes {
						time.AfterFunc(3*observePeriod, cancel)
					}
				})
				if !noticedFirst || noticedAgain != exposes {
					t.Errorf("noticed: the first change %v, %s %v, want %v", noticedFirst, damage, noticedAgain, exposes)
				}
				found, err := p.Repair(t.Context())
				if err != nil || found.NeedsFullWrite || len(found.Objects) > 0 != exposes {
					t.Errorf("found %+v, %v", found, err)
				}
				if client, err := p.tools.Client(); err != nil {
					t.Error(err)
				} else if complete, err := hasLocalnetFirewall(client); err != nil || !complete {
					t.Errorf("after the repair, all rules of %s are there: %v, %v", firewallChain, complete, err)
				}
				if by, changed, _ := p.observe(); changed && exposes {
					t.Errorf("after the repair, a change by %s is noticed", by)
				}
			})
		}
	}
}

// scriptSave has a script in the place of the program that lists a table.
func scriptSave(t *testing.T, p *Proxier, script string) {
	t.Helper()
	p.tools.Save = filepath.Join(t.TempDir(), "save")
	if err := os.WriteFile(p.tools.Save, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
}

// noticed waits until a change by other software is noticed.
func noticed(t *testing.T, p *Proxier, what string) (by proxier.Writer) {
	t.Helper()
	if err := wait.PollUntilContextTimeout(t.Context(), time.Millisecond, 10*time.Second, true, func(context.Context) (changed bool, _ error) {
		by, changed, _ = p.observe()
		return changed, nil
	}); err != nil {
		t.Fatalf("%s is not noticed: %v", what, err)
	}
	return by
}

// TestOtherTables: changes of other tables, and the removal of what kube-proxy left, are
// not noticed. In the nft variant notifications come in order.
func TestOtherTables(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		for _, table := range []string{"mangle", "nat", "filter"} {
			run(t, "", p.tools.Command, "-t", table, "-N", canaryChain)
		}
		mustSync(t, p, newWorld(p.opts.Family, 3).plan(3), plan.Change{All: true})
		before, _, _ := p.observer.Changes()
		if removed, err := cleanupKubeProxy(p.opts.Family, p.tools.Backend); !removed || err != nil {
			t.Fatalf("the removal: %v, %v", removed, err)
		}
		run(t, "", p.tools.Command, "-t", "mangle", "-N", "OTHER")
		if p.tools.Backend == NFT {
			nstest.NFT(t, "add table ip other; add chain ip other filter", "-f", "-")
			run(t, "", p.tools.Command, "-t", "filter", "-N", "LAST")
			noticed(t, p, "a change")
			before++
		}
		if n, by, err := p.observer.Changes(); n != before || err != nil {
			t.Errorf("%d changes, want %d; the last by %s, %v", n, before, by, err)
		}
	})
}

// TestChangeBesideWrite: in the nft variant, a change by another program between own
// transactions is noticed, also if the kernel refuses one of them. Own transactions alone are
// not noticed.
func TestChangeBesideWrite(t *testing.T) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) {
			nstest.Enter(t)
			p := newProxier(t, f, NFT)
			mustSync(t, p, newWorld(f, 3).plan(3), plan.Change{All: true})
			own := func() {
				var add, remove xtables.Script
				add.Add(nat.String(), []chain{{Name: "KUBE-SVC-TEST"}})
				remove.Add(nat.String(), []chain{xtables.Removal("KUBE-SVC-TEST")})
				for _, s := range []xtables.Script{add, remove} {
					if err := p.apply(t.Context(), &s); err != nil {
						t.Fatal(err)
					}
				}
			}
			var refused xtables.Script
			refused.Add(nat.String(), []chain{{Name: "KUBE-SVC-TEST", Rules: []string{" -j KUBE-SVC-MISSING"}}})
			for _, foreign := range []bool{false, true, false} {
				if err := p.tools.Unobserved(func() error {
					own()
					if err := p.apply(t.Context(), &refused); err == nil {
						t.Error("the kernel takes a jump to a chain that does not exist")
					}
					if foreign {
						run(t, "", p.tools.Command, "-t", "nat", "-F", servicesChain)
					}
					own()
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				if by, changed, _ := p.observe(); changed != foreign {
					t.Errorf("with a foreign change (%v), one is noticed: %v, by %s", foreign, changed, by)
				}
			}
			if found, err := p.Repair(t.Context()); err != nil || !found.NeedsFullWrite {
				t.Errorf("found %+v, %v", found, err)
			}
		})
	}
}

// TestChangeAfterFirstListing: a new process adopts the tables that it has listed. What
// another program changes before the write is noticed.
func TestChangeAfterFirstListing(t *testing.T) {
	eachVariant(t, func(t *testing.T, earlier *Proxier) {
		desired := newWorld(earlier.opts.Family, 3).plan(3)
		mustSync(t, earlier, desired, plan.Change{All: true})
		p := newProxier(t, earlier.opts.Family, earlier.tools.Backend)
		program := p.tools.Save
		scriptSave(t, p, fmt.Sprintf("%s \"$@\" && case $* in *filter*) exec %s -t nat -F;; esac", program, p.tools.Command))
		mustSync(t, p, desired, plan.Change{All: true})
		p.tools.Save = program
		noticed(t, p, "the flush of nat")
		if found, err := p.Repair(t.Context()); err != nil || !found.NeedsFullWrite {
			t.Errorf("found %+v, %v", found, err)
		}
	})
}

// TestObserveAgain: where no descriptor was left to ask the kernel, it is asked later.
func TestObserveAgain(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		mustSync(t, p, newWorld(p.opts.Family, 3).plan(3), plan.Change{All: true})
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		p.observer = nil
		restore := nstest.NoDescriptors(t)
		if _, changed, _ := p.observe(); changed || p.observer != nil {
			t.Error("a socket is open without descriptors")
		}
		restore()
		if _, changed, _ := p.observe(); !changed {
			t.Error("what may have changed before is not compared")
		}
		if by, changed, _ := p.observe(); changed {
			t.Errorf("a change by %s is noticed", by)
		}
		run(t, "", p.tools.Command, "-t", "nat", "-F")
		noticed(t, p, "the flush of nat")
	})
}

// TestRulesOfAnotherProxy: if kube-proxy has filled the chains, Repair leaves them to it.
func TestRulesOfAnotherProxy(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		mustSync(t, p, newWorld(p.opts.Family, 3).plan(3), plan.Change{All: true})
		run(t, "", p.tools.Command, "-t", "filter", "-F", servicesChain)
		run(t, "", p.tools.Command, "-t", "filter", "-A", servicesChain, "-j", "RETURN")
		noticed(t, p, "the change")
		if found, err := p.Repair(t.Context()); err != nil || len(found.Objects) > 0 {
			t.Errorf("found %+v, %v", found, err)
		}
	})
}

// TestRepairOfOneFamily: the writes of one family are not noticed in the other.
func TestRepairOfOneFamily(t *testing.T) {
	for _, b := range []Backend{Legacy, NFT} {
		t.Run(string(b), func(t *testing.T) {
			nstest.Enter(t)
			proxiers, plans := map[plan.Family]*Proxier{}, map[plan.Family]*plan.Plan{}
			for _, f := range plan.Families {
				proxiers[f], plans[f] = newProxier(t, f, b), newWorld(f, 3).plan(3)
			}
			for range 2 {
				for _, f := range plan.Families {
					mustSync(t, proxiers[f], plans[f], plan.Change{All: true})
				}
			}
			for f, p := range proxiers {
				if by, changed, _ := p.observe(); changed {
					t.Errorf("%s: a change by %s is noticed", f, by)
				}
			}
			run(t, "", proxiers[plan.IPv4].tools.Command, "-t", "nat", "-F", servicesChain)
			noticed(t, proxiers[plan.IPv4], "a foreign change")
		})
	}
}

// TestCompare: rules are the same in the words of the tools, after a full write and after
// changes. Each rule that another program removes, adds, replaces or moves is named.
func TestCompare(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		w := newWorld(p.opts.Family, 3)
		desired := w.plan(60)
		desired.Node.LocalhostNodePorts = true
		desired.Node.RouteSources = w.routeSources()
		if _, err := p.Compare(t.Context()); !errors.Is(err, proxier.ErrNothingWritten) {
			t.Errorf("before the first write, Compare says %v", err)
		}
		mustSync(t, p, desired, plan.Change{All: true})
		mustSync(t, p, desired, w.change(desired))
		compare := func(about ...plan.ServicePortName) ([]string, []string) {
			t.Helper()
			c, err := p.Compare(t.Context(), about...)
			if err != nil {
				t.Fatal(err)
			}
			return c.Differences, c.Holds
		}
		if lines, _ := compare(); len(lines) > 0 {
			t.Fatalf("%d differences before the damage:\n%s", len(lines), strings.Join(lines[:min(20, len(lines))], "\n"))
		}
		command := p.tools.Command[strings.LastIndex(p.tools.Command, "/")+1:]
		name, chain, others := servedByOneSet(t, p)
		_, holds := compare(name)
		if !slices.ContainsFunc(holds, func(l string) bool { return strings.Contains(l, " -A "+chain+" ") }) {
			t.Errorf("the kernel holds of %s\n%s", name, strings.Join(holds, "\n"))
		}
		family := xtablesName(p.opts.Family)
		parent := wayTo(p, name)
		for _, test := range []struct {
			damage string
			found  string // begins so
			other  bool   // not about the Service
		}{
			{"-t nat -D " + chain + " 1", "-" + family + " -t nat -A " + chain + " ", false},
			{"-t nat -A " + chain + " -j RETURN", "+" + family + " -t nat -A " + chain + " -j RETURN", false},
			{"-t nat -R " + chain + " 1 -j RETURN", "-" + family + " -t nat -A " + chain + " ", false},
			{"-t nat -F " + others, "-" + family + " -t nat -A " + others + " ", true},
			{"-t nat -N KUBE-SVC-FOREIGN", "+" + family + " -t nat -N KUBE-SVC-FOREIGN", true},
			{"-t nat -I KUBE-SERVICES -j " + chain, "+" + family + " -t nat -A KUBE-SERVICES -j " + chain, false},
			{"-t nat -D PREROUTING 1", "-" + family + " -t nat -A PREROUTING ", false}, // concerns all
			{"-t nat -F " + parent, "-" + family + " -t nat -A " + parent + " ", false},
			// Each packet to the Service may meet these, whose rules are of other Services or of none.
			{"-t nat -I " + parent + " -j RETURN", "+" + family + " -t nat -A " + parent + " -j RETURN", false},
			{"-t nat -R KUBE-SERVICES 1 -j RETURN", "+" + family + " -t nat -A KUBE-SERVICES -j RETURN", false},
			{"-t nat -R KUBE-MARK-MASQ 1 -j RETURN", "-" + family + " -t nat -A KUBE-MARK-MASQ -j MARK ", false},
			{"-t nat -R KUBE-POSTROUTING 1 -j RETURN", "+" + family + " -t nat -A KUBE-POSTROUTING -j RETURN", false},
			{"-t filter -R KUBE-FORWARD 1 -j DROP", "+" + family + " -t filter -A KUBE-FORWARD -j DROP", false},
			{"-t filter -I KUBE-SERVICES -j DROP", "+" + family + " -t filter -A KUBE-SERVICES -j DROP", false},
			{"-t filter -A KUBE-EXTERNAL-SERVICES -j DROP", "+" + family + " -t filter -A KUBE-EXTERNAL-SERVICES -j DROP", false},
			{"-t filter -A KUBE-PROXY-FIREWALL -j DROP", "+" + family + " -t filter -A KUBE-PROXY-FIREWALL -j DROP", false},
		} {
			run(t, "", p.tools.Command, strings.Fields(test.damage)...)
			has := func(lines []string) bool {
				return slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, test.found) })
			}
			if lines, _ := compare(); !has(lines) {
				t.Errorf("%s %s: found %q, want %s", command, test.damage, lines, test.found)
			}
			if lines, _ := compare(name); has(lines) == test.other {
				t.Errorf("%s %s: found %q about %s", command, test.damage, lines, name)
			}
			mustSync(t, p, desired, plan.Change{All: true})
			if lines, _ := compare(); len(lines) > 0 {
				t.Errorf("after the repair of %s: %q", test.damage, lines)
			}
		}
	})
}

// TestRulesBefore: a rule that takes every packet before the jump to the Services is a
// difference. Other software's usual rules there are named, and are none.
func TestRulesBefore(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		desired := newWorld(p.opts.Family, 3).plan(60)
		mustSync(t, p, desired, plan.Change{All: true})
		name, _, _ := servedByOneSet(t, p)
		run(t, "", p.tools.Command, "-t", "nat", "-N", "cali-PREROUTING")
		for _, test := range []struct {
			rule              string // after the chain
			before, different bool
		}{
			{"PREROUTING -m comment --comment cali:6gwb -j cali-PREROUTING", true, false},
			{"OUTPUT -m addrtype --dst-type LOCAL -j cali-PREROUTING", true, false},
			{"PREROUTING -j MARK --set-xmark 0x1/0x1", false, false},
			{"PREROUTING -j ACCEPT", false, true},
			{"OUTPUT -j RETURN", false, true},
		} {
			rule := strings.Fields(test.rule)
			command := func(verb string) {
				t.Helper()
				run(t, "", p.tools.Command, append([]string{"-t", "nat", verb}, rule...)...)
			}
			for _, about := range [][]plan.ServicePortName{nil, {name}} {
				compare := func(before, different bool) {
					t.Helper()
					c, err := p.Compare(t.Context(), about...)
					if err != nil {
						t.Fatal(err)
					}
					begins := func(l string) bool { return strings.HasPrefix(l, xtablesName(p.opts.Family)+" -t nat -A "+rule[0]+" ") }
					if slices.ContainsFunc(c.Before, begins) != before || slices.ContainsFunc(c.Differences, begins) != different || !different && len(c.Differences) > 0 {
						t.Errorf("%s, about %v: before %q, differences %q", test.rule, about, c.Before, c.Differences)
					}
				}
				command("-A")
				compare(false, false)
				command("-D")
				command("-I")
				compare(test.before, test.different)
				command("-D")
			}
		}
	})
}

func xtablesName(f plan.Family) string {
	return map[plan.Family]string{plan.IPv4: "iptables", plan.IPv6: "ip6tables"}[f]
}

// wayTo is the chain that leads to the leaf with a cluster IP or an external address of the
// Service port; "" without such a chain.
func wayTo(p *Proxier, name plan.ServicePortName) (parent string) {
	for _, e := range p.state.services[name].entries {
		if e.tree != servicesTree {
			continue
		}
		var chains []string
		for c := range p.state.trees[servicesTree].way(e.key) {
			chains = append(chains, c.Name)
		}
		if len(chains) > 1 {
			return chains[len(chains)-2]
		}
	}
	return ""
}

// servedByOneSet returns a Service port with a chain of the nat table that has rules and to
// which another chain leads, and such a chain of another one.
func servedByOneSet(t *testing.T, p *Proxier) (name plan.ServicePortName, own, other string) {
	t.Helper()
	for n, r := range p.state.services {
		for _, c := range p.compiler.servicePort(r.port).chains[nat] {
			switch {
			case len(c.Rules) == 0 || !strings.HasPrefix(c.Name, clusterPrefix):
			case own == "":
				if wayTo(p, n) != "" {
					name, own = n, c.Name
				}
			case n != name:
				return name, own, c.Name
			}
		}
	}
	t.Fatal("the plan has no two Services with endpoints")
	return name, own, other
}
