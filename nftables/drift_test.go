// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"signalbox/internal/nstest"
	"signalbox/nft/access"
	"signalbox/nft/nfttest"
	"signalbox/proxier"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// healer is a Proxier whose table is repaired as the Loop does it.
type healer struct {
	*testing.T
	*Proxier
	desired *plan.Plan
	drifted chan proxier.Writer
}

func newHealer(t *testing.T, desired *plan.Plan) *healer {
	t.Helper()
	h := &healer{t, newProxier(t, desired.Family), desired, make(chan proxier.Writer, 1)}
	h.sync(plan.Change{All: true})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.Watch(ctx, func(w proxier.Writer) {
			select {
			case h.drifted <- w:
			case <-ctx.Done():
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return h
}

func (h *healer) sync(change plan.Change) {
	h.Helper()
	if err := h.Sync(h.Context(), h.desired, change); err != nil {
		h.Fatal(err)
	}
}

// repair waits for a change by nft and repairs it.
func (h *healer) repair() proxier.Difference {
	h.Helper()
	if w := <-h.drifted; w.Name != "nft" || w.PID == 0 {
		h.Errorf("the change is by %s", w)
	}
	found, err := h.Repair(h.Context())
	if err != nil {
		h.Fatal(err)
	}
	if found.NeedsFullWrite {
		h.sync(plan.Change{All: true})
	}
	compareKernel(h, h.Proxier, h.desired.Node)
	return found
}

// TestRepair: what another program changes is found, named and repaired. Service ports
// keep their numbers, so connections with session affinity go on.
func TestRepair(t *testing.T) {
	for _, f := range plan.Families {
		ip, addr := "ip", "10.0.0.99"
		if f == plan.IPv6 {
			ip, addr = "ip6", "fd00::99"
		}
		for _, test := range []struct {
			damage string
			found  string // the beginning of the first text
			all    bool
		}{
			{"flush map " + ip + " signalbox frontends", "set frontends lacks ", false},
			{"add element " + ip + " signalbox rejected { " + addr + " . tcp . 80 }", "set rejected has 1 elements that signalbox did not write", false},
			{"flush map " + ip + " signalbox pick-chains", "set pick-chains lacks ", false},
			{"flush map " + ip + " signalbox endpoints", "set endpoints lacks ", false},
			{"flush chain " + ip + " signalbox nat-prerouting", "chain nat-prerouting has 0 rules instead of ", true},
			{"insert rule " + ip + " signalbox services drop", "chain services has ", true},
			{"add chain " + ip + " signalbox mine", "chain mine is not signalbox's", true},
			{"add set " + ip + " signalbox mine { type mark; }", "set mine is not signalbox's", true},
			{"add table " + ip + " signalbox { flags dormant; }", "the table is dormant", true},
			{"delete table " + ip + " signalbox", "the table is missing", true},
			{"flush ruleset", "the table is missing", true},
		} {
			t.Run(f.String()+"/"+test.damage, func(t *testing.T) {
				nstest.Enter(t)
				h := newHealer(t, examplePlan(f))
				before := expectedElements(h.state)
				nstest.NFT(t, test.damage, "-f", "-")
				found := h.repair()
				if len(found.Objects) == 0 || !strings.HasPrefix(found.Objects[0], test.found) || found.NeedsFullWrite != test.all {
					t.Errorf("found %+v, want %q, everything: %v", found, test.found, test.all)
				}
				if after := expectedElements(h.state); !slices.Equal(before, after) {
					t.Error("Service ports got other numbers")
				}
			})
		}
	}
}

// TestRepairAfterPredecessor: in an update with a surge, the earlier process still writes
// changes that the later one has written. This fails, so it writes everything anew, with
// other numbers. A repair makes the table that of the later process.
func TestRepairAfterPredecessor(t *testing.T) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) {
			nstest.Enter(t)
			desired := conformance.Fleet(f, 20, 4)
			earlier, later := newProxier(t, f), newProxier(t, f)
			sync := func(p *Proxier, change plan.Change) error { return p.Sync(t.Context(), desired, change) }
			err := sync(earlier, plan.Change{All: true})
			if err := errors.Join(err, sync(earlier, changeOf(desired)), sync(later, plan.Change{All: true})); err != nil {
				t.Fatal(err) // the numbers have gaps
			}
			shrink := func(i int) plan.Change {
				s := conformance.FleetService(f, i, 4*i, 3)
				desired.Services[s.Name] = s
				return plan.Change{Services: []plan.ServicePortName{s.Name}}
			}
			change := shrink(5)
			if err := sync(later, change); err != nil {
				t.Fatal(err)
			}
			if err := sync(earlier, change); !errors.Is(err, proxier.ErrUnknownState) {
				t.Fatalf("the earlier process removes an endpoint again: %v", err)
			}
			if err := sync(earlier, plan.Change{All: true}); err != nil {
				t.Fatal(err)
			}
			if found, err := later.Repair(t.Context()); err != nil || len(found.Objects) == 0 || found.NeedsFullWrite {
				t.Fatalf("found %+v, %v", found, err)
			}
			compareKernel(t, later, desired.Node)
			if err := sync(later, shrink(6)); err != nil {
				t.Fatal(err)
			}
			compareKernel(t, later, desired.Node)
		})
	}
}

