// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"cmp"
	"net/netip"
	"slices"

	"signalbox/internal/compact"
	"signalbox/proxier/plan"
)

// ownership says which Service port serves each frontend of a Plan. Two can request
// one: a NodePort or an external IP in manifests, or an address while it moves from
// one Service to the next. The best request owns it. The owner depends on the
// requests alone, not on their order.
type ownership struct {
	owners  map[plan.FrontendKey]requester    // the Service port that serves a frontend
	waiting map[plan.FrontendKey][]*requester // the other requests for a frontend, best first; few frontends have any
	// See compact.Map.
	mostOwners, mostWaiting int
}

// requester is a Service port that requests a frontend.
type requester struct {
	by    plan.ServicePortName
	kind  plan.FrontendKind
	since int64 // creation of the Service in Unix seconds; 0 where unknown
}

// request asks for one frontend.
type request struct {
	key       plan.FrontendKey
	requester requester
}

func newOwnership() ownership {
	return ownership{owners: map[plan.FrontendKey]requester{}, waiting: map[plan.FrontendKey][]*requester{}}
}

// compare puts the better request first. The API server assigns cluster IPs, so
// nobody can seize one by naming it as an external IP. Then the older Service is
// better, then the name that sorts first.
func (c requester) compare(o requester) int {
	return cmp.Or(
		cmp.Compare(min(c.kind, plan.ExternalIP), min(o.kind, plan.ExternalIP)),
		cmp.Compare(c.since, o.since),
		c.by.Compare(o.by),
		cmp.Compare(c.kind, o.kind),
	)
}

func (o *ownership) has(r request) bool { return o.owners[r.key] == r.requester }

// replace replaces the requests of a Service. It returns the other Services that
// gained or lost a frontend, sorted. Their own requests stay the same, so replacing
// those affects no further Service: one step is enough.
func (o *ownership) replace(name plan.ServiceName, before, after []request) (affected []plan.ServiceName) {
	if slices.Equal(before, after) {
		return nil
	}
	was := make(map[plan.FrontendKey]plan.ServicePortName, len(after))
	for _, requests := range [][]request{before, after} {
		for _, r := range requests {
			was[r.key] = o.owners[r.key].by
		}
	}
	for _, r := range before {
		o.remove(r)
	}
	for _, r := range after {
		o.add(r)
	}
	o.owners, o.waiting = compact.Map(o.owners, &o.mostOwners), compact.Map(o.waiting, &o.mostWaiting)
	for key, previous := range was {
		now := o.owners[key].by
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

func (o *ownership) add(r request) {
	owner, taken := o.owners[r.key]
	switch {
	case !taken:
		o.owners[r.key] = r.requester
		return
	case r.requester.compare(owner) < 0:
		o.owners[r.key] = r.requester
		r.requester = owner
	}
	queue := o.waiting[r.key]
	i, _ := findRequester(queue, r.requester)
	o.waiting[r.key] = slices.Insert(queue, i, &r.requester)
}

func (o *ownership) remove(r request) {
	queue := o.waiting[r.key]
	i, found := 0, false
	switch {
	case !o.has(r):
		if i, found = findRequester(queue, r.requester); !found {
			return
		}
	case len(queue) == 0:
		delete(o.owners, r.key)
		return
	default:
		o.owners[r.key] = *queue[0]
	}
	if len(queue) == 1 {
		delete(o.waiting, r.key)
		return
	}
	o.waiting[r.key] = slices.Delete(queue, i, i+1)
}

func findRequester(queue []*requester, c requester) (int, bool) {
	return slices.BinarySearchFunc(queue, c, func(x *requester, y requester) int { return x.compare(y) })
}

// requestOf returns the request of a Service port for a frontend.
func requestOf(f *plan.Frontend, port plan.ServicePortName, since int64) request {
	return request{f.Key(port.Protocol), requester{port, f.Kind, since}}
}

// healthCheckRequest requests the port that answers load balancers, because a
// NodePort of the same number would get its connections. It belongs to the Service
// as a whole, so its Service port has no protocol.
func healthCheckRequest(p *plan.ServicePort, since int64) request {
	return request{
		plan.FrontendKey{Addr: netip.Addr{}, Port: p.HealthCheckNodePort, Protocol: plan.TCP},
		requester{plan.ServicePortName{ServiceName: p.Name.ServiceName}, plan.NodePort, since},
	}
}

// requestsOf returns the requests of resolved ports.
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

// requestsOf returns the requests of a Service that is in the plan.
func (p *planner) requestsOf(s *plannedService) []request {
	ports := make([]*plan.ServicePort, len(s.ports))
	for i, name := range s.ports {
		ports[i] = p.plan.Services[name]
	}
	return append(requestsOf(s.since, ports), s.waiting...)
}

func (r request) compare(o request) int {
	return cmp.Or(
		r.key.Addr.Compare(o.key.Addr), cmp.Compare(r.key.Port, o.key.Port), cmp.Compare(r.key.Protocol, o.key.Protocol),
		r.requester.compare(o.requester),
	)
}

// findRequest looks in sorted requests.
func findRequest(sorted []request, r request) (int, bool) {
	return slices.BinarySearchFunc(sorted, r, request.compare)
}

// waiting returns the Services that wait for a frontend.
func (p *planner) waiting() map[plan.ServiceName]*plannedService {
	out := map[plan.ServiceName]*plannedService{}
	for _, queue := range p.ownership.waiting {
		for _, r := range queue {
			out[r.by.ServiceName] = p.services[r.by.ServiceName]
		}
	}
	return out
}

// conflicts reports every request of a Service that waits.
func (p *planner) conflicts(name plan.ServiceName, s *plannedService) []plan.Problem {
	found := plan.Problems{Kind: "Service", Object: name.String()}
	for _, r := range s.waiting {
		p.conflict(&found, r)
	}
	return found.All()
}

// fieldOf names the field of a Service that frontends come from.
var fieldOf = map[plan.FrontendKind]string{
	plan.ClusterIP: "spec.clusterIPs", plan.ExternalIP: "spec.externalIPs", plan.LoadBalancerIP: "status.loadBalancer.ingress", plan.NodePort: "spec.ports[].nodePort",
}

// conflict reports a request for a frontend that another Service port owns.
func (p *planner) conflict(found *plan.Problems, r request) {
	field, who := fieldOf[r.requester.kind], "port \""+r.requester.by.Port+"\""
	if r.requester.by.Protocol == 0 {
		field, who = "spec.healthCheckNodePort", "the health check"
	}
	found.Add(field, "%s claims %s (%s), which Service %s has; it is not served there until that Service gives it up",
		who, r.key, p.plan.Family, p.ownership.owners[r.key].by)
}
