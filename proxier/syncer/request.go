package syncer

import (
	"cmp"
	"net/netip"
	"slices"

	"signalbox/proxier/plan"
)

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