// TestRepairMany: a table with too many endpoints to compare is written anew.
func TestRepairMany(t *testing.T) {
	nstest.Enter(t)
	h := newHealer(t, examplePlan(plan.IPv4))
	h.maxEndpointsRead = 0
	nstest.NFT(t, "flush map ip signalbox endpoints", "-f", "-")
	if found := h.repair(); !found.NeedsFullWrite || len(found.Objects) != 1 || !strings.HasPrefix(found.Objects[0], "elements, ") {
		t.Errorf("found %+v", found)
	}
}

// TestReplacedRule: a rule in the place of another is found even if the kernel's notification
// is lost.
func TestReplacedRule(t *testing.T) {
	nstest.Enter(t)
	p := newProxier(t, plan.IPv4)
	if err := p.Sync(t.Context(), examplePlan(plan.IPv4), plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	nstest.NFT(t, "flush chain ip signalbox filter-output\nadd rule ip signalbox filter-output accept", "-f", "-")
	found, err := p.Repair(t.Context())
	compared, err2 := p.Compare(t.Context())
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	for what, differences := range map[string][]string{"Repair": found.Objects, "Compare": compared.Differences} {
		if len(differences) != 1 || !strings.HasPrefix(differences[0], "chain filter-output has another rule, with handle ") {
			t.Errorf("%s finds %q", what, differences)
		}
	}
	if !found.NeedsFullWrite {
		t.Error("nothing is written")
	}
}

// TestNothingDiffers: a change that was taken back costs one comparison and no write.
func TestNothingDiffers(t *testing.T) {
	nstest.Enter(t)
	h := newHealer(t, examplePlan(plan.IPv4))
	const element = "element ip signalbox rejected { 10.0.0.99 . tcp . 80 }"
	nstest.NFT(t, "add "+element+"\ndelete "+element, "-f", "-")
	before := nstest.Generation(t)
	if found := h.repair(); len(found.Objects) > 0 {
		t.Errorf("found %q", found.Objects)
	}
	if n := nstest.Generation(t) - before; n > 0 {
		t.Errorf("%d transactions", n)
	}
}

// TestOwnWritesDoNotDrift: after own writes, small and large, the next report is of a
// foreign change, and is not of rules.
func TestOwnWritesDoNotDrift(t *testing.T) {
	nstest.Enter(t)
	h := newHealer(t, conformance.Fleet(plan.IPv4, 500, 4))
	for range 3 {
		h.sync(changeOf(h.desired))
		h.desired = conformance.Fleet(plan.IPv4, 500, 4)
		h.sync(plan.Change{All: true})
	}
	runNft(t, "add", "element", "ip", tableName, "rejected", "{ 10.0.0.99 . tcp . 80 }")
	if found := h.repair(); found.NeedsFullWrite || len(found.Objects) != 1 {
		t.Errorf("found %+v, want the foreign element alone", found)
	}
	select {
	case w := <-h.drifted:
		t.Errorf("another report, by %s", w)
	default:
	}
}

// TestRepairFails: the kernel keeps what it has, and the error reaches the caller.
func TestRepairFails(t *testing.T) {
	for _, fault := range nfttest.Faults {
		t.Run(fault.Name, func(t *testing.T) {
			var kernel nfttest.Kernel
			desired := conformance.Fleet(plan.IPv4, 5, 3)
			p := playedProxier(t, plan.IPv4, &kernel)
			p.watch = access.NewWatch(p.table)
			if err := p.Sync(t.Context(), desired, plan.Change{All: true}); err != nil {
				t.Fatal(err)
			}
			other := playedProxier(t, plan.IPv4, &kernel)
			other.table.FlushSet(endpoints)
			if err := other.table.Commit(); err != nil {
				t.Fatal(err)
			}
			fault.Play(&kernel)
			if found, err := p.Repair(t.Context()); err == nil {
				t.Fatalf("no error, found %+v", found)
			}
			if err := p.Sync(t.Context(), desired, plan.Change{All: true}); err != nil {
				t.Fatal(err)
			}
			adoptsAll(t, &kernel, desired)
		})
	}
}

// TestCompareWritesNothing: Compare names each element that differs, as nft writes it.
func TestCompareWritesNothing(t *testing.T) {
	for f, foreign := range map[plan.Family]string{plan.IPv4: "10.0.0.99 . tcp . 80", plan.IPv6: "fd00::99 . tcp . 80"} {
		t.Run(f.String(), func(t *testing.T) {
			nstest.Enter(t)
			p, desired := newProxier(t, f), examplePlan(f)
			if _, err := p.Compare(t.Context()); !errors.Is(err, proxier.ErrNothingWritten) {
				t.Errorf("before the first write, Compare says %v", err)
			}
			if err := p.Sync(t.Context(), desired, plan.Change{All: true}); err != nil {
				t.Fatal(err)
			}
			compare := func(about ...plan.ServicePortName) []string {
				t.Helper()
				c, err := p.Compare(t.Context(), about...)
				if err != nil {
					t.Fatal(err)
				}
				return c.Differences
			}
			for name := range desired.Services {
				if c, err := p.Compare(t.Context(), name); err != nil || len(c.Differences) > 0 || len(c.Holds) == 0 {
					t.Errorf("about %s: %+v, %v", name, c, err)
				}
			}
			if lines := compare(); len(lines) > 0 {
				t.Errorf("before the damage: %q", lines)
			}
			nstest.NFT(t, "flush map "+p.Word+" signalbox frontends\nadd element "+p.Word+" signalbox rejected { "+foreign+" }", "-f", "-")
			before := nstest.Generation(t)
			lines := compare()
			added := "+element " + p.Word + " signalbox rejected { " + foreign + " }"
			missing := slices.DeleteFunc(slices.Clone(lines), func(line string) bool { return !strings.HasPrefix(line, "-element "+p.Word+" signalbox frontends { ") })
			if !slices.Contains(lines, added) || len(missing) == 0 || len(missing) != len(lines)-1 {
				t.Errorf("the differences are %q", lines)
			}
			// Each Service is told of its own elements, and of no other's.
			told := 0
			for name := range desired.Services {
				for _, line := range compare(name) {
					told++
					if !slices.Contains(missing, line) || !strings.Contains(line, fmt.Sprintf("%q", name.String())) {
						t.Errorf("about %s: %s", name, line)
					}
				}
			}
			if told != len(missing) {
				t.Errorf("of %d missing elements, the Services are told of %d", len(missing), told)
			}
			nstest.NFT(t, "add chain "+p.Word+" signalbox mine", "-f", "-")
			if lines := compare(); !slices.Contains(lines, "chain mine is not signalbox's") {
				t.Errorf("with a foreign chain: %q", lines)
			}
			if n := nstest.Generation(t) - before; n != 1 {
				t.Errorf("%d transactions, and nft made one", n)
			}
		})
	}
}
