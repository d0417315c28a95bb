// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"testing"

	"signalbox/internal/alloctest"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// TestAllocationsOfOneChange is signalbox's own part of one changed Service among 100; the
// rest is the tools' and the kernel's.
func TestAllocationsOfOneChange(t *testing.T) {
	desired := conformance.Fleet(plan.IPv4, 100, endpointsEach)
	s, _ := stateOf(t, desired)
	round := 0
	alloctest.Check(t, 156, func() {
		round++
		s.change(desired, moved(desired, round%2)).commit()
	})
}
