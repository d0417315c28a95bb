// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"testing"
	"time"

	"signalbox/internal/alloctest"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// TestAllocationsOfOneChange moves one endpoint of one Service among 100. IPVS is played,
// and so is part of the figure.
func TestAllocationsOfOneChange(t *testing.T) {
	p := newFakeIPVS(t).proxier(t, time.Now)
	desired := conformance.Fleet(plan.IPv4, 100, 10)
	syncAll(t, p, desired)
	round := 0
	alloctest.Check(t, 95, func() {
		round++
		syncOne(t, p, desired, conformance.FleetService(plan.IPv4, 50, 500+round%2, 10))
	})
}
