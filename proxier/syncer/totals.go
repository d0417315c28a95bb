// SPDX-License-Identifier: Apache-2.0

package syncer

import "signalbox/proxier/plan"

// Totals are sums over a family's plan.
type Totals struct {
	ServicePorts int
	// Endpoints that still answer, counted for each Service port that they
	// serve.
	Endpoints int
	// NoLocalInternal and NoLocalExternal count the Service ports whose
	// internal or external traffic policy is Local and which have endpoints,
	// but none on this node: what is sent to them here is dropped.
	NoLocalInternal, NoLocalExternal int
}

// totals changes with each Service port of a plan, so nobody has to walk the plan.
type totals struct {
	Totals
	health        map[plan.ServicePortName]plan.HealthCheck // by the Service port that has it
	healthChanged bool                                      // since the last call of changedHealthChecks
}

func newTotals() totals {
	return totals{health: map[plan.ServicePortName]plan.HealthCheck{}, healthChanged: true}
}

// replace counts next instead of old; either may be nil.
func (t *totals) replace(old, next *plan.ServicePort) {
	t.count(old, -1)
	t.count(next, 1)
	if was, is := healthCheckOf(old), healthCheckOf(next); was != is {
		t.healthChanged = true
		if is.Port != 0 {
			t.health[next.Name] = is
		} else {
			delete(t.health, old.Name)
		}
	}
}

func (t *totals) count(p *plan.ServicePort, by int) {
	if p == nil {
		return
	}
	t.ServicePorts += by
	t.Endpoints += by * p.Usable.Len()
	internal, external := lacksLocal(p)
	if internal {
		t.NoLocalInternal += by
	}
	if external {
		t.NoLocalExternal += by
	}
}

// changedHealthChecks returns the health checks of the plan, or nil if they have not
// changed since the last call.
func (t *totals) changedHealthChecks() map[plan.ServiceName]plan.HealthCheck {
	if !t.healthChanged {
		return nil
	}
	t.healthChanged = false
	checks := make(map[plan.ServiceName]plan.HealthCheck, len(t.health))
	for name, check := range t.health {
		checks[name.ServiceName] = check
	}
	return checks
}

func healthCheckOf(p *plan.ServicePort) plan.HealthCheck {
	if p == nil || p.HealthCheckNodePort == 0 {
		return plan.HealthCheck{}
	}
	return plan.HealthCheck{Port: p.HealthCheckNodePort, LocalEndpoints: p.LocalEndpoints}
}

// lacksLocal says whether connections from inside and from outside are
// dropped because all endpoints are on other nodes.
func lacksLocal(p *plan.ServicePort) (internal, external bool) {
	for i := range p.Frontends {
		f := &p.Frontends[i]
		if f.WhenEmpty != plan.Drop || f.External.Len() > 0 {
			continue
		}
		if f.Kind == plan.ClusterIP {
			internal = true
		} else {
			external = true
		}
	}
	return internal, external
}
