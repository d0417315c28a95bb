// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"testing"

	"signalbox/internal/alloctest"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// TestAllocationsOfOneChange moves one endpoint of one Service among 100.
func TestAllocationsOfOneChange(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	desired := conformance.Fleet(plan.IPv4, 100, 10)
	w.must(w.p.Sync(t.Context(), desired, plan.Change{All: true}))
	round := 0
	alloctest.Check(t, 30, func() {
		round++
		sp := conformance.FleetService(plan.IPv4, 50, 500+round%2, 10)
		desired.Services[sp.Name] = sp
		w.must(w.p.Sync(t.Context(), desired, plan.Change{Services: []plan.ServicePortName{sp.Name}}))
	})
}
