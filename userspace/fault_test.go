// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"signalbox/nft"
	"signalbox/nft/nfttest"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// TestFailedTransaction: what fails changes nothing, or the error says that the kernel's
// state is unknown. The next Sync writes what is missing.
func TestFailedTransaction(t *testing.T) {
	for _, fault := range nfttest.Faults {
		t.Run(fault.Name, func(t *testing.T) {
			w := newWorld(t, plan.IPv4)
			var kernel nfttest.Kernel
			table, err := nft.Open(w.p.family, tableName, makeSets(), kernel.Connection())
			w.must(err)
			w.must(w.p.table.Close()) // that of Linux; the test's end closes the other
			w.p.table = table
			listing := func() string {
				text, err := nfttest.Listing(kernel.Connection())
				w.must(err)
				return text
			}
			sync := func(change plan.Change) {
				t.Helper()
				before, remembered := listing(), w.p.state
				fault.Play(&kernel)
				err := w.p.Sync(t.Context(), w.plan, change)
				if err == nil || errors.Is(err, proxier.ErrUnknownState) == fault.IsKnown {
					t.Fatalf("error %v, and the kernel's state is known: %v", err, fault.IsKnown)
				}
				if diff := cmp.Diff(before, listing()); diff != "" && !fault.IsDone {
					t.Errorf("the failed Sync changed the kernel (-before +after):\n%s", diff)
				}
				if w.p.state != remembered {
					t.Error("the failed Sync changed the state")
				}
				change.All = change.All || !fault.IsKnown
				w.must(w.p.Sync(t.Context(), w.plan, change))
				repaired := listing()
				w.must(w.p.Sync(t.Context(), w.plan, plan.Change{All: true}))
				if diff := cmp.Diff(repaired, listing()); diff != "" {
					t.Errorf("the repaired table differs from one written anew (-repaired +anew):\n%s", diff)
				}
				if n := len(w.p.relay.targets.byID); n != len(w.p.state.ids) {
					t.Errorf("the relay knows %d frontends, the table %d", n, len(w.p.state.ids))
				}
			}
			full := examplePlan(plan.IPv4)
			w.plan.Node = full.Node
			w.plan.Node.LocalhostNodePorts = false
			sync(plan.Change{All: true})
			var change plan.Change
			for name, sp := range full.Services {
				w.plan.Services[name] = sp
				change.Services = append(change.Services, name)
			}
			sync(change)
			delete(w.plan.Services, change.Services[0])
			change.Services = change.Services[:1]
			sync(change)
		})
	}
}
