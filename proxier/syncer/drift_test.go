// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// driftingMode is a mode whose part of the kernel another program changes.
type driftingMode struct {
	*fakeProxier
	changes chan proxier.Writer
	// found and err are the results of Repair.
	found   proxier.Difference
	err     error
	repairs int
}

// errPanic makes Repair panic.
var errPanic = errors.New("panic")

func (m *driftingMode) Watch(ctx context.Context, drifted func(proxier.Writer)) {
	for {
		select {
		case <-ctx.Done():
			return
		case w := <-m.changes:
			drifted(w)
		}
	}
}

func (m *driftingMode) Repair(context.Context) (proxier.Difference, error) {
	m.repairs++
	if m.err == errPanic {
		panic("broken")
	}
	return m.found, m.err
}

// drifting runs a Loop with one Service in the kernel.
func drifting(t *testing.T, found proxier.Difference, err error) (*rig, *driftingMode, *strings.Builder) {
	m, log := &driftingMode{changes: make(chan proxier.Writer), found: found, err: err}, &strings.Builder{}
	b := newRig(t, func(o *LoopOptions) {
		m.fakeProxier = o.Proxiers[plan.IPv4].(*fakeProxier)
		o.Proxiers[plan.IPv4] = m
		o.Logger = slog.New(slog.NewTextHandler(log, nil))
	})
	b.Apply(newService("a", clusterIP(0)))
	b.Synced()
	b.run()
	synctest.Wait()
	return b, m, log
}

// change lets a program change the kernel, and waits until the Loop rests.
func (m *driftingMode) change(program string) {
	m.changes <- proxier.Writer{Name: program, PID: 7}
	time.Sleep(time.Millisecond) // the Loop pauses for as long as its last sync took
	synctest.Wait()
}

// TestRepairs: what Repair returns decides what is written, counted and logged.
func TestRepairs(t *testing.T) {
	for _, test := range []struct {
		name     string
		found    proxier.Difference
		err      error
		repaired bool
		all      bool
		logged   string
	}{
		{"nothing differs", proxier.Difference{}, nil, false, false, ""},
		{"elements differ", proxier.Difference{Objects: []string{"an element"}}, nil, true, false, `process="nft (7)" differences="[an element]"`},
		{"rules differ", proxier.Difference{Objects: []string{"a rule"}, NeedsFullWrite: true}, nil, true, true, `process="nft (7)" differences="[a rule]"`},
		{"the kernel refuses", proxier.Difference{}, errors.New("refused"), true, true, "error=refused"},
		{"the mode panics", proxier.Difference{}, errPanic, true, true, "panic=broken"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, m, log := drifting(t, test.found, test.err)
				calls, reports := len(m.calls), len(b.reports)
				m.change("nft")
				if m.repairs != 1 {
					t.Errorf("%d repairs", m.repairs)
				}
				if wrote := len(m.calls) > calls; wrote != test.all || wrote && !m.calls[calls].change.All {
					t.Errorf("syncs after the repair: %+v", m.calls[calls:])
				}
				reported := len(b.reports) > reports
				if reported != test.repaired || reported && (!b.reports[reports].Repaired || b.reports[reports].All != test.all) {
					t.Errorf("reports: %+v", b.reports[reports:])
				}
				if !strings.Contains(log.String(), test.logged) {
					t.Errorf("the log does not say %s:\n%s", test.logged, log)
				}
				if text := b.Drift(); len(text) > 0 {
					t.Errorf("afterwards health says %q", text)
				}
			})
		})
	}
}

// TestFailingRepair: while full writes fail, health names the program whose change they would
// repair.
func TestFailingRepair(t *testing.T) {
	for name, test := range map[string]struct {
		found proxier.Difference
		err   error
	}{
		"rules differ":       {found: proxier.Difference{Objects: []string{"a rule"}, NeedsFullWrite: true}},
		"the kernel refuses": {err: errors.New("refused")},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, m, _ := drifting(t, test.found, test.err)
				m.setRefuse(func(*plan.Plan, plan.Change) error { return errors.New("no memory") })
				m.change("nft")
				for range 3 {
					if text := b.Drift(); len(text) != 1 || !strings.Contains(text[0], "nft (7)") {
						t.Errorf("while full writes fail, health says %q", text)
					}
					time.Sleep(time.Minute)
				}
				m.setRefuse(nil)
				time.Sleep(time.Minute)
				if text := b.Drift(); len(text) > 0 {
					t.Errorf("after a full write, health says %q", text)
				}
				if last := b.reports[len(b.reports)-1]; !last.Repaired || !last.All {
					t.Errorf("the full write counts as %+v", last)
				}
			})
		})
	}
}

// TestQuietNodeIsNotRead: without a change by others nothing is read back, whatever the
// node's own changes are.
func TestQuietNodeIsNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, m, _ := drifting(t, proxier.Difference{}, nil)
		for n := range 10 {
			b.Apply(newService("b", clusterIP(1+n)))
			time.Sleep(time.Minute)
		}
		synctest.Wait()
		if m.repairs > 0 || len(m.calls) < 11 {
			t.Errorf("%d repairs and %d syncs", m.repairs, len(m.calls))
		}
	})
}

// TestFullWriteRepairs: a full write makes the pending repair needless.
func TestFullWriteRepairs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, m, _ := drifting(t, proxier.Difference{}, nil)
		b.families[0].repairs.Request(proxier.Writer{Name: "nft"})
		if fights, drift := b.Fights(), b.Drift(); len(fights) > 0 || len(drift) != 1 {
			t.Errorf("the fights are %q, and what drifts is %q", fights, drift)
		}
		b.RequestFullWrite()
		time.Sleep(time.Second)
		if _, pending := b.families[0].repairs.Due(); pending || m.repairs > 0 {
			t.Errorf("pending: %v, %d repairs", pending, m.repairs)
		}
	})
}

// TestFight: two programs that undo each other's writes are slowed down and named.
func TestFight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, m, log := drifting(t, proxier.Difference{Objects: []string{"an element"}}, nil)
		end := time.Now().Add(10 * time.Minute)
		for time.Now().Before(end) {
			m.change("firewalld")
			time.Sleep(100 * time.Millisecond)
		}
		if m.repairs < 20 || m.repairs > 40 {
			t.Errorf("%d repairs in ten minutes", m.repairs)
		}
		if fights, drift := b.Fights(), b.Drift(); !slices.Equal(fights, drift) {
			t.Errorf("the fights are %q, and what drifts is %q", fights, drift)
		}
		if text := b.Drift(); len(text) != 1 || !strings.Contains(text[0], "IPv4: the program firewalld ") {
			t.Errorf("health says %q", text)
		}
		if n := strings.Count(log.String(), "undoes what signalbox writes"); n != 1 || !strings.Contains(log.String(), "program=firewalld") {
			t.Errorf("the log names the fight %d times", n)
		}
		if n := strings.Count(log.String(), "another program has changed"); n > 5 {
			t.Errorf("%d log lines about repairs", n)
		}
		time.Sleep(2 * time.Minute)
		if text := b.Drift(); len(text) > 0 {
			t.Errorf("after the fight health says %q", text)
		}
		m.change("firewalld")
		if text := b.Drift(); len(text) > 0 {
			t.Errorf("after one more change health says %q", text)
		}
	})
}
