// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"testing"

	"signalbox/internal/alloctest"
	"signalbox/internal/nstest"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// TestAllocationsOfOneChange moves one endpoint of one Service among 100.
func TestAllocationsOfOneChange(t *testing.T) {
	nstest.Enter(t)
	p := newProxier(t, plan.IPv4)
	desired := conformance.Fleet(plan.IPv4, 100, 10)
	if err := p.Sync(t.Context(), desired, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	round := 0
	alloctest.Check(t, 204, func() {
		round++
		sp := conformance.FleetService(plan.IPv4, 50, 500+round%2, 10)
		desired.Services[sp.Name] = sp
		if err := p.Sync(t.Context(), desired, plan.Change{Services: []plan.ServicePortName{sp.Name}}); err != nil {
			t.Fatal(err)
		}
	})
}
