// SPDX-License-Identifier: Apache-2.0

package plan

import "slices"

// Equal says whether two nodes have the same facts.
func (n *Node) Equal(o *Node) bool {
	return slices.Equal(n.LocalPods.Prefixes, o.LocalPods.Prefixes) && n.LocalPods.Interface == o.LocalPods.Interface &&
		n.LocalPods.InterfacePrefix == o.LocalPods.InterfacePrefix &&
		n.NodePortAddrs.All == o.NodePortAddrs.All && slices.Equal(n.NodePortAddrs.Addrs, o.NodePortAddrs.Addrs) &&
		n.LocalhostNodePorts == o.LocalhostNodePorts && slices.Equal(n.ServiceCIDRs, o.ServiceCIDRs) &&
		slices.Equal(n.OwnPods, o.OwnPods) && slices.Equal(n.RouteSources, o.RouteSources) && slices.Equal(n.Bypass, o.Bypass) &&
		n.ResetStrays == o.ResetStrays
}

// Equal says whether two frontends are the same, with equal endpoint sets, and whether
// both have one set or two.
func (f *Frontend) Equal(o *Frontend) bool {
	return f.Kind == o.Kind && f.Addr == o.Addr && f.Port == o.Port && f.WhenEmpty == o.WhenEmpty && f.Masquerade == o.Masquerade &&
		(f.Sources == nil) == (o.Sources == nil) && slices.Equal(f.Sources, o.Sources) &&
		f.Internal.Equal(o.Internal) && f.External.Equal(o.External) &&
		f.ForeignAddr == o.ForeignAddr && slices.Equal(f.Bypass, o.Bypass) &&
		(f.Internal == f.External) == (o.Internal == o.External)
}

// Equal says whether two sets have the same endpoints; nil is equal to nil only.
func (s *EndpointSet) Equal(o *EndpointSet) bool {
	return s == o || s != nil && o != nil && slices.Equal(s.Endpoints, o.Endpoints)
}

// Equal says whether two Service ports are the same; nil is equal to nil only.
func (p *ServicePort) Equal(o *ServicePort) bool {
	if p == nil || o == nil {
		return p == o
	}
	return p.Name == o.Name && p.AffinityTimeout == o.AffinityTimeout && p.HealthCheckNodePort == o.HealthCheckNodePort &&
		p.Scheduler == o.Scheduler && p.LocalEndpoints == o.LocalEndpoints && p.Usable.Equal(o.Usable) && p.Listed.Equal(o.Listed) &&
		slices.EqualFunc(p.Frontends, o.Frontends, func(a, b Frontend) bool { return a.Equal(&b) })
}

// KeepSets makes p use the sets of its predecessor where they are equal, so
// that a pointer comparison tells what changed.
func (p *ServicePort) KeepSets(old *ServicePort) {
	if p == nil || old == nil {
		return
	}
	known := old.sets()
	for _, mine := range p.sets() {
		i := slices.IndexFunc(known, mine.Equal)
		if i < 0 || known[i] == mine {
			continue
		}
		for _, ref := range p.setRefs() {
			if *ref == mine {
				*ref = known[i]
			}
		}
	}
}

// sets returns each set of a Service port once. There are four at most.
func (p *ServicePort) sets() []*EndpointSet {
	var out []*EndpointSet
	for _, ref := range p.setRefs() {
		if !slices.Contains(out, *ref) {
			out = append(out, *ref)
		}
	}
	return out
}

func (p *ServicePort) setRefs() []**EndpointSet {
	refs := make([]**EndpointSet, 0, 1+2*len(p.Frontends))
	refs = append(refs, &p.Usable)
	if p.Listed != nil {
		refs = append(refs, &p.Listed)
	}
	for i := range p.Frontends {
		refs = append(refs, &p.Frontends[i].Internal, &p.Frontends[i].External)
	}
	return refs
}
