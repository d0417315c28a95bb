// SPDX-License-Identifier: Apache-2.0

package service

import (
	"fmt"
	"net/netip"
	"slices"
	"unique"

	"signalbox/proxier/plan"
)

// Resolver decides what this node must do for a Service in one IP family. All
// policy is here: nothing downstream knows the Service API.
type Resolver struct {
	tracker  *Tracker
	settings *Settings
	family   plan.Family
	locality locality
	// primary is the node's own address of the family; not valid for none.
	primary netip.Addr
	// knowsPods says whether Pods of this node can be told apart.
	knowsPods bool
	// countsRemotePodsAsLocal says that Pods of other nodes are taken for this node's.
	countsRemotePodsAsLocal bool
	// apiServers are those of both families.
	apiServers []apiServer
}

// NewResolver reads from the tracker what all Services depend on.
func NewResolver(settings *Settings, t *Tracker, family plan.Family) *Resolver {
	return &Resolver{
		tracker:   t,
		settings:  settings,
		family:    family,
		locality:  locality{node: unique.Make(t.nodeName), zone: unique.Make(t.node.zone), weighs: settings.HasSchedulers, lists: settings.ResetRemovedEndpoints},
		primary:   settings.primary(family, &t.node),
		knowsPods: settings.localPods(family, t.node.podCIDRs).Known(),

		countsRemotePodsAsLocal: settings.takesRemotePodsForLocal(family),
		apiServers:              t.apiServers(),
	}
}

// Resolution is what one Service means on this node in one family.
type Resolution struct {
	// Ports are sorted by name. There are none where the Service does not exist,
	// has no cluster IP of the family or is too large.
	Ports []*plan.ServicePort
	// Created is the time of the Service's creation in Unix seconds; 0 where unknown.
	Created int64
	// DeclaredPorts is the number of ports that the object declares.
	DeclaredPorts int
	// TooLarge says which bound the Service is beyond; "" for none.
	TooLarge string
	// NotServed says why there are no Ports; plan.NoReason where the Service is served.
	NotServed plan.Reason
}

// Resolve decides what this node must do for a Service.
func (r *Resolver) Resolve(name plan.ServiceName) Resolution { return r.decide(name, nil) }

// decide records the reasons where they are not nil.
func (r *Resolver) decide(name plan.ServiceName, reasons map[plan.ServicePortName]*Reasons) Resolution {
	s := r.tracker.services[name]
	if s == nil {
		return Resolution{NotServed: r.tracker.notServed(name)}
	}
	d := Resolution{Created: s.created, DeclaredPorts: len(s.ports)}
	if !slices.ContainsFunc(s.clusterIPs, r.serves) {
		d.NotServed = plan.NoAddressOfFamily
		return d
	}
	addrs, filed := r.addresses(s), r.tracker.slices[name]
	if d.TooLarge = r.tooLarge(s, addrs, filed); d.TooLarge != "" {
		d.NotServed = plan.TooLarge
		return d
	}
	d.Ports = r.ports(s, addrs, filed, reasons)
	return d
}

// ports returns the Service's ports, sorted by name.
func (r *Resolver) ports(s *svc, addrs []serviceAddr, filed []*endpointSlice, reasons map[plan.ServicePortName]*Reasons) []*plan.ServicePort {
	ports := make([]*plan.ServicePort, 0, len(s.ports))
	var local []netip.Addr // of ready endpoints, for any port
	for _, port := range s.ports {
		name := plan.ServicePortName{ServiceName: s.name, Port: port.name, Protocol: port.protocol}
		why := newReasons(reasons, name)
		all := candidates(filed, r.family, port.name, port.protocol, s.weights, why)
		chosen := r.locality.choose(all, r.remoteHairpins(s), why)
		if s.healthCheckNodePort != 0 {
			local = r.locality.appendReady(local, all)
		}
		ports = append(ports, &plan.ServicePort{
			Name:            name,
			AffinityTimeout: s.affinity,
			Frontends:       r.frontends(s, port, addrs, chosen, why),
			Usable:          chosen.usable,
			Listed:          chosen.listed,
			Scheduler:       r.scheduler(s),
		})
	}
	slices.SortFunc(ports, func(a, b *plan.ServicePort) int { return a.Name.Compare(b.Name) })
	if len(ports) > 0 {
		ports[0].HealthCheckNodePort, ports[0].LocalEndpoints = s.healthCheckNodePort, distinct(local)
	}
	return ports
}

