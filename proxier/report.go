package proxier

import (
	"slices"
	"time"
)

// KernelObjects counts what a mode keeps in the kernel, of one kind and in one
// table.
type KernelObjects struct {
	// Table is the name of an nftables or iptables table, and empty for what
	// is in none.
	Table string
	// Kind is "chain", "rule", "element", "virtual-server", "real-server" or
	// "address".
	Kind string
	// Count are there now; Written of them, or in their place, were written by
	// the last sync. Written is 0 in modes that do not count it.
	Count, Written int
}

// Counter is implemented by Proxiers that know what they keep in the kernel.
type Counter interface {
	// Counts is called after each Sync by the same goroutine, so that it must
	// cost next to nothing beside a Sync, at any size.
	Counts() []KernelObjects
}

// maxTriggers bounds what is remembered while the kernel takes nothing.
const maxTriggers = 10000

// queued notes what was taken in: since when the oldest of it has waited, and
// what its slices say of the time of their change.
func (f *familyLoop) queued(since time.Time, triggers []time.Time) {
	f.since = earliest(f.since, since)
	f.triggers = append(f.triggers, triggers...)
	if n := len(f.triggers) - maxTriggers; n > 0 {
		f.triggers = slices.Delete(f.triggers, 0, n)
	}
}

// current says that the kernel does what the plan asks for, but for what is set
// aside.
func (f *familyLoop) current() bool {
	return !f.all && !f.planner.node && len(f.planner.changed) == len(f.aside)
}

// report completes a report and hands it out.
func (f *familyLoop) report(r SyncReport) {
	r.SetAside, r.Totals, r.NodePortAddrs = len(f.aside), f.planner.totals.Totals, f.planner.plan.Node.NodePortAddrs
	r.Repaired, f.repaired = f.repaired, false
	if r.Current = f.current(); r.Current {
		r.Queued, r.Triggers = f.since, f.triggers
		r.HealthChecks = f.planner.totals.takeHealth()
		f.since, f.triggers = time.Time{}, nil
	}
	if c, ok := f.proxier.(Counter); ok {
		r.Kernel = c.Counts()
	}
	if f.opts.Synced != nil {
		f.opts.Synced(r)
	}
}
