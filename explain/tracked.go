// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"context"
	"net/netip"
	"slices"

	"signalbox/conntrack"
	"signalbox/proxier/plan"
)

// maxFlows is how many tracked connections an answer shows.
const maxFlows = 20

// FlowLister has the form of conntrack.List.
type FlowLister func(plan.Family, plan.Protocol, func(conntrack.Flow)) error

// Track adds the tracked connections, of the client only if the question names one.
// nodeAddrs are the addresses at which NodePorts may be served.
func (a *Answer) Track(ctx context.Context, list FlowLister, nodeAddrs []netip.Addr) {
	index := newFrontendIndex(nodeAddrs)
	for i := range a.Ports {
		a.Ports[i].Tracked = &Tracked{Flows: []Flow{}}
		if a.client.IsValid() {
			a.Ports[i].Tracked.Client = a.client.String()
		}
		index.add(i, a.Ports[i].family(), a.Ports[i].frontends)
	}
	err := index.list(ctx, list, func(e conntrack.Event) {
		if a.client.IsValid() && e.Client.Addr() != a.client {
			return
		}
		if i, found := index.find(e.Frontend, e.Protocol); found {
			a.Ports[i].show(e.Flow)
		}
	})
	if err != nil {
		for i := range a.Ports {
			a.Ports[i].Tracked = nil
		}
		a.Problems = append(a.Problems, "tracked connections are not known: "+err.Error())
	}
}

// show counts a tracked connection, and keeps the first ones.
func (p *Port) show(f conntrack.Flow) {
	t := p.Tracked
	if t.Count++; t.Count <= maxFlows {
		t.Flows = append(t.Flows, Flow{f.Client.String(), f.Frontend.String(), f.Endpoint.String(), f.Source.String(), p.uses(f.Endpoint.String())})
	}
}

// uses says whether an endpoint gets new connections.
func (p *Port) uses(endpoint string) bool {
	return slices.ContainsFunc(p.Sets, func(s Set) bool {
		return slices.ContainsFunc(s.Endpoints, func(e Endpoint) bool { return e.Used && e.Address == endpoint })
	})
}

func (p *Port) family() plan.Family {
	if p.Family == plan.IPv6.String() {
		return plan.IPv6
	}
	return plan.IPv4
}

// frontendIndex finds the Service port of a connection, by a number.
type frontendIndex struct {
	numbers   map[familyKey]int
	nodeAddrs map[netip.Addr]bool // NodePorts may be served there
	kinds     []flowKind          // of the frontends, each once
}

// familyKey is a frontend. The address of a NodePort does not tell the family.
type familyKey struct {
	family plan.Family
	plan.FrontendKey
}

// flowKind is what one reading of the connection tracking table is about.
type flowKind struct {
	family   plan.Family
	protocol plan.Protocol
}

func newFrontendIndex(nodeAddrs []netip.Addr) *frontendIndex {
	x := &frontendIndex{numbers: map[familyKey]int{}, nodeAddrs: map[netip.Addr]bool{}}
	for _, a := range nodeAddrs {
		x.nodeAddrs[a] = true
	}
	return x
}

// add gives a number to frontends.
func (x *frontendIndex) add(number int, family plan.Family, keys []plan.FrontendKey) {
	for _, key := range keys {
		x.numbers[familyKey{family, key}] = number
		if kind := (flowKind{family, key.Protocol}); !slices.Contains(x.kinds, kind) {
			x.kinds = append(x.kinds, kind)
		}
	}
}

// find returns the number of the frontend to which a connection went.
func (x *frontendIndex) find(to netip.AddrPort, protocol plan.Protocol) (number int, found bool) {
	key := familyKey{plan.FamilyOf(to.Addr()), plan.FrontendKey{Addr: to.Addr(), Port: to.Port(), Protocol: protocol}}
	if number, found = x.numbers[key]; !found && (to.Addr().IsLoopback() || x.nodeAddrs[to.Addr()]) {
		key.Addr = netip.Addr{}
		number, found = x.numbers[key]
	}
	return number, found
}

// list calls fn with each tracked connection that a frontend may have. It reads the table
// once for each kind, because it may be large.
func (x *frontendIndex) list(ctx context.Context, list FlowLister, fn func(conntrack.Event)) error {
	for _, k := range x.kinds {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := list(k.family, k.protocol, func(f conntrack.Flow) {
			fn(conntrack.Event{Flow: f, Step: conntrack.StepOpen, Family: k.family, Protocol: k.protocol})
		})
		if err != nil {
			return err
		}
	}
	return nil
}
