package proxier

import (
	"net/netip"
	"slices"
	"unique"
)

// resolver decides what this node must do for a Service in one IP family. All
// policy is here: nothing downstream knows the Service API.
type resolver struct {
	settings *Settings
	family   Family
	locality locality
	// primary is the node's own address of the family; not valid for none.
	primary netip.Addr
	// knowsPods says whether Pods of this node can be told apart.
	knowsPods bool
}

// newResolver reads from the tracker what all Services depend on.
func newResolver(settings *Settings, t *Tracker, family Family) *resolver {
	return &resolver{
		settings:  settings,
		family:    family,
		locality:  locality{node: unique.Make(t.nodeName), zone: unique.Make(t.node.zone), weighs: settings.HasSchedulers},
		primary:   settings.primary(family, &t.node),
		knowsPods: settings.localPods(family, t.node.podCIDRs).Known(),
	}
}

// resolve returns the Service's ports, sorted by name. A Service without a
// cluster IP of the family has none there.
func (r *resolver) resolve(s *service, filed []*endpointSlice) []*ServicePort {
	if s == nil || !slices.ContainsFunc(s.clusterIPs, r.serves) {
		return nil
	}
	ports := make([]*ServicePort, 0, len(s.ports))
	var local []netip.Addr // of ready endpoints, for any port
	for _, port := range s.ports {
		all := candidates(filed, r.family, port.name, port.protocol, s.weights)
		chosen := r.locality.choose(all)
		if s.healthCheckNodePort != 0 {
			local = r.locality.appendReady(local, all)
		}
		ports = append(ports, &ServicePort{
			Name:            ServicePortName{s.name, port.name, port.protocol},
			AffinityTimeout: s.affinity,
			Frontends:       r.frontends(s, port, chosen),
			Serving:         chosen.serving,
			Scheduler:       r.scheduler(s),
		})
	}
	slices.SortFunc(ports, func(a, b *ServicePort) int { return a.Name.Compare(b.Name) })
	if len(ports) > 0 {
		ports[0].HealthCheckNodePort, ports[0].LocalEndpoints = s.healthCheckNodePort, distinct(local)
	}
	return ports
}

func (r *resolver) scheduler(s *service) string {
	if !r.settings.HasSchedulers {
		return ""
	}
	return s.scheduler
}

func (r *resolver) serves(a netip.Addr) bool { return FamilyOf(a) == r.family }

// frontends of one port. An address that is several things at once counts as
// a cluster IP first, then as a load-balancer IP, which may have source ranges
// where an equal external IP has none.
func (r *resolver) frontends(s *service, port servicePort, chosen selection) []Frontend {
	internal, external := r.internal(s, chosen), r.external(s, chosen)
	var out []Frontend
	add := func(base Frontend, kind FrontendKind, addrs []netip.Addr, but ...[]netip.Addr) {
		for _, a := range addrs {
			if !r.serves(a) || slices.ContainsFunc(but, func(other []netip.Addr) bool { return slices.Contains(other, a) }) {
				continue
			}
			base.Kind, base.Addr, base.Port = kind, a, port.port
			if kind == LoadBalancerIP {
				base.Sources = r.sources(s, a)
			}
			out = append(out, base)
		}
	}
	add(internal, ClusterIP, s.clusterIPs)
	if !r.settings.IgnoreExternalIPs {
		add(external, ExternalIP, s.externalIPs, s.clusterIPs, s.loadBalancerIPs)
	}
	add(external, LoadBalancerIP, s.loadBalancerIPs, s.clusterIPs)
	if port.nodePort != 0 {
		external.Kind, external.Port = NodePort, port.nodePort
		out = append(out, external)
	}
	return out
}

// internal is what internalTrafficPolicy makes of a cluster IP. Traffic that
// is not from a Pod of this node is masqueraded, so that the answer comes back
// this way; where Pods cannot be told apart, nothing is.
func (r *resolver) internal(s *service, chosen selection) Frontend {
	f := Frontend{Internal: chosen.cluster, External: chosen.cluster}
	if r.keepsLocal(s.internalLocal, chosen) {
		f.Internal, f.External = chosen.local, chosen.local
		f.WhenEmpty = whenNoneLocal(chosen)
	}
	switch {
	case r.settings.MasqueradeAll:
		f.Masquerade = FromAnywhere
	case r.knowsPods:
		f.Masquerade = FromNode | FromOutside
	}
	return f
}

// external is what externalTrafficPolicy makes of the other frontends. With
// Local, this node's own Pods and processes take the short way to all
// endpoints: the policy is for traffic that a load balancer sent here. The
// node's own source is rewritten on that way, as it may be an address that
// endpoints cannot answer.
func (r *resolver) external(s *service, chosen selection) Frontend {
	if r.keepsLocal(s.externalLocal, chosen) {
		f := Frontend{
			Internal: chosen.cluster, External: chosen.local,
			WhenEmpty: whenNoneLocal(chosen), Masquerade: FromNode,
		}
		if r.settings.KubeProxyIPVSPolicies {
			f.Internal = chosen.local
		}
		return f
	}
	return Frontend{Internal: chosen.cluster, External: chosen.cluster, Masquerade: FromAnywhere}
}

// keepsLocal says whether a traffic policy is Local in effect.
func (r *resolver) keepsLocal(local bool, chosen selection) bool {
	return local && (chosen.local.Len() > 0 || !r.settings.KubeProxyIPVSPolicies)
}

func whenNoneLocal(chosen selection) Verdict {
	if chosen.exists {
		return Drop
	}
	return Reject
}

// sources are the source ranges of one load-balancer IP, sorted. Where they
// cover the node, the IP itself is a source too: the node may use it as its
// own when it talks to it.
func (r *resolver) sources(s *service, vip netip.Addr) []netip.Prefix {
	ranges := s.sourcesOf(r.family)
	if r.primary.IsValid() && contains(ranges, r.primary) && !contains(ranges, vip) {
		ranges = append(ranges, netip.PrefixFrom(vip, vip.BitLen()))
		slices.SortFunc(ranges, netip.Prefix.Compare)
	}
	return ranges
}
