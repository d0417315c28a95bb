// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"slices"
	"time"

	"signalbox/proxier/plan"
)

// collectProblems asks the mode about the Service ports that it has just written.
func (f *familyLoop) collectProblems(desired *plan.Plan, change plan.Change) {
	if !change.All {
		for _, name := range change.Services {
			f.collectProblem(name)
		}
		return
	}
	for name := range f.problemOf {
		if desired.Services[name] == nil {
			f.collectProblem(name)
		}
	}
	for name := range desired.Services {
		f.collectProblem(name)
	}
}

func (f *familyLoop) collectProblem(name plan.ServicePortName) {
	p, found := f.proxier.Problem(name)
	if f.problems.replace(f.problemOf[name], p, found) {
		f.opts.Report(p)
	}
	if found {
		f.problemOf[name] = p
	} else {
		delete(f.problemOf, name)
	}
}

// updateProblems asks the mode again about the Service ports that had a problem. Modes
// solve some without a sync: they listen again at a NodePort that another program had.
func (f *familyLoop) updateProblems() {
	for name := range f.problemOf {
		f.collectProblem(name)
	}
}

// modeProblems has each Problem that modes report.
type modeProblems map[plan.Problem]modeProblem

// modeProblem counts the Service ports for which modes report a Problem.
type modeProblem struct {
	ports int
	since time.Time // of the first report
}

// replace counts p, if found, instead of old, which may be none. It says whether p is
// new.
func (s modeProblems) replace(old, p plan.Problem, found bool) (isNew bool) {
	if found {
		isNew = s.count(p, 1)
	}
	s.count(old, -1)
	return isNew
}

func (s modeProblems) count(p plan.Problem, change int) (isNew bool) {
	before, known := s[p]
	if ports := before.ports + change; ports > 0 {
		s[p] = modeProblem{ports, earliest(before.since, time.Now())}
	} else {
		delete(s, p)
	}
	return !known
}

// maxTriggers bounds the memory for trigger times while all syncs fail.
const maxTriggers = 10000

// queued records the time of the oldest event that a sync has read, and the trigger
// times of its EndpointSlices.
func (f *familyLoop) queued(since time.Time, triggers []time.Time) {
	f.since = earliest(f.since, since)
	f.triggers = append(f.triggers, triggers...)
	if n := len(f.triggers) - maxTriggers; n > 0 {
		f.triggers = slices.Delete(f.triggers, 0, n)
	}
}

// ended records the outcome of a turn.
func (f *familyLoop) ended(err error) {
	f.failure = err
	if err == nil {
		f.failingSince = time.Time{}
	} else {
		f.failingSince = earliest(f.failingSince, time.Now())
	}
}

// report completes a report and delivers it.
func (f *familyLoop) report(r SyncReport) {
	f.checkBacklog()
	f.ended(r.Err)
	r.All, r.Quarantined, r.Totals, r.NodePortAddrs = f.triedFullWrite, f.portCount(), f.planner.totals.Totals, f.planner.plan.Node.NodePortAddrs
	r.Repaired, f.repaired = f.repaired, false
	if r.Current = f.current; r.Current {
		r.Queued, r.Triggers = f.since, f.triggers
		r.HealthChecks = f.planner.totals.changedHealthChecks()
		f.since, f.triggers = time.Time{}, nil
	}
	r.Kernel = f.proxier.Counts()
	if f.opts.Synced != nil {
		f.opts.Synced(r)
	}
}