func (r *Resolver) scheduler(s *svc) string {
	if !r.settings.HasSchedulers {
		return ""
	}
	return s.scheduler
}

func (r *Resolver) serves(a netip.Addr) bool { return plan.FamilyOf(a) == r.family }

// serviceAddr is one address at which all ports of a Service are served.
type serviceAddr struct {
	kind    plan.FrontendKind
	addr    netip.Addr
	sources []netip.Prefix // see Frontend.Sources
}

// addresses of a Service. An address that is several things at once counts as a
// cluster IP first, then as a load-balancer IP, which may have source ranges
// where an equal external IP has none.
func (r *Resolver) addresses(s *svc) []serviceAddr {
	var out []serviceAddr
	add := func(kind plan.FrontendKind, addrs []netip.Addr, but map[netip.Addr]struct{}) {
		for _, a := range addrs {
			if _, counted := but[a]; r.serves(a) && !counted && (kind == plan.ClusterIP || !slices.Contains(s.clusterIPs, a)) {
				out = append(out, serviceAddr{kind: kind, addr: a})
			}
		}
	}
	add(plan.ClusterIP, s.clusterIPs, nil)
	if !r.settings.IgnoreExternalIPs && len(s.externalIPs) > 0 {
		balanced := make(map[netip.Addr]struct{}, len(s.loadBalancerIPs))
		for _, a := range s.loadBalancerIPs {
			balanced[a] = struct{}{}
		}
		add(plan.ExternalIP, s.externalIPs, balanced)
	}
	first := len(out)
	add(plan.LoadBalancerIP, s.loadBalancerIPs, nil)
	r.restrict(s, out[first:])
	return out
}

// frontends of one port.
func (r *Resolver) frontends(s *svc, port servicePort, addrs []serviceAddr, chosen selection, why *Reasons) []plan.Frontend {
	clusterIP := r.scope(s.internalLocal, chosen)
	inside, outside := r.externalScopes(s, chosen)
	why.scopes(clusterIP, inside, outside)
	internal, external := r.internal(clusterIP, chosen), r.external(inside, outside, chosen)
	out := make([]plan.Frontend, 0, len(addrs)+1)
	for _, a := range addrs {
		f := external
		if a.kind == plan.ClusterIP {
			f = internal
		}
		f.Kind, f.Addr, f.Port, f.Sources = a.kind, a.addr, port.port, a.sources
		r.bypass(s, port, &f, chosen)
		out = append(out, f)
	}
	if port.nodePort != 0 {
		external.Kind, external.Port = plan.NodePort, port.nodePort
		r.bypass(s, port, &external, chosen)
		out = append(out, external)
	}
	return out
}

// internal is what internalTrafficPolicy makes of a cluster IP. Traffic that
// is not from a Pod of this node is masqueraded, so that the answer comes back
// this way; where Pods cannot be told apart, nothing is.
func (r *Resolver) internal(all Scope, chosen selection) plan.Frontend {
	f := chosen.frontend(all, all)
	switch {
	case r.settings.MasqueradeAll:
		f.Masquerade = plan.AnySource
	case r.knowsPods:
		f.Masquerade = plan.FromNode | plan.FromOutside
	}
	return f
}

// external is what externalTrafficPolicy makes of the other frontends. With Local the
// node's own source is rewritten on the short way, as it may be an address that
// endpoints cannot answer.
func (r *Resolver) external(inside, outside Scope, chosen selection) plan.Frontend {
	f := chosen.frontend(inside, outside)
	f.Masquerade = plan.AnySource
	if outside.Local {
		f.Masquerade = plan.FromNode
	}
	return f
}

