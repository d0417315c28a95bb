// SPDX-License-Identifier: Apache-2.0

package budget

import (
	"testing"
	"time"
)

// TestBudget plays a storm: each sync takes processor time, and pauses keep the average at
// the share. A lone change before and after it does not wait.
func TestBudget(t *testing.T) {
	const share = 0.1
	now, used := time.Unix(0, 0), time.Duration(0)
	b := New(share)
	b.now, b.used = func() time.Time { return now }, func() time.Duration { return used }
	used = 5 * time.Second // the start
	if d := b.Pause(); d != 0 {
		t.Fatalf("a pause of %v after the start", d)
	}
	lone := func(when string) {
		t.Helper()
		now = now.Add(time.Minute)
		used += 20 * time.Millisecond
		if d := b.Pause(); d != 0 {
			t.Errorf("%s: a lone change is followed by a pause of %v", when, d)
		}
	}
	lone("before the storm")
	began, before := now, used
	for now.Sub(began) < 10*time.Minute {
		now, used = now.Add(30*time.Millisecond), used+30*time.Millisecond
		now = now.Add(b.Pause())
	}
	// The savings of the time before are spent once.
	if got, most := used-before, time.Duration(share*float64(now.Sub(began)+budgetWindow))+30*time.Millisecond; got > most {
		t.Errorf("the storm took %v of processor time, more than %v", got, most)
	}
	if got, least := used-before, time.Duration(0.9*share*float64(now.Sub(began))); got < least {
		t.Errorf("the storm took only %v of processor time: the pauses are too long", got)
	}
	lone("after the storm")
	used += time.Hour
	if d := b.Pause(); d != maxBudgetPause {
		t.Errorf("a pause of %v", d)
	}
	if d := New(0).Pause(); d != 0 {
		t.Errorf("no limit, and a pause of %v", d)
	}
}

func TestProcessorTime(t *testing.T) {
	before, end := processorTime(), time.Now().Add(10*time.Second)
	for processorTime() == before { // this very loop takes some
		if time.Now().After(end) {
			t.Fatal("a busy loop of 10 s took no processor time")
		}
	}
}
