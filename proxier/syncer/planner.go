// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"signalbox/internal/compact"
	"signalbox/proxier/plan"
)

// planner keeps the Plan of one family up to date, one Service at a time. It
// remembers each change until a mode has written it.
type planner struct {
	plan      *plan.Plan
	services  map[plan.ServiceName]*plannedService
	ownership ownership
	totals    totals
	mostPorts int // see compact.Map
	// bypasses counts the frontends in the plan that have an address and port of an
	// API server: see plan.Node.Bypass.
	bypasses map[netip.AddrPort]int

	// changed has the Service ports whose form in the plan is not in the kernel,
	// with the form that the kernel has instead; nil for none.
	changed map[plan.ServicePortName]*plan.ServicePort
	node    bool // Plan.Node changed and is not in the kernel yet
}

// plannedService has the requests of a Service, granted and waiting.
type plannedService struct {
	since   int64                  // as in requester
	ports   []plan.ServicePortName // in the plan, sorted
	waiting []request              // for frontends that better requests own
	// waitsSince is when it began to wait. Times are in Unix nanoseconds.
	waitsSince int64
	// See ServiceState.
	written int64
	took    time.Duration
}

func newPlanner(family plan.Family) *planner {
	return &planner{
		plan:      &plan.Plan{Family: family, Services: map[plan.ServicePortName]*plan.ServicePort{}},
		services:  map[plan.ServiceName]*plannedService{},
		ownership: newOwnership(),
		totals:    newTotals(),
		bypasses:  map[netip.AddrPort]int{},
		changed:   map[plan.ServicePortName]*plan.ServicePort{},
	}
}

// setNode says whether Services must be resolved again: masquerading depends
// on whether this node can recognise its own Pods.
func (p *planner) setNode(n plan.Node) (resolveAll bool) {
	n.Bypass = p.plan.Node.Bypass
	if p.plan.Node.Equal(&n) {
		return false
	}
	resolveAll = p.plan.Node.LocalPods.Known() != n.LocalPods.Known()
	p.plan.Node, p.node = n, true
	return resolveAll
}

// update replaces a Service's ports in the plan by its newly resolved ports, sorted
// by name. It returns the other Services that must be resolved again, because they
// lost a frontend to this one or got one from it.
func (p *planner) update(name plan.ServiceName, since int64, ports []*plan.ServicePort) (affected []plan.ServiceName, conflicts []plan.Problem) {
	old := p.services[name]
	if old == nil {
		old = &plannedService{}
	}
	requests := requestsOf(since, ports)
	affected = p.ownership.replace(name, p.requestsOf(old), requests)

	next := &plannedService{since: since, written: old.written, took: old.took}
	found := plan.Problems{Kind: "Service", Object: name.String()}
	for _, r := range requests {
		if p.ownership.has(r) {
			continue
		}
		next.waiting = append(next.waiting, r)
		if _, waited := findRequest(old.waiting, r); !waited {
			p.conflict(&found, r)
		}
	}
	slices.SortFunc(next.waiting, request.compare)
	switch {
	case len(next.waiting) == 0:
	case len(old.waiting) == 0:
		next.waitsSince = time.Now().UnixNano()
	default:
		next.waitsSince = old.waitsSince
	}
	p.grant(next, ports, &found)
	p.remove(old.ports, next.ports)
	p.plan.Services = compact.Map(p.plan.Services, &p.mostPorts)
	if len(next.ports) > 0 || len(next.waiting) > 0 {
		p.services[name] = next
	} else {
		delete(p.services, name)
	}
	return affected, found.All()
}

// grant puts the ports into the plan, with the frontends that they own.
func (p *planner) grant(next *plannedService, ports []*plan.ServicePort, found *plan.Problems) {
	for _, sp := range ports {
		sp.Frontends = slices.DeleteFunc(sp.Frontends, func(f plan.Frontend) bool { return !p.ownership.has(requestOf(&f, sp.Name, next.since)) })
		if sp.HealthCheckNodePort != 0 && !p.ownership.has(healthCheckRequest(sp, next.since)) {
			sp.HealthCheckNodePort, sp.LocalEndpoints = 0, 0
		}
		if len(sp.Frontends) > 0 || sp.HealthCheckNodePort != 0 {
			reportBypasses(found, p.plan.Services[sp.Name], sp)
			p.set(sp.Name, sp)
			next.ports = append(next.ports, sp.Name)
		}
	}
}

// remove removes the ports that a Service no longer has from the plan.
func (p *planner) remove(old, next []plan.ServicePortName) {
	for _, name := range old {
		if _, stays := slices.BinarySearchFunc(next, name, plan.ServicePortName.Compare); !stays {
			p.set(name, nil)
		}
	}
}

// set puts a Service port into the plan, or removes it if sp is nil. A Service port
// that equals the one in the plan or in the kernel is no change.
func (p *planner) set(name plan.ServicePortName, sp *plan.ServicePort) {
	old := p.plan.Services[name]
	written, pending := p.changed[name]
	if !pending {
		written = old
	}
	switch {
	case old.Equal(sp):
		return
	case written.Equal(sp):
		sp = written
		delete(p.changed, name)
	default:
		sp.KeepSets(old)
		sp.KeepSets(written)
		p.changed[name] = written
	}
	p.totals.replace(old, sp)
	p.countBypasses(old, -1)
	p.countBypasses(sp, 1)
	if sp == nil {
		delete(p.plan.Services, name)
	} else {
		p.plan.Services[name] = sp
	}
}

