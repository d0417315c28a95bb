// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"signalbox/nft"
	"signalbox/nft/nfttest"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// TestFailedTransaction: if the table's transaction fails, the table holds what it held
// before. The next Sync writes what is missing.
func TestFailedTransaction(t *testing.T) {
	for _, fault := range nfttest.Faults {
		t.Run(fault.Name, func(t *testing.T) {
			k, w := newFakeIPVS(t), world{plan.IPv4}
			var kernel nfttest.Kernel
			newProxier := func() *Proxier {
				p := k.proxier(t, time.Now)
				table, err := nft.Open(p.IPFamily, tableName, newSets(), kernel.Connection())
				if err != nil {
					t.Fatal(err)
				}
				p.table = table
				return p
			}
			p := newProxier()
			listing := func() string {
				text, err := nfttest.Listing(kernel.Connection())
				if err != nil {
					t.Fatal(err)
				}
				return text
			}
			sync := func(desired *plan.Plan, change plan.Change) {
				t.Helper()
				before := listing()
				fault.Play(&kernel)
				// Virtual servers are written before, so the kernel's state is never known.
				if err := p.Sync(t.Context(), desired, change); !errors.Is(err, proxier.ErrUnknownState) {
					t.Fatalf("error %v, want one that says that the state is unknown", err)
				}
				if diff := cmp.Diff(before, listing()); diff != "" && !fault.IsDone {
					t.Errorf("the failed Sync changed the table (-before +after):\n%s", diff)
				}
				syncAll(t, p, desired)
				repaired := listing()
				syncAll(t, newProxier(), desired)
				if diff := cmp.Diff(repaired, listing()); diff != "" {
					t.Errorf("a new process writes another table (-repaired +anew):\n%s", diff)
				}
			}
			desired, set := w.example(), w.pods(1, 2)
			late := func(affinity time.Duration) *plan.ServicePort {
				sp := w.service("late", plan.TCP, set, local(plan.LoadBalancerIP, w.external(7), 80, set, set))
				sp.AffinityTimeout = affinity
				desired.Services[sp.Name] = sp
				return sp
			}
			sync(desired, plan.Change{All: true})
			sp := late(0)
			sync(desired, plan.Change{Services: []plan.ServicePortName{sp.Name}}) // brings an address
			late(7 * time.Minute)                                                 // needs chains of its own
			sync(desired, plan.Change{Services: []plan.ServicePortName{sp.Name}})
		})
	}
}
