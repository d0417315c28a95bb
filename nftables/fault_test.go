// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"signalbox/internal/nstest"
	"signalbox/nft"
	"signalbox/nft/nfttest"
	"signalbox/proxier"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// playedProxier is a Proxier whose table is in a played kernel.
func playedProxier(t *testing.T, f plan.Family, kernel *nfttest.Kernel) *Proxier {
	t.Helper()
	p := newProxier(t, f)
	table, err := nft.Open(p.IPFamily, tableName, allSets, kernel.Connection())
	if err != nil {
		t.Fatal(err)
	}
	p.table.Close() // that of Linux; the test's end closes the other
	p.table = table
	return p
}

func listing(t *testing.T, kernel *nfttest.Kernel) string {
	t.Helper()
	text, err := nfttest.Listing(kernel.Connection())
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// adoptsAll fails unless a new process finds nothing to write.
func adoptsAll(t *testing.T, kernel *nfttest.Kernel, desired *plan.Plan) {
	t.Helper()
	before := kernel.Generation()
	p := playedProxier(t, desired.Family, kernel)
	if err := p.Sync(t.Context(), desired, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	if n := kernel.Generation() - before; n != 0 {
		t.Errorf("a new process needs %d transactions", n)
	}
	compareMeaning(t, p.state, desired)
}

// changeOf changes Services so that chains and elements come and go.
func changeOf(desired *plan.Plan) plan.Change {
	larger, sticky := conformance.FleetService(desired.Family, 1, 10, 40), conformance.FleetService(desired.Family, 2, 20, 3)
	sticky.AffinityTimeout = time.Hour
	gone := conformance.FleetService(desired.Family, 3, 0, 1).Name
	desired.Services[larger.Name], desired.Services[sticky.Name] = larger, sticky
	delete(desired.Services, gone)
	return plan.Change{Services: []plan.ServicePortName{larger.Name, sticky.Name, gone}}
}

// TestFailedTransaction: what fails changes nothing, or the error says that the kernel's
// state is unknown. The next Sync writes what is missing.
func TestFailedTransaction(t *testing.T) {
	for _, fault := range nfttest.Faults {
		t.Run(fault.Name, func(t *testing.T) {
			var kernel nfttest.Kernel
			desired := conformance.Fleet(plan.IPv4, 5, 3)
			p := playedProxier(t, plan.IPv4, &kernel)
			sync := func(change plan.Change) {
				t.Helper()
				before, remembered := listing(t, &kernel), p.state
				fault.Play(&kernel)
				err := p.Sync(t.Context(), desired, change)
				if err == nil || errors.Is(err, proxier.ErrUnknownState) == fault.IsKnown {
					t.Fatalf("error %v, and the kernel's state is known: %v", err, fault.IsKnown)
				}
				if diff := cmp.Diff(before, listing(t, &kernel)); diff != "" && !fault.IsDone {
					t.Errorf("the failed Sync changed the kernel (-before +after):\n%s", diff)
				}
				if p.state != remembered {
					t.Error("the failed Sync changed the state")
				}
				change.All = change.All || !fault.IsKnown
				if err := p.Sync(t.Context(), desired, change); err != nil {
					t.Fatal(err)
				}
				adoptsAll(t, &kernel, desired)
			}
			sync(plan.Change{All: true})
			sync(changeOf(desired))
		})
	}
}

// TestEachMessageRefused refuses the messages of one transaction, one after the other.
func TestEachMessageRefused(t *testing.T) {
	var kernel nfttest.Kernel
	desired := conformance.Fleet(plan.IPv6, 5, 3)
	p := playedProxier(t, plan.IPv6, &kernel)
	if err := p.Sync(t.Context(), desired, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	before, remembered := listing(t, &kernel), expectedElements(p.state)
	change := changeOf(desired)
	for n := 0; ; n++ {
		kernel.RefuseMessage(n, unix.ENOMEM)
		if err := p.Sync(t.Context(), desired, change); err == nil {
			if n < 5 {
				t.Errorf("the transaction has %d messages", n)
			}
			break
		}
		if diff := cmp.Diff(before, listing(t, &kernel)); diff != "" {
			t.Fatalf("message %d is refused, and the kernel changes:\n%s", n, diff)
		}
		if diff := cmp.Diff(remembered, expectedElements(p.state)); diff != "" {
			t.Fatalf("message %d is refused, and the state changes:\n%s", n, diff)
		}
	}
	kernel.Refuse = nil
	adoptsAll(t, &kernel, desired)
}

// TestOtherWriter has other software empty a map between two transactions.
func TestOtherWriter(t *testing.T) {
	var kernel nfttest.Kernel
	desired := conformance.Fleet(plan.IPv4, 5, 3)
	p, other := playedProxier(t, plan.IPv4, &kernel), playedProxier(t, plan.IPv4, &kernel)
	if err := p.Sync(t.Context(), desired, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	other.table.FlushSet(endpoints)
	if err := other.table.Commit(); err != nil {
		t.Fatal(err)
	}
	before := listing(t, &kernel)
	if err := p.Sync(t.Context(), desired, changeOf(desired)); !errors.Is(err, proxier.ErrUnknownState) {
		t.Fatalf("error %v, want one that says that the state is unknown", err)
	}
	if diff := cmp.Diff(before, listing(t, &kernel)); diff != "" {
		t.Errorf("the failed Sync changed the kernel:\n%s", diff)
	}
	if err := p.Sync(t.Context(), desired, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	adoptsAll(t, &kernel, desired)
}

// TestPlayedKernelAgrees runs the mode on Linux and on the played kernel, and compares.
func TestPlayedKernelAgrees(t *testing.T) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) {
			nstest.Enter(t)
			var kernel nfttest.Kernel
			g := generator{rand.New(rand.NewPCG(3, uint64(f))), f}
			desired := &plan.Plan{Family: f, Node: g.node(), Services: map[plan.ServicePortName]*plan.ServicePort{}}
			var linux, played *Proxier
			for i := range 60 {
				change := g.step(desired)
				desired.Node.LocalhostNodePorts = false // both would listen at the same ports
				if i%15 == 0 {
					linux, played = newProxier(t, f), playedProxier(t, f, &kernel)
				}
				for _, p := range []*Proxier{linux, played} {
					if err := p.Sync(t.Context(), desired, change); err != nil {
						t.Fatal(err)
					}
				}
				want, err := nfttest.Listing()
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, listing(t, &kernel)); diff != "" {
					t.Fatalf("step %d (-Linux +played):\n%s", i, diff)
				}
			}
		})
	}
}