func (p *planner) countBypasses(sp *plan.ServicePort, by int) {
	if sp == nil {
		return
	}
	for _, f := range sp.Frontends {
		for _, a := range f.Bypass {
			at := netip.AddrPortFrom(a, f.Port)
			if p.bypasses[at] += by; p.bypasses[at] == 0 {
				delete(p.bypasses, at)
			}
		}
	}
}

// setBypass puts the bypasses of all frontends into the node's facts, and those of the
// API servers in the ServiceCIDRs that have no frontend. It returns the new ones of the
// latter.
func (p *planner) setBypass(inServiceCIDRs []netip.AddrPort) (unallocated []netip.AddrPort) {
	if len(p.bypasses)+len(p.plan.Node.Bypass)+len(inServiceCIDRs) == 0 {
		return nil
	}
	list := slices.Collect(maps.Keys(p.bypasses))
	for _, at := range inServiceCIDRs {
		if _, served := p.ownership.owners[plan.FrontendKey{Addr: at.Addr(), Port: at.Port(), Protocol: plan.TCP}]; served {
			continue
		}
		list = append(list, at)
		if !slices.Contains(p.plan.Node.Bypass, at) {
			unallocated = append(unallocated, at)
		}
	}
	slices.SortFunc(list, netip.AddrPort.Compare)
	if !slices.Equal(list, p.plan.Node.Bypass) {
		p.plan.Node.Bypass, p.node = list, true
	}
	return unallocated
}

// reportBypasses reports the frontends that the node's own processes have begun to
// bypass.
func reportBypasses(found *plan.Problems, old, sp *plan.ServicePort) {
	for i := range sp.Frontends {
		f := &sp.Frontends[i]
		if len(f.Bypass) == 0 || old != nil && slices.ContainsFunc(old.Frontends, func(o plan.Frontend) bool {
			return o.Addr == f.Addr && o.Port == f.Port && slices.Equal(o.Bypass, f.Bypass)
		}) {
			continue
		}
		found.Add(fieldOf[f.Kind], "an API server is at %s; processes of this node connect to it past the Service, and Pods and other hosts to the Service",
			netip.AddrPortFrom(f.Bypass[0], f.Port))
	}
}

// markWritten says that the kernel has these Service ports as the plan does, since a
// sync that took some time.
func (p *planner) markWritten(names []plan.ServicePortName, took time.Duration) {
	now := time.Now().UnixNano()
	for _, name := range names {
		delete(p.changed, name)
		if s := p.services[name.ServiceName]; s != nil {
			s.written, s.took = now, took
		}
	}
	if len(p.changed) == 0 {
		// A map keeps the size it once had, and walking it costs that size.
		p.changed = map[plan.ServicePortName]*plan.ServicePort{}
	}
}

// asWritten returns the plan, in which each changed Service port but those named has
// the form that the kernel has.
func (p *planner) asWritten(but []plan.ServicePortName) *plan.Plan {
	if len(but) == len(p.changed) {
		return p.plan
	}
	planned := make(map[plan.ServicePortName]struct{}, len(but))
	for _, name := range but {
		planned[name] = struct{}{}
	}
	plan := &plan.Plan{Family: p.plan.Family, Node: p.plan.Node, Services: make(map[plan.ServicePortName]*plan.ServicePort, len(p.plan.Services))}
	for name, sp := range p.plan.Services {
		if _, changed := p.changed[name]; !changed {
			plan.Services[name] = sp
		}
	}
	for name, sp := range p.changed {
		if _, ok := planned[name]; ok {
			sp = p.plan.Services[name]
		}
		if sp != nil {
			plan.Services[name] = sp
		}
	}
	return plan
}

// forgetKernel makes every Service port a change, as if the kernel had none.
func (p *planner) forgetKernel() {
	p.changed = make(map[plan.ServicePortName]*plan.ServicePort, len(p.plan.Services))
	for name := range p.plan.Services {
		p.changed[name] = nil
	}
}

// FlowCleaner removes connection-tracking flows to removed endpoints. The kernel
// chooses the endpoint at the first packet of a flow. A UDP client that keeps its
// source port would otherwise send to the removed endpoint forever.
type FlowCleaner interface {
	// Clean queues the work and returns at once. It removes every UDP flow to the
	// Frontends of an owner, unless an endpoint in Usable answers it, and each TCP flow
	// that one of Removed answers.
	Clean(family plan.Family, owners []plan.FlowOwner)
}

// flowOwners says which endpoints may answer the flows that writing these Service
// ports could have changed. Call it before markWritten.
func (p *planner) flowOwners(names []plan.ServicePortName) []plan.FlowOwner {
	var owners []plan.FlowOwner
	gone := plan.FlowOwner{Usable: plan.NoEndpoints}
	for _, name := range names {
		was, changed := p.changed[name]
		now := p.plan.Services[name]
		if removed := was.Removed(now); name.Protocol == plan.TCP && len(removed) > 0 {
			owners = append(owners, plan.FlowOwner{Frontends: was.Keys(), Usable: now.Listed, Removed: removed})
		}
		if !changed || name.Protocol != plan.UDP {
			continue
		}
		before, after := was.Keys(), now.Keys()
		for _, key := range before {
			// A Service port that got the frontend has changed, so it is in owners too.
			if _, taken := p.ownership.owners[key]; !taken {
				gone.Frontends = append(gone.Frontends, key)
			}
		}
		if now != nil && len(after) > 0 && (was == nil || was.Usable != now.Usable || !slices.Equal(before, after)) {
			owners = append(owners, plan.FlowOwner{Frontends: after, Usable: now.Usable})
		}
	}
	if len(gone.Frontends) > 0 {
		owners = append(owners, gone)
	}
	return owners
}
