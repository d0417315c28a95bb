package proxier

import (
	"cmp"
	"net/netip"
	"slices"
	"unique"
)

// resolver decides what this node must do for a Service. All policy is here:
// nothing downstream knows the Service API.
type resolver struct {
	settings Settings
	locality locality
	// primary is the node's own address by family; LocalPods whether Pods of
	// this node can be told apart.
	primary   map[Family]netip.Addr
	knowsPods map[Family]bool
}

// newResolver reads from the tracker what all Services depend on.
func newResolver(settings Settings, t *Tracker) *resolver {
	r := &resolver{
		settings:  settings,
		locality:  locality{node: unique.Make(t.nodeName), zone: unique.Make(t.node.zone)},
		primary:   map[Family]netip.Addr{},
		knowsPods: map[Family]bool{},
	}
	for _, family := range Families {
		r.primary[family] = t.node.primary(family)
		r.knowsPods[family] = settings.localPods(family, t.node.podCIDRs).Known()
	}
	return r
}

// resolve returns the Service's ports in one family, sorted by name. A Service
// without a cluster IP of the family has none there.
func (r *resolver) resolve(s *service, filed []*endpointSlice, family Family) []*ServicePort {
	if s == nil || !slices.ContainsFunc(s.clusterIPs, func(a netip.Addr) bool { return FamilyOf(a) == family }) {
		return nil
	}
	ports := make([]*ServicePort, 0, len(s.ports))
	for _, port := range s.ports {
		chosen := r.locality.choose(candidates(filed, family, port.name, port.protocol))
		ports = append(ports, &ServicePort{
			Name:            ServicePortName{s.name, port.name, port.protocol},
			AffinityTimeout: s.affinity,
			Frontends:       r.frontends(s, port, family, chosen),
			Serving:         chosen.serving,
		})
	}
	slices.SortFunc(ports, func(a, b *ServicePort) int { return a.Name.Compare(b.Name) })
	if len(ports) > 0 {
		ports[0].HealthCheckNodePort = s.healthCheckNodePort
	}
	return ports
}

func (r *resolver) frontends(s *service, port servicePort, family Family, chosen selection) []Frontend {
	internal, external := r.internal(s, family, chosen), r.external(s, chosen)
	var out []Frontend
	add := func(base Frontend, kind FrontendKind, addrs []netip.Addr) {
		for _, a := range addrs {
			if FamilyOf(a) != family {
				continue
			}
			base.Kind, base.Addr, base.Port = kind, a, port.port
			if kind == LoadBalancerIP {
				base.Sources = r.sources(s, family, a)
			}
			out = replaceOrAppend(out, base)
		}
	}
	add(internal, ClusterIP, s.clusterIPs)
	if !r.settings.IgnoreExternalIPs {
		add(external, ExternalIP, s.externalIPs)
	}
	add(external, LoadBalancerIP, s.loadBalancerIPs)
	if port.nodePort != 0 {
		external.Kind, external.Port = NodePort, port.nodePort
		out = append(out, external)
	}
	return out
}

// replaceOrAppend lets a load-balancer IP, which may have source ranges, win
// over an equal external IP, which has none.
func replaceOrAppend(out []Frontend, f Frontend) []Frontend {
	i := slices.IndexFunc(out, func(x Frontend) bool { return x.Addr == f.Addr && x.Port == f.Port })
	switch {
	case i < 0:
		return append(out, f)
	case out[i].Kind != ClusterIP:
		out[i] = f
	}
	return out
}

