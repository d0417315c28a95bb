// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"time"
	"unique"

	"signalbox/proxier/plan"
)

// Explanation is a Resolution with the reasons for it.
type Explanation struct {
	Resolution
	// Reasons has an entry for each of Ports.
	Reasons map[plan.ServicePortName]*Reasons
	// Problems are the parts of the Service and of its slices that are not served.
	Problems []plan.Problem
}

// Explain resolves a Service as Resolve does, and records the reasons.
func (r *Resolver) Explain(name plan.ServiceName) Explanation {
	e := Explanation{Reasons: map[plan.ServicePortName]*Reasons{}, Problems: r.tracker.problemsOf(name)}
	e.Resolution = r.decide(name, e.Reasons)
	return e
}

// Unserved is a Service that is not served at one of its addresses.
type Unserved struct {
	Name   plan.ServiceName
	Reason plan.Reason
	Text   string // words for the reason
}

// UnservedAt returns the Services that have an address and are not served there, sorted.
func (r *Resolver) UnservedAt(a netip.Addr) (out []Unserved) {
	add := func(name plan.ServiceName, reason plan.Reason, text string) {
		if reason != plan.NoReason {
			out = append(out, Unserved{name, reason, cmp.Or(text, reason.Text())})
		}
	}
	for name, s := range r.tracker.unserved {
		if slices.Contains(s.clusterIPs, a) {
			add(name, s.reason, "")
		}
	}
	for name, s := range r.tracker.services {
		external := slices.Contains(s.externalIPs, a)
		switch i := slices.IndexFunc(s.notServedAt, func(n notServedAt) bool { return n.addr == a }); {
		case slices.Contains(s.clusterIPs, a), slices.Contains(s.loadBalancerIPs, a), external && !r.settings.IgnoreExternalIPs:
			d := r.Resolve(name)
			if d.NotServed == plan.NoReason && len(d.Ports) == 0 {
				d.NotServed = plan.NoPort
			}
			add(name, d.NotServed, d.TooLarge)
		case external:
			add(name, plan.ExternalIPsOff, "")
		case i >= 0:
			add(name, s.notServedAt[i].reason, "")
		}
	}
	slices.SortFunc(out, func(a, b Unserved) int { return a.Name.Compare(b.Name) })
	return out
}

// Reasons are the decisions about one Service port. Nobody asks for them in a sync:
// the methods that record do nothing with nil.
type Reasons struct {
	// Cluster and Local have a reason for each endpoint, by traffic policy.
	Cluster, Local EndpointReasons
	// Hints are the kinds of topology hints in the order in which they are tried.
	Hints []Hints
	// Slices have no endpoint for the Service port.
	Slices []SliceReason
	// ClusterIP is for cluster IPs. Inside and Outside are for other frontends: for
	// traffic of this node's Pods and processes, and for all other.
	ClusterIP, Inside, Outside Scope
}

// Scope says which endpoints a traffic policy allows.
type Scope struct {
	Local  bool // those of this node alone
	Reason plan.Reason
}

// Scope returns the scope of a kind of frontend for a traffic source.
func (r *Reasons) Scope(kind plan.FrontendKind, from plan.TrafficSources) Scope {
	switch {
	case kind == plan.ClusterIP:
		return r.ClusterIP
	case from == plan.FromOutside:
		return r.Outside
	}
	return r.Inside
}

// Endpoints returns the reasons of a scope, sorted by address.
func (r *Reasons) Endpoints(s Scope) []EndpointReason {
	all := r.Cluster
	if s.Local {
		all = r.Local
	}
	return slices.SortedFunc(maps.Values(all), func(a, b EndpointReason) int { return a.Addr.Compare(b.Addr) })
}

// EndpointReason says why an endpoint gets new connections or not.
type EndpointReason struct {
	Addr   netip.AddrPort
	Node   string // "" where no slice says it
	Target string // name of what is behind the address, mostly a Pod; may be empty
	Reason plan.Reason
}

// EndpointReasons has an entry for each endpoint; nil records nothing.
type EndpointReasons map[netip.AddrPort]EndpointReason

// Hints says what became of topology hints.
type Hints struct {
	Kind   string // "node" or "zone"
	Here   string // the name of this node or its zone; "" where unknown
	Reason plan.Reason
	// With and Without count the ready endpoints that have such a hint or not.
	With, Without int
}

// SliceReason says why a Service port uses no endpoint of a slice.
type SliceReason struct {
	Slice     string // "namespace/name"
	Reason    plan.Reason
	Ports     []string // as "http/tcp"
	Endpoints int
}

