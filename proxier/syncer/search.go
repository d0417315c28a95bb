// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"context"
	"slices"
	"time"

	"signalbox/proxier/plan"
)

// Bounds of a turn, beside its small changes and one group of each kind. The search
// continues in the next turn, after new changes.
const (
	maxTries = 16
	maxTurn  = 100 * time.Millisecond
)

// maxFailedAlone is how many Services may fail one after the other before the kernel's
// state is the suspected cause.
const maxFailedAlone = 8

// allowance is the rest of a turn.
type allowance struct {
	tries int
	until time.Time
}

func newAllowance() *allowance { return &allowance{maxTries, time.Now().Add(maxTurn)} }

func (a *allowance) left() bool { return a.tries > 0 && time.Now().Before(a.until) }

// each calls step until there is nothing to do, or the turn is over. It calls step at
// least once, so that no kind of work starves. An unknown kernel state ends the turn.
func (f *familyLoop) each(ctx context.Context, a *allowance, step func() (more bool)) {
	for first := true; !f.fullWriteDue && ctx.Err() == nil && (first || a.left()); first = false {
		if !step() {
			return
		}
	}
}

// write tries a group of changes.
func (f *familyLoop) write(ctx context.Context, a *allowance, group []plan.ServicePortName) error {
	a.tries--
	if err := f.try(ctx, f.planner.plan, plan.Change{Services: group}); err != nil {
		return err
	}
	f.kernelAccepts, f.failedAlone = true, 0
	f.commit(group)
	return nil
}

// writeGroups writes groups of one Service each.
func (f *familyLoop) writeGroups(ctx context.Context, a *allowance, groups [][]plan.ServicePortName) {
	f.each(ctx, a, func() bool {
		if len(groups) == 0 {
			return false
		}
		if err := f.write(ctx, a, groups[0]); err != nil && ctx.Err() == nil {
			f.failedTogether(groups[0], err)
		}
		groups = groups[1:]
		return true
	})
}

// search looks among the suspects for the Services that the kernel refuses.
func (f *familyLoop) search(ctx context.Context, a *allowance) {
	f.each(ctx, a, func() bool {
		group := f.nextSuspects()
		if len(group) == 0 {
			return false
		}
		switch err := f.write(ctx, a, group); {
		case ctx.Err() != nil:
			f.suspects = append(f.suspects, group)
		case err != nil:
			f.failedTogether(group, err)
		}
		return true
	})
}

// nextSuspects removes and returns a group that is small enough for one sync.
func (f *familyLoop) nextSuspects() []plan.ServicePortName {
	for len(f.suspects) > 0 {
		last := len(f.suspects) - 1
		group := f.withLinked(f.suspects[last])
		f.suspects = f.suspects[:last]
		halves, _ := f.halves(group)
		if len(halves) == 0 || f.entries(group...) <= sliceEntries {
			if len(group) > 0 {
				return group
			}
			continue
		}
		f.suspect(halves)
	}
	return nil
}

// suspect adds groups to the search; the first is next.
func (f *familyLoop) suspect(groups [][]plan.ServicePortName) {
	for _, group := range slices.Backward(groups) {
		f.suspects = append(f.suspects, group)
	}
}

// failedTogether handles the failure of a group. Among several Services the search
// continues. A single Service is quarantined. But if the kernel has accepted nothing
// else, its state may be the cause. Then other Services are tried first, and if they
// fail too, a full write follows.
func (f *familyLoop) failedTogether(group []plan.ServicePortName, err error) {
	halves, severalServices := f.halves(group)
	switch {
	case severalServices:
		f.log.Debug("a sync of several Services failed, looking for the one to blame", "servicePorts", len(group), "error", err)
		f.suspect(halves)
	case f.inDoubt(group[0].ServiceName) && f.failedAlone < min(maxFailedAlone, len(f.suspects)):
		f.suspects = slices.Insert(f.suspects, 0, group) // the last to be tried
		f.failedAlone++
	case f.inDoubt(group[0].ServiceName):
		f.log.Info("a sync failed; a full write follows, in case the kernel's state is to blame", "service", group[0].ServiceName.String(), "error", err)
		f.suspects = append(f.suspects, group)
		f.fullWriteDue, f.fullWriteAt, f.failedAlone = true, time.Now(), 0
	default:
		f.putInQuarantine(group, err)
		if len(halves) > 0 {
			f.retries = append(f.retries, halves...)
			f.searchesPorts = true
		}
	}
}

// inDoubt says whether the kernel's state may be the cause of a Service's failure.
// A full write delays all Services, so it happens once per RetryPeriod.
func (f *familyLoop) inDoubt(name plan.ServiceName) bool {
	return !f.kernelAccepts && f.portCounts[name] == 0 && (f.fullWriteAt.IsZero() || time.Since(f.fullWriteAt) >= f.opts.RetryPeriod)
}

// halves divides a group in two, smaller Services first. If it has several Services,
// these stay whole. Linked Service ports stay together. A group that cannot be divided
// has no halves.
func (f *familyLoop) halves(group []plan.ServicePortName) (halves [][]plan.ServicePortName, severalServices bool) {
	linked := newLinks(f.planner)
	parts := linked.services(group)
	severalServices = len(parts) > 1
	if !severalServices {
		parts = linked.parts(group)
	}
	if len(parts) < 2 {
		return nil, false
	}
	slices.SortStableFunc(parts, func(x, y []plan.ServicePortName) int { return f.entries(x...) - f.entries(y...) })
	half := len(parts) / 2
	return [][]plan.ServicePortName{slices.Concat(parts[:half]...), slices.Concat(parts[half:]...)}, severalServices
}

// withLinked removes Service ports that are no longer changed from a group, and adds
// those that are linked to it.
func (f *familyLoop) withLinked(group []plan.ServicePortName) []plan.ServicePortName {
	var names []plan.ServicePortName
	for _, name := range group {
		if _, changed := f.planner.changed[name]; changed {
			names = append(names, name)
		}
	}
	return newLinks(f.planner).addLinked(f.planner, names)
}
