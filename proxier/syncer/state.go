// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

// Ask has the goroutine of Run call fn between two syncs, also in the pause after one. It
// returns after fn, or if ctx ends before the Loop has time for it. A panic in fn is an
// error: an answer must not end the daemon.
func (l *Loop) Ask(ctx context.Context, fn func()) error {
	answered := make(chan error, 1)
	question := func() {
		err := errors.New("the answer panicked")
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("the answer panicked: %v", r)
			}
			answered <- err
		}()
		fn()
		err = nil
	}
	select {
	case l.questions <- question:
		return <-answered
	case <-ctx.Done():
		return fmt.Errorf("the daemon is in a sync, or does not serve this node now: %w", ctx.Err())
	}
}

// ServiceState is what a Loop knows about one Service in one family.
type ServiceState struct {
	service.Explanation
	// Written is when the kernel last got a change of the Service, and Took is the
	// duration of that sync; zero for never.
	Written time.Time
	Took    time.Duration
	// States has an entry for each of the Service's ports that differs from what the
	// kernel does.
	States map[plan.ServicePortName]PortState
}

// PortState says how the kernel's form of a Service port differs from the planned one.
type PortState struct {
	Pending bool // the kernel has another form, or may have one
	// Quarantined is why the kernel refused the planned form; nil if it did not.
	Quarantined error
	Since       time.Time // of the quarantine
	// Problem is how the mode serves the Service port otherwise than it asks for.
	Problem string
}

// Service returns what the Loop knows about a Service in a family that it serves.
func (l *Loop) Service(family plan.Family, name plan.ServiceName) ServiceState {
	f := l.family(family)
	s := ServiceState{
		Explanation: service.NewResolver(&l.opts.Settings, l.tracker, family).Explain(name),
		States:      map[plan.ServicePortName]PortState{},
	}
	if p := f.planner.services[name]; p != nil && p.written != 0 {
		s.Written, s.Took = time.Unix(0, p.written), p.took
	}
	for _, sp := range s.Ports {
		_, pending := f.planner.changed[sp.Name]
		pending = pending || f.lags()
		p, odd := f.proxier.Problem(sp.Name)
		if refused := f.quarantinedPorts[sp.Name]; pending || odd {
			s.States[sp.Name] = PortState{pending, refused.err, refused.since, p.Reason}
		}
	}
	return s
}

// lags says whether the kernel may lack the rules of any Service port: it may not have what
// was written, or a change of the node waits.
func (f *familyLoop) lags() bool { return f.stateUnknown || f.planner.node }

// FamilyState says how the kernel follows the plan of a family.
type FamilyState struct {
	// Lags says that the kernel may lack the rules of any Service port.
	Lags bool
	// Waiting are the Service ports whose last change the kernel lacks, sorted.
	Waiting []plan.ServicePortName
	// Failure is why the last sync failed, and FailingSince is when the first of the syncs
	// failed that all have failed since; nil and zero if the last sync did not fail.
	Failure      error
	FailingSince time.Time
}

// State says how the kernel follows the plan of a family that is served.
func (l *Loop) State(family plan.Family) FamilyState {
	f := l.family(family)
	return FamilyState{f.lags(), f.changed(), f.failure, f.failingSince}
}

// Owner returns the Service port that serves a frontend; false for none.
func (l *Loop) Owner(family plan.Family, key plan.FrontendKey) (plan.ServicePortName, bool) {
	owner, found := l.family(family).planner.ownership.owners[key]
	return owner.by, found
}

// Having returns the Services that have an address as a frontend, even if another Service
// serves it, or as an endpoint, even if it is not ready. Port and protocol may be 0 for
// any. A key without an address has a NodePort, as has each address of the node.
func (l *Loop) Having(at plan.FrontendKey) map[plan.ServiceName]bool {
	out := map[plan.ServiceName]bool{}
	nodePort := at
	if at.Port != 0 && slices.Contains(l.NodeAddrs(), at.Addr) {
		nodePort.Addr = netip.Addr{}
	}
	add := func(key plan.FrontendKey, r *requester) {
		if at.Includes(key) || nodePort.Includes(key) {
			out[r.by.ServiceName] = true
		}
	}
	for _, f := range l.families {
		for key, owner := range f.planner.ownership.owners {
			add(key, &owner)
		}
		for key, queue := range f.planner.ownership.waiting {
			for _, waits := range queue {
				add(key, waits)
			}
		}
	}
	l.tracker.AddWithEndpoint(out, at)
	return out
}

// UnservedAt returns the Services that have an address and are not served there, sorted.
func (l *Loop) UnservedAt(family plan.Family, a netip.Addr) []service.Unserved {
	return service.NewResolver(&l.opts.Settings, l.tracker, family).UnservedAt(a)
}