// internal is what internalTrafficPolicy makes of a cluster IP. Traffic that
// is not from a Pod of this node is masqueraded, so that the answer comes back
// this way; where Pods cannot be told apart, nothing is.
func (r *resolver) internal(s *service, family Family, chosen selection) Frontend {
	f := Frontend{Internal: chosen.cluster, External: chosen.cluster}
	if s.internalLocal {
		f.Internal, f.External = chosen.local, chosen.local
		f.WhenEmpty = whenNoneLocal(chosen)
	}
	switch {
	case r.settings.MasqueradeAll:
		f.Masquerade = FromAnywhere
	case r.knowsPods[family]:
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
	if s.externalLocal {
		return Frontend{
			Internal: chosen.cluster, External: chosen.local,
			WhenEmpty: whenNoneLocal(chosen), Masquerade: FromNode,
		}
	}
	return Frontend{Internal: chosen.cluster, External: chosen.cluster, Masquerade: FromAnywhere}
}

func whenNoneLocal(chosen selection) Verdict {
	if chosen.exists {
		return Drop
	}
	return Reject
}

// sources are the source ranges of one load-balancer IP. Where they cover the
// node, the IP itself is a source too: the node may use it as its own when it
// talks to it.
func (r *resolver) sources(s *service, family Family, vip netip.Addr) []netip.Prefix {
	ranges := s.sourcesOf(family)
	if primary := r.primary[family]; primary.IsValid() && contains(ranges, primary) && !contains(ranges, vip) {
		ranges = append(ranges, netip.PrefixFrom(vip, vip.BitLen()))
	}
	return ranges
}

// node is what rules need to know about this node in one family.
func (t *Tracker) nodeValue(settings *Settings, family Family, local []netip.Addr) Node {
	addrs := settings.NodePortAddresses.nodePortAddrs(family, t.node.primary(family), local)
	return Node{
		LocalPods:          settings.localPods(family, t.node.podCIDRs),
		NodePortAddrs:      addrs,
		LocalhostNodePorts: family == IPv4 && settings.servesLoopback(addrs),
		ServiceCIDRs:       t.cidrsOf(family),
	}
}

func (n *Node) equal(o *Node) bool {
	return slices.Equal(n.LocalPods.Prefixes, o.LocalPods.Prefixes) && n.LocalPods.Interface == o.LocalPods.Interface &&
		n.LocalPods.InterfacePrefix == o.LocalPods.InterfacePrefix &&
		n.NodePortAddrs.All == o.NodePortAddrs.All && slices.Equal(n.NodePortAddrs.Addrs, o.NodePortAddrs.Addrs) &&
		n.LocalhostNodePorts == o.LocalhostNodePorts && slices.Equal(n.ServiceCIDRs, o.ServiceCIDRs)
}

func (f *Frontend) equal(o *Frontend) bool {
	return f.Kind == o.Kind && f.Addr == o.Addr && f.Port == o.Port && f.WhenEmpty == o.WhenEmpty && f.Masquerade == o.Masquerade &&
		(f.Sources == nil) == (o.Sources == nil) && slices.Equal(f.Sources, o.Sources) &&
		f.Internal.equal(o.Internal) && f.External.equal(o.External) &&
		(f.Internal == f.External) == (o.Internal == o.External)
}

func (s *EndpointSet) equal(o *EndpointSet) bool {
	return s == o || slices.Equal(s.Endpoints, o.Endpoints)
}

func (p *ServicePort) equal(o *ServicePort) bool {
	return p.Name == o.Name && p.AffinityTimeout == o.AffinityTimeout && p.HealthCheckNodePort == o.HealthCheckNodePort &&
		p.Serving.equal(o.Serving) &&
		slices.EqualFunc(p.Frontends, o.Frontends, func(a, b Frontend) bool { return a.equal(&b) })
}

// keepSets makes p use the sets of its predecessor where they are equal, so
// that a pointer comparison tells what changed.
func (p *ServicePort) keepSets(old *ServicePort) {
	known := []*EndpointSet{old.Serving}
	for i := range old.Frontends {
		known = append(known, old.Frontends[i].Internal, old.Frontends[i].External)
	}
	keep := func(s *EndpointSet) *EndpointSet {
		for _, k := range known {
			s = share(s, k)
		}
		return s
	}
	p.Serving = keep(p.Serving)
	for i := range p.Frontends {
		f := &p.Frontends[i]
		f.Internal, f.External = keep(f.Internal), keep(f.External)
	}
}

// precedes decides between two claims to one frontend: the older Service, then
// the name that sorts first.
func (c claim) precedes(o claim) bool {
	return cmp.Or(cmp.Compare(c.since, o.since), c.by.Compare(o.by)) < 0
}
