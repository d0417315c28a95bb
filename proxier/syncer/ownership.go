package syncer

import (
	"cmp"
	"net/netip"
	"slices"

	"signalbox/internal/compact"
	"signalbox/proxier/plan"
)

// claims says which Service port serves each frontend of a Plan. Two can claim
// one: a NodePort or an external IP in manifests, or an address in the moment
// in which it passes from one Service to the next. The best claim has it, and
// that follows from the claims alone, not from the order they came in.
type ownership struct {
	owners  map[plan.FrontendKey]claimant    // frontend -> who serves it
	waiting map[plan.FrontendKey][]*claimant // frontend -> who else claims it, best first; few frontends have any
	// See compact.Map.
	mostOwners, mostWaiting int
}

// claim is a Service port's wish to serve one frontend.
type claimant struct {
	by    plan.ServicePortName
	kind  plan.FrontendKind
	since int64 // creation of the Service in Unix seconds; 0 where unknown
}

// wish is a claim and what it is for.
type request struct {
	key      plan.FrontendKey
	claimant claimant
}

func newOwnership() ownership {
	return ownership{owners: map[plan.FrontendKey]claimant{}, waiting: map[plan.FrontendKey][]*claimant{}}
}

// compare puts the better claim first. Cluster IPs are given out by the API
// server, so that nobody can take another's by naming it as an external IP;
// then the older Service has it, then the name that sorts first.
func (c claimant) compare(o claimant) int {
	return cmp.Or(
		cmp.Compare(min(c.kind, plan.ExternalIP), min(o.kind, plan.ExternalIP)),
		cmp.Compare(c.since, o.since),
		c.by.Compare(o.by),
		cmp.Compare(c.kind, o.kind),
	)
}

func (c *ownership) has(w request) bool { return c.owners[w.key] == w.claimant }

// exchange replaces the wishes of a Service. It returns the other Services
// that gained or lost a frontend by it, sorted. These wish for what they did
// before, so that exchanging their wishes affects nobody: a change of claims
// is settled after one step, whoever claims what.
func (c *ownership) replace(name plan.ServiceName, before, after []request) (affected []plan.ServiceName) {
	if slices.Equal(before, after) {
		return nil
	}
	was := make(map[plan.FrontendKey]plan.ServicePortName, len(after))
	for _, wishes := range [][]request{before, after} {
		for _, w := range wishes {
			was[w.key] = c.owners[w.key].by
		}
	}
	for _, w := range before {
		c.remove(w)
	}
	for _, w := range after {
		c.add(w)
	}
	c.owners, c.waiting = compact.Map(c.owners, &c.mostOwners), compact.Map(c.waiting, &c.mostWaiting)
	for key, previous := range was {
		now := c.owners[key].by
		if now == previous {
			continue
		}
		for _, other := range []plan.ServiceName{previous.ServiceName, now.ServiceName} {
			if other != name && other != (plan.ServiceName{}) {
				affected = append(affected, other)
			}
		}
	}
	slices.SortFunc(affected, plan.ServiceName.Compare)
	return slices.Compact(affected)
}

func (c *ownership) add(w request) {
	owner, taken := c.owners[w.key]
	switch {
	case !taken:
		c.owners[w.key] = w.claimant
		return
	case w.claimant.compare(owner) < 0:
		c.owners[w.key] = w.claimant
		w.claimant = owner
	}
	queue := c.waiting[w.key]
	i, _ := findClaimant(queue, w.claimant)
	c.waiting[w.key] = slices.Insert(queue, i, &w.claimant)
}

func (c *ownership) remove(w request) {
	queue := c.waiting[w.key]
	i, found := 0, false
	switch {
	case !c.has(w):
		if i, found = findClaimant(queue, w.claimant); !found {
			return
		}
	case len(queue) == 0:
		delete(c.owners, w.key)
		return
	default:
		c.owners[w.key] = *queue[0]
	}
	if len(queue) == 1 {
		delete(c.waiting, w.key)
		return
	}
	c.waiting[w.key] = slices.Delete(queue, i, i+1)
}

func findClaimant(queue []*claimant, c claimant) (int, bool) {
	return slices.BinarySearchFunc(queue, c, func(x *claimant, y claimant) int { return x.compare(y) })
}

// wishOf is what a frontend asks for on behalf of its Service port.
func requestOf(f *plan.Frontend, port plan.ServicePortName, since int64) request {
	return request{f.Key(port.Protocol), claimant{port, f.Kind, since}}
}

// healthCheckWish is for the port that answers load balancers: a NodePort of
// the same number would take its connections. It belongs to the Service as a
// whole, hence to a port without protocol.
func healthCheckRequest(p *plan.ServicePort, since int64) request {
	return request{
		plan.FrontendKey{Addr: netip.Addr{}, Port: p.HealthCheckNodePort, Protocol: plan.TCP},
		claimant{plan.ServicePortName{ServiceName: p.Name.ServiceName}, plan.NodePort, since},
	}
}

// wishesOf returns what resolved ports want to serve.
func requestsOf(since int64, ports []*plan.ServicePort) []request {
	var out []request
	for _, sp := range ports {
		if sp.HealthCheckNodePort != 0 {
			out = append(out, healthCheckRequest(sp, since))
		}
		for i := range sp.Frontends {
			out = append(out, requestOf(&sp.Frontends[i], sp.Name, since))
		}
	}
	return out
}

// wishesOf returns what a Service wanted when it was planned.
func (p *planner) requestsOf(s *plannedService) []request {
	ports := make([]*plan.ServicePort, len(s.ports))
	for i, name := range s.ports {
		ports[i] = p.plan.Services[name]
	}
	return append(requestsOf(s.since, ports), s.waiting...)
}

func (w request) compare(o request) int {
	return cmp.Or(
		w.key.Addr.Compare(o.key.Addr), cmp.Compare(w.key.Port, o.key.Port), cmp.Compare(w.key.Protocol, o.key.Protocol),
		w.claimant.compare(o.claimant),
	)
}

// findWish looks in sorted wishes.
func findRequest(sorted []request, w request) (int, bool) {
	return slices.BinarySearchFunc(sorted, w, request.compare)
}

// conflict says that a wish is not granted.
func (p *planner) conflict(found *plan.Problems, w request) {
	field := map[plan.FrontendKind]string{
		plan.ClusterIP: "spec.clusterIPs", plan.ExternalIP: "spec.externalIPs", plan.LoadBalancerIP: "status.loadBalancer.ingress", plan.NodePort: "spec.ports[].nodePort",
	}[w.claimant.kind]
	claimant := "port \"" + w.claimant.by.Port + "\""
	if w.claimant.by.Protocol == 0 {
		field, claimant = "spec.healthCheckNodePort", "the health check"
	}
	found.Add(field, "%s claims %s (%s), which Service %s has; it is not served there until that Service gives it up",
		claimant, w.key, p.plan.Family, p.owners.owners[w.key].by)
}