// Follows says whether the kernel has what the plan has for an address.
func (l *Loop) Follows(family plan.Family, a netip.Addr) bool {
	f := l.family(family)
	has := func(sp *plan.ServicePort) bool {
		return sp != nil && slices.ContainsFunc(sp.Frontends, func(f plan.Frontend) bool { return f.Addr == a })
	}
	for name, written := range f.planner.changed {
		if has(written) || has(f.planner.plan.Services[name]) {
			return false
		}
	}
	return !f.lags()
}

// ServiceNames returns every Service that the Loop knows, sorted.
func (l *Loop) ServiceNames() []plan.ServiceName { return l.tracker.ServiceNames(nil) }

// Families returns the families that are served.
func (l *Loop) Families() []plan.Family {
	var out []plan.Family
	for _, f := range l.families {
		out = append(out, f.family)
	}
	return out
}

func (l *Loop) family(family plan.Family) *familyLoop {
	return l.families[slices.IndexFunc(l.families, func(f *familyLoop) bool { return f.family == family })]
}

// NotServed is a Service, or a port of one, that the kernel lacks in its planned form.
type NotServed struct {
	Service string // "namespace/name:port"
	Reason  string
	Since   time.Time
}

// Quarantined lists what is in quarantine in a family, sorted by name.
func (l *Loop) Quarantined(family plan.Family) []NotServed {
	f := l.family(family)
	var out []NotServed
	for _, name := range slices.SortedFunc(maps.Keys(f.quarantinedPorts), plan.ServicePortName.Compare) {
		p := f.quarantinedPorts[name]
		out = append(out, NotServed{name.String(), p.err.Error(), p.since})
	}
	for _, name := range slices.SortedFunc(maps.Keys(f.oversized), plan.ServiceName.Compare) {
		o := f.oversized[name]
		out = append(out, NotServed{name.String(), o.reason, o.since})
	}
	return out
}

// ObjectProblem says what in an object is not served as the object asks.
type ObjectProblem struct {
	plan.Problem
	Since time.Time
}

// ObjectProblems lists the problems of at most most Services and EndpointSlices, sorted by
// name: wrong values, frontends that another Service has, and what the mode reports. It
// also counts all objects with problems. Those in quarantine are not among them.
func (l *Loop) ObjectProblems(most int) (list []ObjectProblem, objects int) {
	type source struct {
		kind, object string
		since        time.Time
		problems     func() []plan.Problem // many texts are never read
	}
	var all []source
	for p := range l.tracker.Problems() {
		all = append(all, source{p.Found[0].Kind, p.Found[0].Object, p.Since, func() []plan.Problem { return p.Found }})
	}
	for _, f := range l.families {
		f.updateProblems()
	}
	for p, reported := range l.problems {
		all = append(all, source{p.Kind, p.Object, reported.since, func() []plan.Problem { return []plan.Problem{p} }})
	}
	for _, f := range l.families {
		for name, s := range f.planner.waiting() {
			all = append(all, source{"Service", name.String(), time.Unix(0, s.waitsSince), func() []plan.Problem { return f.planner.conflicts(name, s) }})
		}
	}
	slices.SortStableFunc(all, func(a, b source) int {
		return cmp.Or(cmp.Compare(a.object, b.object), cmp.Compare(a.kind, b.kind), a.since.Compare(b.since))
	})
	for i, s := range all {
		if i == 0 || s.object != all[i-1].object || s.kind != all[i-1].kind {
			objects++
		}
		if objects > most {
			continue
		}
		for _, p := range s.problems() {
			list = append(list, ObjectProblem{p, s.since})
		}
	}
	return list, objects
}

// Compare has the mode compare the kernel with what it wrote. See proxier.Proxier.
func (l *Loop) Compare(ctx context.Context, family plan.Family, about ...plan.ServicePortName) (proxier.Comparison, error) {
	return l.family(family).proxier.Compare(ctx, about...)
}

// RelayPrefix holds the addresses of the mode's relay in a family; not valid for a mode
// without a relay. See proxier.Proxier.
func (l *Loop) RelayPrefix(family plan.Family) netip.Prefix {
	return l.family(family).proxier.RelayPrefix()
}

// NodeMissing says whether no Node object has the name of this node, and names the
// Node objects of other nodes, sorted.
func (l *Loop) NodeMissing() (missing bool, others []string) {
	_, others = l.tracker.NodeExists()
	return l.nodeMissing, others
}

// NodeAddrs returns the addresses of this node: those of its interfaces, and those that
// its Node object has.
func (l *Loop) NodeAddrs() []netip.Addr {
	return slices.Concat(l.local, l.tracker.NodeAddrs())
}
