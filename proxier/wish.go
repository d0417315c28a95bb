package proxier

import (
	"cmp"
	"net/netip"
	"slices"
)

// wishOf is what a frontend asks for on behalf of its Service port.
func wishOf(f *Frontend, port ServicePortName, since int64) wish {
	return wish{f.Key(port.Protocol), claim{port, f.Kind, since}}
}

// healthCheckWish is for the port that answers load balancers: a NodePort of
// the same number would take its connections. It belongs to the Service as a
// whole, hence to a port without protocol.
func healthCheckWish(p *ServicePort, since int64) wish {
	return wish{
		FrontendKey{netip.Addr{}, p.HealthCheckNodePort, TCP},
		claim{ServicePortName{ServiceName: p.Name.ServiceName}, NodePort, since},
	}
}

// wishesOf returns what resolved ports want to serve.
func wishesOf(since int64, ports []*ServicePort) []wish {
	var out []wish
	for _, sp := range ports {
		if sp.HealthCheckNodePort != 0 {
			out = append(out, healthCheckWish(sp, since))
		}
		for i := range sp.Frontends {
			out = append(out, wishOf(&sp.Frontends[i], sp.Name, since))
		}
	}
	return out
}

// wishesOf returns what a Service wanted when it was planned.
func (p *planner) wishesOf(s *plannedService) []wish {
	ports := make([]*ServicePort, len(s.ports))
	for i, name := range s.ports {
		ports[i] = p.plan.Services[name]
	}
	return append(wishesOf(s.since, ports), s.waiting...)
}

func (w wish) compare(o wish) int {
	return cmp.Or(
		w.key.Addr.Compare(o.key.Addr), cmp.Compare(w.key.Port, o.key.Port), cmp.Compare(w.key.Protocol, o.key.Protocol),
		w.claim.compare(o.claim),
	)
}

// findWish looks in sorted wishes.
func findWish(sorted []wish, w wish) (int, bool) {
	return slices.BinarySearchFunc(sorted, w, wish.compare)
}

// conflict says that a wish is not granted.
func (p *planner) conflict(found *problems, w wish) {
	field := map[FrontendKind]string{
		ClusterIP: "spec.clusterIPs", ExternalIP: "spec.externalIPs", LoadBalancerIP: "status.loadBalancer.ingress", NodePort: "spec.ports[].nodePort",
	}[w.claim.kind]
	claimant := "port \"" + w.claim.by.Port + "\""
	if w.claim.by.Protocol == 0 {
		field, claimant = "spec.healthCheckNodePort", "the health check"
	}
	found.add(field, "%s claims %s (%s), which Service %s has; it is not served there until that Service gives it up",
		claimant, w.key, p.plan.Family, p.claims.owners[w.key].by)
}
