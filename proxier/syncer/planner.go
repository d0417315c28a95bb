package syncer

import (
	"signalbox/internal/compact"
	"signalbox/proxier/plan"
	"slices"
)

// planner keeps the Plan of one family up to date, one Service at a time, and
// remembers what changed until it is told that a mode has written it.
type planner struct {
	plan      *plan.Plan
	services  map[plan.ServiceName]*plannedService
	owners    ownership
	totals    totals
	mostPorts int // see compact.Map

	// changed holds the Service ports that are not in the kernel as the plan
	// has them -> what the kernel holds of them instead, nil for nothing.
	changed map[plan.ServicePortName]*plan.ServicePort
	node    bool // Plan.Node is not in the kernel as it is
}

// plannedService is what a Service has in the plan and would have.
type plannedService struct {
	since   int64                  // as in claim
	ports   []plan.ServicePortName // in the plan, sorted
	waiting []request              // for frontends that better claims have
}

func newPlanner(family plan.Family) *planner {
	return &planner{
		plan:     &plan.Plan{Family: family, Services: map[plan.ServicePortName]*plan.ServicePort{}},
		services: map[plan.ServiceName]*plannedService{},
		owners:   newOwnership(),
		totals:   newTotals(),
		changed:  map[plan.ServicePortName]*plan.ServicePort{},
	}
}

// setNode says whether Services must be resolved again: masquerading depends
// on whether local Pods can be told apart.
func (p *planner) setNode(n plan.Node) (resolveAll bool) {
	if p.plan.Node.Equal(&n) {
		return false
	}
	resolveAll = p.plan.Node.LocalPods.Known() != n.LocalPods.Known()
	p.plan.Node, p.node = n, true
	return resolveAll
}

// update replaces what the plan has of one Service by its newly resolved
// ports, sorted by name. It returns the other Services that must be resolved
// again, because they lost a frontend to this one or inherit one from it.
func (p *planner) update(name plan.ServiceName, since int64, ports []*plan.ServicePort) (affected []plan.ServiceName, conflicts []plan.Problem) {
	old := p.services[name]
	if old == nil {
		old = &plannedService{}
	}
	wishes := requestsOf(since, ports)
	affected = p.owners.replace(name, p.requestsOf(old), wishes)

	next := &plannedService{since: since}
	found := plan.Problems{Kind: "Service", Object: name.String()}
	for _, w := range wishes {
		if p.owners.has(w) {
			continue
		}
		next.waiting = append(next.waiting, w)
		if _, waited := findRequest(old.waiting, w); !waited {
			p.conflict(&found, w)
		}
	}
	slices.SortFunc(next.waiting, request.compare)
	p.grant(next, ports)
	p.remove(old.ports, next.ports)
	p.plan.Services = compact.Map(p.plan.Services, &p.mostPorts)
	if len(next.ports) > 0 || len(next.waiting) > 0 {
		p.services[name] = next
	} else {
		delete(p.services, name)
	}
	return affected, found.All()
}

// grant puts the ports into the plan with those frontends that they have.
func (p *planner) grant(next *plannedService, ports []*plan.ServicePort) {
	for _, sp := range ports {
		sp.Frontends = slices.DeleteFunc(sp.Frontends, func(f plan.Frontend) bool { return !p.owners.has(requestOf(&f, sp.Name, next.since)) })
		if sp.HealthCheckNodePort != 0 && !p.owners.has(healthCheckRequest(sp, next.since)) {
			sp.HealthCheckNodePort, sp.LocalEndpoints = 0, 0
		}
		if len(sp.Frontends) > 0 || sp.HealthCheckNodePort != 0 {
			p.set(sp.Name, sp)
			next.ports = append(next.ports, sp.Name)
		}
	}
}

// remove takes those ports out of the plan that are no longer there.
func (p *planner) remove(old, next []plan.ServicePortName) {
	for _, name := range old {
		if _, stays := slices.BinarySearchFunc(next, name, plan.ServicePortName.Compare); !stays {
			p.set(name, nil)
		}
	}
}

// set puts a Service port into the plan, or with nil takes it out. What is
// equal to what is there, or to what the kernel holds, is no change.
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
	if sp == nil {
		delete(p.plan.Services, name)
	} else {
		p.plan.Services[name] = sp
	}
}

// written notes that the kernel holds these Service ports as the plan does.
func (p *planner) markWritten(names []plan.ServicePortName) {
	for _, name := range names {
		delete(p.changed, name)
	}
	if len(p.changed) == 0 {
		// A map keeps the size it once had, and walking it costs that size.
		p.changed = map[plan.ServicePortName]*plan.ServicePort{}
	}
}

// asWritten is the plan with what the kernel last took in the place of every
// changed Service port but those given.
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

// forgetKernel takes everything as still to be written, into a kernel that
// holds nothing.
func (p *planner) forgetKernel() {
	p.changed = make(map[plan.ServicePortName]*plan.ServicePort, len(p.plan.Services))
	for name := range p.plan.Services {
		p.changed[name] = nil
	}
}

// FlowCleaner removes connection-tracking flows that point at what is gone.
// The kernel decides where a connection goes once, at its first packet: a UDP
// client that keeps its source port would otherwise send to a removed endpoint
// for as long as it sends at all.
type FlowCleaner interface {
	// Clean queues the work and returns at once. For each owner, every UDP
	// flow to one of its Frontends is removed unless it is answered by an
	// endpoint in Serving.
	Clean(family plan.Family, owners []plan.FlowOwner)
}

// flowOwners says who may answer the UDP flows that writing these Service
// ports could have changed. It is asked before they are noted as written.
func (p *planner) flowOwners(names []plan.ServicePortName) []plan.FlowOwner {
	var owners []plan.FlowOwner
	gone := plan.FlowOwner{Usable: plan.NoEndpoints}
	for _, name := range names {
		was, changed := p.changed[name]
		if !changed || name.Protocol != plan.UDP {
			continue
		}
		now := p.plan.Services[name]
		before, after := was.Keys(), now.Keys()
		for _, key := range before {
			// Who has taken a frontend over has changed and is an owner too.
			if _, taken := p.owners.owners[key]; !taken {
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