// externalScopes applies externalTrafficPolicy. With Local, this node's own Pods and
// processes take the short way to all endpoints: the policy is for traffic that a load
// balancer sent here.
func (r *Resolver) externalScopes(s *svc, chosen selection) (inside, outside Scope) {
	outside = r.scope(s.externalLocal, chosen)
	if outside.Local && !r.settings.KubeProxyIPVSPolicies {
		return Scope{Reason: plan.ShortWay}, outside
	}
	return outside, outside
}

// scope is what a traffic policy means in effect.
func (r *Resolver) scope(local bool, chosen selection) Scope {
	switch {
	case !local:
		return Scope{Reason: plan.PolicyCluster}
	case chosen.local.Len() == 0 && r.settings.KubeProxyIPVSPolicies:
		return Scope{Reason: plan.LocalFallback}
	}
	return Scope{Local: true, Reason: plan.PolicyLocal}
}

// in returns the endpoints of a scope.
func (s selection) in(scope Scope) *plan.EndpointSet {
	if scope.Local {
		return s.local
	}
	return s.cluster
}

// frontend sends traffic to the endpoints of its scope.
func (s selection) frontend(inside, outside Scope) plan.Frontend {
	f := plan.Frontend{Internal: s.in(inside), External: s.in(outside)}
	if outside.Local && s.exists {
		f.WhenEmpty = plan.Drop
	}
	return f
}

// remoteHairpins says whether an endpoint of another node may be the client of a
// connection that this node sends back to it with the client's address. With
// externalTrafficPolicy Local a Pod of another node that is taken for one of this
// node takes the short way. All other external traffic from other nodes is
// masqueraded, or its endpoints are on this node.
func (r *Resolver) remoteHairpins(s *svc) bool { return r.countsRemotePodsAsLocal && s.externalLocal }

// restrict gives load-balancer IPs their source ranges, sorted. Where they cover
// the node, the IP itself is a source too: the node may use it as its own when
// it talks to it.
func (r *Resolver) restrict(s *svc, balanced []serviceAddr) {
	if len(balanced) == 0 {
		return
	}
	ranges := s.sourcesOf(r.family)
	coverNode := r.primary.IsValid() && plan.AnyContains(ranges, r.primary)
	for i := range balanced {
		a := &balanced[i]
		a.sources = ranges
		if coverNode && !plan.AnyContains(ranges, a.addr) {
			a.sources = append(slices.Clone(ranges), netip.PrefixFrom(a.addr, a.addr.BitLen()))
			slices.SortFunc(a.sources, netip.Prefix.Compare)
		}
	}
}

// A Service beyond one of these bounds in a family is not served there. A small
// object can ask for a lot, as its ports are multiplied by its addresses and its
// endpoints. No Service that people need comes near:
//
//   - maxFrontends counts ports times addresses, and source ranges for each
//     frontend that has them. An object has room for some 30,000 ports, and a
//     Service with so many has one or two addresses.
//   - maxPortFrontends counts those of one port. They are written at once, as a
//     port changes atomically.
//   - maxEndpoints counts endpoints once for each port.
const (
	maxFrontends     = 1 << 16
	maxPortFrontends = 1 << 14
	maxEndpoints     = 1 << 18
)

// tooLarge says which bound a Service is beyond; "" for none.
func (r *Resolver) tooLarge(s *svc, addrs []serviceAddr, filed []*endpointSlice) string {
	each := len(addrs)
	for _, a := range addrs {
		each += len(a.sources)
	}
	all := each * len(s.ports)
	for _, port := range s.ports {
		if port.nodePort != 0 {
			all++
		}
	}
	endpoints := 0
	for _, slice := range filed {
		if slice.family == r.family {
			endpoints += len(slice.endpoints) * min(len(slice.ports), len(s.ports))
		}
	}
	switch {
	case each > maxPortFrontends:
		return fmt.Sprintf("each port has %d addresses and source ranges, more than %d", each, maxPortFrontends)
	case all > maxFrontends:
		return fmt.Sprintf("%d ports at %d addresses and source ranges make more than %d frontends", len(s.ports), each, maxFrontends)
	case endpoints > maxEndpoints:
		return fmt.Sprintf("%d ports with their endpoints make more than %d", len(s.ports), maxEndpoints)
	}
	return ""
}
