package proxier

import "slices"

// planner keeps the Plan of one family up to date, one Service at a time, and
// remembers what changed until it is told that a mode has written it.
type planner struct {
	plan   *Plan
	ports  map[ServiceName][]ServicePortName // what plan holds of each Service
	claims claims

	changed map[ServicePortName]struct{}
	node    bool
	// goneUDP are UDP frontends that some Service had since the last written
	// state; whoever holds them now.
	goneUDP map[FrontendKey]struct{}
}

func newPlanner(family Family) *planner {
	return &planner{
		plan:    &Plan{Family: family, Services: map[ServicePortName]*ServicePort{}},
		ports:   map[ServiceName][]ServicePortName{},
		claims:  newClaims(),
		changed: map[ServicePortName]struct{}{},
		goneUDP: map[FrontendKey]struct{}{},
	}
}

func (p *planner) setNode(n Node) {
	if !p.plan.Node.equal(&n) {
		p.plan.Node, p.node = n, true
	}
}

// update replaces the plan for one Service by its newly resolved ports. It
// returns the Services that must be resolved again, because they lost a
// frontend to this one or may have one that this one gave up.
func (p *planner) update(name ServiceName, since int64, ports []*ServicePort) (again []ServiceName, found []Problem) {
	waited := p.claims.stopWaiting(name)
	held := p.releaseAll(name)
	for _, port := range ports {
		displaced, lost := p.claim(port, since)
		again = append(again, displaced...)
		for key, holder := range lost {
			p.claims.wait(name, key)
			if !slices.Contains(waited, key) {
				found = append(found, conflict(port, key, holder))
			}
		}
	}
	for _, key := range held {
		again = append(again, p.claims.queue[key]...)
		if _, taken := p.claims.owners[key]; !taken && key.Protocol == UDP {
			p.goneUDP[key] = struct{}{}
		}
	}
	p.replace(name, slices.DeleteFunc(ports, func(sp *ServicePort) bool { return len(sp.Frontends) == 0 && sp.HealthCheckNodePort == 0 }))
	again = slices.DeleteFunc(again, func(n ServiceName) bool { return n == name })
	return again, found
}

// releaseAll gives up every frontend of a Service, so that its ports can claim
// anew in whatever way they changed among themselves.
func (p *planner) releaseAll(name ServiceName) []FrontendKey {
	var keys []FrontendKey
	for _, port := range p.ports[name] {
		sp := p.plan.Services[port]
		for i := range sp.Frontends {
			key := sp.Frontends[i].Key(port.Protocol)
			p.claims.release(key, port)
			keys = append(keys, key)
		}
	}
	return keys
}

// claim takes the frontends of one port and leaves those out of it that
// another port keeps.
func (p *planner) claim(port *ServicePort, since int64) (displaced []ServiceName, lost map[FrontendKey]claim) {
	port.Frontends = slices.DeleteFunc(port.Frontends, func(f Frontend) bool {
		key := f.Key(port.Name.Protocol)
		holder, other, ok := p.claims.take(key, claim{port.Name, since})
		if !ok {
			if lost == nil {
				lost = map[FrontendKey]claim{}
			}
			lost[key] = holder
			return true
		}
		if other != (ServiceName{}) {
			displaced = append(displaced, other)
		}
		return false
	})
	return displaced, lost
}

func conflict(port *ServicePort, key FrontendKey, holder claim) Problem {
	p := problems{kind: "Service", object: port.Name.ServiceName.String()}
	p.add("spec.ports", "port %q claims %s, which Service %s has; it is not served there until that Service gives it up", port.Name.Port, key, holder.by)
	return p.found[0]
}

// replace puts ports into the plan, in the place of what it held of the
// Service.
func (p *planner) replace(name ServiceName, ports []*ServicePort) {
	old := p.ports[name]
	delete(p.ports, name)
	for _, sp := range ports {
		p.ports[name] = append(p.ports[name], sp.Name)
		if before := p.plan.Services[sp.Name]; before != nil {
			if before.equal(sp) {
				continue
			}
			sp.keepSets(before)
		}
		p.plan.Services[sp.Name] = sp
		p.changed[sp.Name] = struct{}{}
	}
	for _, gone := range old {
		if !slices.Contains(p.ports[name], gone) {
			delete(p.plan.Services, gone)
			p.changed[gone] = struct{}{}
		}
	}
}

// flowOwners says who may answer the UDP flows that names, which were just
// written, could have changed.
func (p *planner) flowOwners(names []ServicePortName) []FlowOwner {
	var owners []FlowOwner
	for _, name := range names {
		sp := p.plan.Services[name]
		if sp == nil || name.Protocol != UDP {
			continue
		}
		o := FlowOwner{Serving: sp.Serving}
		for i := range sp.Frontends {
			key := sp.Frontends[i].Key(UDP)
			o.Frontends = append(o.Frontends, key)
			delete(p.goneUDP, key)
		}
		owners = append(owners, o)
	}
	gone := FlowOwner{Serving: noEndpoints}
	for key := range p.goneUDP {
		if _, taken := p.claims.owners[key]; !taken {
			gone.Frontends = append(gone.Frontends, key)
		}
	}
	clear(p.goneUDP)
	if len(gone.Frontends) > 0 {
		owners = append(owners, gone)
	}
	return owners
}
