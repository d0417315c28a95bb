// SPDX-License-Identifier: Apache-2.0

package service

import (
	"maps"
	"net/netip"
	"slices"

	"signalbox/proxier/plan"
)

// apiServerService is the Service whose endpoints are the API servers. The API server
// itself maintains it.
var apiServerService = plan.ServiceName{Namespace: "default", Name: "kubernetes"}

// SetAPIServers sets the addresses and ports to which this process connects for the API
// server, and the addresses of the node's interfaces.
func (t *Tracker) SetAPIServers(connections []netip.AddrPort, local []netip.Addr) {
	defer t.changeAPIServers()()
	t.connections, t.localAddrs = connections, local
}

// changeAPIServers is called before what apiServers depends on may change, and its
// result afterwards. It makes the Services dirty that have an address or port of an API
// server.
func (t *Tracker) changeAPIServers() (after func()) {
	before := t.apiServers()
	return func() {
		now := t.apiServers()
		if slices.Equal(before, now) {
			return
		}
		all := slices.Concat(before, now)
		t.dirtyWhere(func(name plan.ServiceName) bool { return slices.ContainsFunc(all, t.services[name].mayHave) })
	}
}

// apiServer is where an API server listens.
type apiServer struct {
	netip.AddrPort
	local bool // the address is this node's
}

// apiServers are those to which this process connects, directly or through the cluster
// IP of apiServerService. There are none without an API server.
func (t *Tracker) apiServers() []apiServer {
	if len(t.connections) == 0 {
		return nil
	}
	at := slices.Clone(t.connections)
	for _, s := range t.slices[apiServerService] {
		for _, port := range s.ports {
			for i := range s.endpoints {
				at = append(at, netip.AddrPortFrom(s.endpoints[i].addr, port.port))
			}
		}
	}
	slices.SortFunc(at, netip.AddrPort.Compare)
	var servers []apiServer
	for _, a := range slices.Compact(at) {
		servers = append(servers, apiServer{a, a.Addr().IsLoopback() || slices.Contains(t.localAddrs, a.Addr())})
	}
	return servers
}

// APIServersInServiceCIDRs returns the API servers of other hosts whose addresses are in
// the ServiceCIDRs of the family. Packets to an unallocated cluster IP are dropped. They
// must pass if an API server has the address: only it can say that a ServiceCIDR is gone.
func (t *Tracker) APIServersInServiceCIDRs(family plan.Family) (at []netip.AddrPort) {
	cidrs := t.cidrsOf(family)
	if len(cidrs) == 0 {
		return nil
	}
	for _, server := range t.apiServers() {
		if !server.local && plan.AnyContains(cidrs, server.Addr()) {
			at = append(at, server.AddrPort)
		}
	}
	return at
}

// ServiceCIDROf names the first ServiceCIDR with the address.
func (t *Tracker) ServiceCIDROf(a netip.Addr) string {
	for _, name := range slices.Sorted(maps.Keys(t.serviceCIDRs)) {
		if plan.AnyContains(t.serviceCIDRs[name], a) {
			return name
		}
	}
	return ""
}

// mayHave says whether a frontend of the Service may have the API server's address, or
// its port on this node.
func (s *svc) mayHave(server apiServer) bool {
	a := server.Addr()
	return slices.Contains(s.externalIPs, a) || slices.Contains(s.loadBalancerIPs, a) || slices.Contains(s.clusterIPs, a) ||
		server.local && slices.ContainsFunc(s.ports, func(p servicePort) bool { return p.nodePort == server.Port() })
}

// bypass keeps this node's connections to an API server out of a frontend. A Service
// that leads to API servers alone takes them like all others: it is how such a server is
// reached.
func (r *Resolver) bypass(s *svc, port servicePort, f *plan.Frontend, chosen selection) {
	if len(r.apiServers) == 0 || s.name == apiServerService || r.leadsToAPIServers(chosen.usable) {
		return
	}
	for _, server := range r.apiServers {
		isAddr := server.Addr() == f.Addr
		f.ForeignAddr = f.ForeignAddr || isAddr
		if port.protocol == plan.TCP && server.Port() == f.Port && (isAddr || f.Kind == plan.NodePort && server.local && r.serves(server.Addr())) {
			f.Bypass = append(f.Bypass, server.Addr())
		}
	}
}

func (r *Resolver) leadsToAPIServers(endpoints *plan.EndpointSet) bool {
	return endpoints.Len() > 0 && !slices.ContainsFunc(endpoints.Endpoints, func(e plan.Endpoint) bool {
		return !slices.ContainsFunc(r.apiServers, func(s apiServer) bool { return s.AddrPort == e.AddrPort })
	})
}
