// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"net/netip"
	"slices"

	"signalbox/conntrack"
	"signalbox/proxier/plan"
)

// maxFlows is how many tracked connections an answer shows.
const maxFlows = 20

// FlowLister has the form of conntrack.List.
type FlowLister func(plan.Family, plan.Protocol, func(conntrack.Flow)) error

// track adds the tracked connections. nodeAddrs are the addresses at which NodePorts
// may be served.
func (a *Answer) track(list FlowLister, nodeAddrs []netip.Addr) {
	for i := range a.Ports {
		if err := a.Ports[i].track(list, nodeAddrs); err != nil {
			a.Problems = append(a.Problems, "tracked connections are not known: "+err.Error())
			return
		}
	}
}

func (p *Port) track(list FlowLister, nodeAddrs []netip.Addr) error {
	used := map[string]bool{}
	for _, s := range p.Sets {
		for _, e := range s.Endpoints {
			used[e.Address] = used[e.Address] || e.Used
		}
	}
	key := p.frontends[0]
	t := &Tracked{Flows: []Flow{}}
	err := list(p.family(), key.Protocol, func(f conntrack.Flow) {
		if !p.frontends.has(f.Frontend, key.Protocol, nodeAddrs) {
			return
		}
		if t.Count++; t.Count <= maxFlows {
			t.Flows = append(t.Flows, Flow{f.Client.String(), f.Frontend.String(), f.Endpoint.String(), f.Source.String(), used[f.Endpoint.String()]})
		}
	})
	if err == nil {
		p.Tracked = t
	}
	return err
}

func (p *Port) family() plan.Family {
	if p.Family == plan.IPv6.String() {
		return plan.IPv6
	}
	return plan.IPv4
}

// frontendKeys are frontends of a Service port.
type frontendKeys []plan.FrontendKey

// has says whether a connection went to one of the frontends. nodeAddrs are the
// addresses at which NodePorts may be served.
func (keys frontendKeys) has(to netip.AddrPort, protocol plan.Protocol, nodeAddrs []netip.Addr) bool {
	return slices.ContainsFunc(keys, func(k plan.FrontendKey) bool {
		if k.Port != to.Port() || k.Protocol != protocol {
			return false
		}
		return k.Addr == to.Addr() || !k.Addr.IsValid() && (to.Addr().IsLoopback() || slices.Contains(nodeAddrs, to.Addr()))
	})
}
