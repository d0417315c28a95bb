// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"strings"
	"testing"
	"time"

	"signalbox/proxier"
)

// clock is the time of a test.
type clock struct{ time.Time }

func newRepairs() (*Repairs, *clock) {
	c := &clock{time.Unix(1_000_000, 0)}
	r := New()
	r.now, r.ownName = func() time.Time { return c.Time }, "signalbox"
	return r, c
}

var nft = proxier.Writer{Name: "nft", PID: 7}

// wait returns how long the pending repair waits.
func (c *clock) wait(t *testing.T, r *Repairs) time.Duration {
	t.Helper()
	at, pending := r.Due()
	if !pending {
		t.Fatal("no repair is pending")
	}
	return max(0, at.Sub(c.Time))
}

func TestLoneRepair(t *testing.T) {
	r, _ := newRepairs()
	if _, due := r.Begin(); due || r.Condition() != "" {
		t.Error("a repair is due without a request")
	}
	r.Request(nft)
	if !strings.Contains(r.Condition(), "nft (7)") {
		t.Errorf("the condition is %q", r.Condition())
	}
	if w, due := r.Begin(); !due || w != nft {
		t.Errorf("due %v, of %s", due, w)
	}
	unfinished := func(what string, want bool) {
		t.Helper()
		if _, pending := r.Due(); pending || strings.Contains(r.Condition(), "nft (7)") != want {
			t.Errorf("%s: pending %v, and the condition is %q", what, pending, r.Condition())
		}
	}
	unfinished("in the repair", true)
	r.Succeeded()
	unfinished("after the repair", false)
	r.Request(nft)
	r.Cancel()
	if _, due := r.Begin(); due {
		t.Error("a repair is due beside a full write")
	}
	unfinished("in a full write", true)
	r.Succeeded()
	unfinished("after a full write", false)
}

// TestRest: after a comparison that took long, the next one waits, also for a change
// during the comparison.
func TestRest(t *testing.T) {
	r, c := newRepairs()
	r.Request(nft)
	r.Begin()
	c.Time = c.Add(time.Second)
	r.Request(nft)
	r.End()
	if wait := c.wait(t, r); wait != restFactor*time.Second {
		t.Errorf("the next repair waits %s", wait)
	}
	if _, due := r.Begin(); due {
		t.Error("the next repair does not wait")
	}
	c.Time = c.Add(restFactor * time.Second)
	if _, due := r.Begin(); !due {
		t.Error("the next repair is not due after the pause")
	}
}

// TestFight: repairs of a program that undoes them wait longer and longer, until it
// ends for a minute.
func TestFight(t *testing.T) {
	r, c := newRepairs()
	for n := 1; n < fightRepairs; n++ {
		r.Request(nft)
		if wait := c.wait(t, r); wait != 0 {
			t.Errorf("repair %d waits %s", n, wait)
		}
		r.Begin()
		if pause, isNew := r.Repaired(nft); pause != 0 || isNew {
			t.Errorf("repair %d counts as a fight", n)
		}
		c.Time = c.Add(time.Second)
	}
	if pause, isNew := r.Repaired(nft); pause != firstPause || !isNew {
		t.Errorf("pause %s, new: %v", pause, isNew)
	}
	for _, want := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		r.Request(nft)
		if wait := c.wait(t, r); wait != want*time.Second {
			t.Errorf("in the fight, the repair waits %s, want %ds", wait, want)
		}
		if _, due := r.Begin(); due {
			t.Error("the repair does not wait")
		}
		if !strings.Contains(r.Condition(), "program nft ") {
			t.Errorf("the condition is %q", r.Condition())
		}
		c.Time = c.Add(want * time.Second)
		if _, due := r.Begin(); !due {
			t.Error("the repair is not due after the pause")
		}
		if _, isNew := r.Repaired(nft); isNew {
			t.Error("the fight begins again")
		}
	}
	r.Succeeded()
	c.Time = c.Add(fightTime + time.Second)
	if text := r.Condition(); text != "" {
		t.Errorf("a minute later the condition is %q", text)
	}
	r.Request(nft)
	if wait := c.wait(t, r); wait != 0 {
		t.Errorf("after the fight, a repair waits %s", wait)
	}
}

// TestSeveralPrograms: repairs of different programs' changes are no fight.
func TestSeveralPrograms(t *testing.T) {
	r, _ := newRepairs()
	for n := range 3 * fightRepairs {
		if pause, _ := r.Repaired(proxier.Writer{Name: string(rune('a' + n))}); pause != 0 {
			t.Errorf("repair %d: pause %s", n, pause)
		}
	}
}

// TestOwnName: another signalbox gets time to take the node over. Another program's
// change does not wait with it.
func TestOwnName(t *testing.T) {
	r, c := newRepairs()
	r.Request(proxier.Writer{Name: "signalbox"})
	if wait := c.wait(t, r); wait != ownNamePause {
		t.Errorf("the repair waits %s", wait)
	}
	r.Request(nft)
	if wait := c.wait(t, r); wait != 0 {
		t.Errorf("with another program's change, the repair waits %s", wait)
	}
}

// TestRequestNow: a repair at a takeover does not wait, whatever a pending one waits for.
func TestRequestNow(t *testing.T) {
	r, c := newRepairs()
	r.Request(nft)
	r.Begin()
	c.Time = c.Add(time.Second)
	r.End()
	predecessor := proxier.Writer{Name: "signalbox"}
	r.Request(predecessor)
	r.RequestNow()
	if w, due := r.Begin(); !due || w != predecessor {
		t.Errorf("due %v, of %s", due, w)
	}
	r.RequestNow()
	if w, due := r.Begin(); !due || w != (proxier.Writer{}) {
		t.Errorf("without a change that was noticed: due %v, of %s", due, w)
	}
}