// newReasons returns nil where nobody asks: where all is nil.
func newReasons(all map[plan.ServicePortName]*Reasons, name plan.ServicePortName) *Reasons {
	if all == nil {
		return nil
	}
	all[name] = &Reasons{Cluster: EndpointReasons{}, Local: EndpointReasons{}}
	return all[name]
}

func (r *Reasons) cluster() EndpointReasons {
	if r == nil {
		return nil
	}
	return r.Cluster
}

func (r *Reasons) local() EndpointReasons {
	if r == nil {
		return nil
	}
	return r.Local
}

func (r *Reasons) scopes(clusterIP, inside, outside Scope) {
	if r != nil {
		r.ClusterIP, r.Inside, r.Outside = clusterIP, inside, outside
	}
}

func (r *Reasons) leaveOutSlice(s *endpointSlice, reason plan.Reason) {
	if r == nil {
		return
	}
	ports := make([]string, len(s.ports))
	for i, p := range s.ports {
		ports[i] = p.name + "/" + p.protocol.String()
	}
	r.Slices = append(r.Slices, SliceReason{s.name.Namespace + "/" + s.name.Name, reason, ports, len(s.endpoints)})
}

// tried records the outcome for one kind of hints. narrowed are the endpoints that
// hints for other places leave out.
func (r *Reasons) tried(ready []candidate, p place, reason plan.Reason) {
	if r == nil {
		return
	}
	h := Hints{Kind: p.kind, Here: p.here.Value(), Reason: reason}
	for _, c := range ready {
		if len(p.hints(c)) > 0 {
			h.With++
		} else {
			h.Without++
		}
		if reason == plan.HintsUsed && !p.named(c) {
			r.Cluster.add(c, p.elsewhere)
		}
	}
	r.Hints = append(r.Hints, h)
}

// add replaces an earlier reason for the endpoint.
func (e EndpointReasons) add(c candidate, reason plan.Reason) {
	if e != nil {
		e[c.addr] = EndpointReason{c.addr, c.from.node.Value(), c.from.target, reason}
	}
}

// addStates gives each endpoint its own state as its reason. With ready, some are
// ready, and those that drain are not needed.
func (e EndpointReasons) addStates(all []candidate, ready bool) {
	if e == nil {
		return
	}
	for _, c := range all {
		state := c.state()
		if state == plan.Terminating && ready {
			state = plan.TerminatingUnused
		}
		e.add(c, state)
	}
}

// addWithout gives a reason to the endpoints that keep says no to.
func (e EndpointReasons) addWithout(all []candidate, keep func(candidate) bool, reason plan.Reason) {
	if e == nil {
		return
	}
	for _, c := range all {
		if !keep(c) {
			e.add(c, reason)
		}
	}
}

// place is where hints of one kind can lead to.
type place struct {
	kind      string
	here      unique.Handle[string]
	hints     func(candidate) []unique.Handle[string]
	elsewhere plan.Reason // of an endpoint whose hints name other places
}

func (p place) named(c candidate) bool { return slices.Contains(p.hints(c), p.here) }

// objectKey identifies an object that has problems.
type objectKey struct{ kind, namespace, name string }

// objectProblems are the problems of one object that belongs to a Service.
type objectProblems struct {
	service plan.ServiceName
	ObjectProblems
}

// ObjectProblems are the problems of one object.
type ObjectProblems struct {
	Found []plan.Problem // at least one
	Since time.Time      // the object has had problems
}

// keepProblems remembers what is wrong with an object; only such objects cost memory.
func (t *Tracker) keepProblems(key objectKey, service plan.ServiceName, found []plan.Problem) {
	if len(found) == 0 {
		delete(t.problems, key)
		return
	}
	since := time.Now()
	if before, had := t.problems[key]; had {
		since = before.Since
	}
	t.problems[key] = objectProblems{service, ObjectProblems{found, since}}
}

// Problems yields the problems of each Service or EndpointSlice that has some.
func (t *Tracker) Problems() iter.Seq[ObjectProblems] {
	return func(yield func(ObjectProblems) bool) {
		for _, p := range t.problems {
			if !yield(p.ObjectProblems) {
				return
			}
		}
	}
}

// problemsOf returns what is wrong with a Service and its slices, in the order of
// object names.
func (t *Tracker) problemsOf(name plan.ServiceName) []plan.Problem {
	var out []plan.Problem
	for _, p := range t.problems {
		if p.service == name {
			out = append(out, p.Found...)
		}
	}
	slices.SortStableFunc(out, func(a, b plan.Problem) int {
		return cmp.Or(-cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Object, b.Object))
	})
	return out
}
