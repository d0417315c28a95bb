// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"signalbox/proxier/plan"
)

// quarantine has the Service ports of one family that the kernel refuses. Syncs of
// other changes leave them out. They are tried again when they change, and after
// growing pauses.
type quarantine struct {
	quarantinedPorts map[plan.ServicePortName]failure
	// portCounts counts the quarantined ports of each Service.
	portCounts map[plan.ServiceName]int
	// retries are groups of quarantined ports to try; the first is next.
	retries [][]plan.ServicePortName
	// searchesPorts says that in this turn the kernel refused a whole Service, whose
	// ports have not been tried in smaller groups.
	searchesPorts bool
	// familyCounts counts, for each Service, the families in which it is in
	// quarantine. All families share it, because one report is enough.
	familyCounts map[plan.ServiceName]int
	// oversized has the Services that are too large.
	oversized map[plan.ServiceName]oversized
	// failures has the first error of each Service in this turn.
	failures map[plan.ServiceName]error
}

// failure is the kernel's answer to one Service port, or to a group with it.
type failure struct {
	port  *plan.ServicePort // what was refused; nil for its removal
	err   error
	since time.Time // of the quarantine
}

// oversized is a Service beyond a bound.
type oversized struct {
	ports  int // that the object declares
	reason string
	since  time.Time
}

func newQuarantine(familyCounts map[plan.ServiceName]int) quarantine {
	return quarantine{
		quarantinedPorts: map[plan.ServicePortName]failure{}, portCounts: map[plan.ServiceName]int{}, familyCounts: familyCounts, oversized: map[plan.ServiceName]oversized{},
		failures: map[plan.ServiceName]error{},
	}
}

// putInQuarantine quarantines a group that the kernel refused. A Service is reported
// with its first port.
func (f *familyLoop) putInQuarantine(group []plan.ServicePortName, err error) {
	for _, name := range group {
		service := name.ServiceName
		if _, failed := f.failures[service]; !failed {
			f.failures[service] = fmt.Errorf("Service %s: %w", name, err)
		}
		before, already := f.quarantinedPorts[name]
		f.quarantinedPorts[name] = failure{f.planner.plan.Services[name], err, earliest(before.since, time.Now())}
		if already {
			continue
		}
		f.portCounts[service]++
		if f.portCounts[service] == 1 {
			f.reportQuarantined(service, err)
		}
	}
}

// reportQuarantined reports a Service, unless another family has reported it.
func (f *familyLoop) reportQuarantined(service plan.ServiceName, err error) {
	if !f.enter(service) {
		return
	}
	f.opts.Report(plan.Problem{
		Kind: "Service", Object: service.String(), Field: "spec.ports",
		Reason: fmt.Sprintf("%s rules could not be written: %v; the kernel keeps the earlier rules, and signalbox tries again, port by port", f.family, err),
	})
}

// enter counts a family in which a Service is in quarantine. It says whether this is
// the first.
func (r *quarantine) enter(service plan.ServiceName) (first bool) {
	r.familyCounts[service]++
	return r.familyCounts[service] == 1
}

// leave undoes enter, and says whether this was the last family.
func (r *quarantine) leave(service plan.ServiceName) (last bool) {
	if r.familyCounts[service]--; r.familyCounts[service] > 0 {
		return false
	}
	delete(r.familyCounts, service)
	return true
}

// release ends the quarantine of a Service port.
func (f *familyLoop) release(name plan.ServicePortName) {
	if _, refused := f.quarantinedPorts[name]; !refused {
		return
	}
	delete(f.quarantinedPorts, name)
	service := name.ServiceName
	if f.portCounts[service]--; f.portCounts[service] > 0 {
		return
	}
	delete(f.portCounts, service)
	if f.leave(service) {
		f.log.Info("the kernel refuses nothing of a Service any more", "service", service.String())
	}
}

// prune releases Service ports that are no longer changed.
func (f *familyLoop) prune() {
	for name := range f.quarantinedPorts {
		if _, changed := f.planner.changed[name]; !changed {
			f.release(name)
		}
	}
}

// retry tries quarantined Service ports again: all together, then by halves for as
// long as the turn allows. The next retry continues there.
func (f *familyLoop) retry(ctx context.Context, a *allowance) (progress bool) {
	f.each(ctx, a, func() bool {
		if len(f.retries) == 0 {
			return false
		}
		group := f.withLinked(slices.DeleteFunc(f.retries[0], func(name plan.ServicePortName) bool { _, refused := f.quarantinedPorts[name]; return !refused }))
		f.retries = f.retries[1:]
		if len(group) == 0 {
			return true
		}
		halves, _ := f.halves(group)
		if len(halves) > 0 && f.entries(group...) > sliceEntries {
			f.retries = append(f.retries, halves...)
			return true
		}
		switch err := f.write(ctx, a, group); {
		case err == nil:
			progress = true
		case ctx.Err() == nil:
			f.putInQuarantine(group, err)
			f.retries = append(f.retries, halves...)
		}
		return true
	})
	return progress
}

// portCount returns the number of Service ports in quarantine.
func (r *quarantine) portCount() int {
	n := len(r.quarantinedPorts)
	for _, o := range r.oversized {
		n += o.ports
	}
	return n
}

// drainFailures returns the failures of this turn as one error.
func (f *familyLoop) drainFailures() error {
	var failed []error
	for _, name := range slices.SortedFunc(maps.Keys(f.failures), plan.ServiceName.Compare) {
		failed = append(failed, f.failures[name])
	}
	clear(f.failures)
	return errors.Join(failed...)
}

// checkSize quarantines a Service that is too large. It returns a report, unless the
// Service is too large in another family already.
func (f *familyLoop) checkSize(s plan.ServiceName, ports int, tooLarge string) (found []plan.Problem) {
	before, was := f.oversized[s]
	switch {
	case tooLarge == "" && was:
		delete(f.oversized, s)
		f.leave(s)
	case tooLarge != "":
		f.oversized[s] = oversized{ports, tooLarge, earliest(before.since, time.Now())}
		if !was && f.enter(s) {
			found = append(found, plan.Problem{Kind: "Service", Object: s.String(), Field: "spec", Reason: tooLarge + "; the Service is not served until it is smaller"})
		}
	}
	return found
}
