// SPDX-License-Identifier: Apache-2.0

// Package budget bounds the processor time of a process by pauses.
package budget

import (
	"time"

	"golang.org/x/sys/unix"
)

const (
	// budgetWindow is for how long unused processor time is saved. A lone change does not
	// wait, because nothing has used up the savings.
	budgetWindow = 10 * time.Second
	// maxBudgetPause bounds a pause. One piece of work can take more processor time than the
	// share allows for minutes, and changes must not wait for that long.
	maxBudgetPause = 10 * time.Second
)

// Budget keeps the average processor time of the process, and of the programs that it
// runs, below a share.
type Budget struct {
	share float64 // of one processor; 0 for no limit
	now   func() time.Time
	used  func() time.Duration // processor time so far

	lastAt   time.Time
	lastUsed time.Duration
	// debt is the processor time beyond the share; it is negative while there are savings.
	debt time.Duration
}

// New returns a Budget for a share of one processor; 0 for no limit.
func New(share float64) *Budget { return Of(share, processorTime) }

// Of returns a Budget for a share of one processor. used is the processor time so far.
func Of(share float64, used func() time.Duration) *Budget {
	return &Budget{share: share, now: time.Now, used: used}
}

// Pause returns how long the next piece of work should wait.
func (b *Budget) Pause() time.Duration {
	if b.share == 0 {
		return 0
	}
	now, used := b.now(), b.used()
	if !b.lastAt.IsZero() { // the start is not part of the account
		b.debt += (used - b.lastUsed) - b.of(now.Sub(b.lastAt))
		b.debt = max(b.debt, -b.of(budgetWindow))
	}
	b.lastAt, b.lastUsed = now, used
	if b.debt <= 0 {
		return 0
	}
	return min(time.Duration(float64(b.debt)/b.share), maxBudgetPause)
}

// of is the processor time that the share grants in a time.
func (b *Budget) of(d time.Duration) time.Duration { return time.Duration(b.share * float64(d)) }

// processorTime is that of this process and of the programs that it ran and waited for.
func processorTime() (total time.Duration) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var r unix.Rusage
		_ = unix.Getrusage(who, &r) // fails only for a bad argument
		total += time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	return total
}
