package daemon

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"signalbox/modes"
	"signalbox/proxier/plan"
)

// What could not be removed is tried again, and told of until it is gone; not
// so what may be another kube-proxy's by then.
func TestFailedRemovalIsRepeated(t *testing.T) {
	var log strings.Builder
	present := false
	l := newForeignRules(foreignRulesOptions{
		choice:  modes.Choice{Families: []plan.Family{plan.IPv4}},
		present: func(_ plan.Family, is bool) { present = is },
		log:     slog.New(slog.NewTextHandler(&log, nil)),
	})
	l.removeUntil = time.Now().Add(time.Hour)
	tries := map[string]int{}
	failing := func(what string, times int, kubeProxy bool) removal {
		return removal{what: what, kubeProxy: kubeProxy, remove: func(plan.Family) (bool, int, error) {
			if tries[what]++; tries[what] <= times {
				return false, 0, errors.New("busy")
			}
			return true, 0, nil
		}}
	}
	l.remove(plan.IPv4, []removal{failing("ours", 2, false), failing("theirs", 1, true), failing("nothing", 0, false)})
	l.reportPresent()
	if !present {
		t.Error("nobody is told of what could not be removed")
	}
	l.removeUntil = time.Now().Add(-time.Hour)
	l.removeAgain(plan.IPv4)
	l.removeAgain(plan.IPv4)
	l.removeAgain(plan.IPv4)
	if tries["ours"] != 3 || tries["theirs"] != 1 || tries["nothing"] != 1 {
		t.Errorf("tried %v", tries)
	}
	l.reportPresent()
	if !present {
		t.Error("what is kube-proxy's is taken for removed")
	}
	l.removeUntil = time.Now().Add(time.Hour)
	l.removeAgain(plan.IPv4)
	l.reportPresent()
	if present {
		t.Error("all is removed and nobody is told")
	}
	if n := strings.Count(log.String(), "WARN"); n != 2 {
		t.Errorf("%d warnings about two things:\n%s", n, &log)
	}
}
