// SPDX-License-Identifier: Apache-2.0

// Package alloctest guards hot paths: a test fails if the code allocates more often than a
// baseline beside it says. Allocations, unlike seconds, do not depend on the machine.
package alloctest

import "testing"

const (
	runs = 100
	// growth is what a baseline allows: the runtime and maps that grow allocate by chance.
	growth = 1.1
)

// Check runs a hot path again and again. baseline is how often one run allocates; a
// change that lowers it should lower the baseline, too.
func Check(t *testing.T, baseline float64, run func()) {
	t.Helper()
	got := testing.AllocsPerRun(runs, run)
	if got > growth*baseline+1 {
		t.Errorf("one run allocates %.0f times, and the baseline is %.0f", got, baseline)
	}
	if got < baseline/growth-1 {
		t.Logf("one run allocates only %.0f times: lower the baseline from %.0f", got, baseline)
	}
}
