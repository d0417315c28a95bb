package syncer

import (
	"signalbox/proxier/plan"
)

import "slices"

// FlowCleaner removes connection-tracking flows that point at what is gone.
// The kernel decides where a connection goes once, at its first packet: a UDP
// client that keeps its source port would otherwise send to a removed endpoint
// for as long as it sends at all.
type FlowCleaner interface {
	// Clean queues the work and returns at once. For each owner, every UDP
	// flow to one of its Frontends is removed unless it is answered by an
	// endpoint in Serving.
	Clean(family plan.Family, owners []plan.FlowOwner)
}

// flowOwners says who may answer the UDP flows that writing these Service
// ports could have changed. It is asked before they are noted as written.
func (p *planner) flowOwners(names []plan.ServicePortName) []plan.FlowOwner {
	var owners []plan.FlowOwner
	gone := plan.FlowOwner{Usable: plan.NoEndpoints}
	for _, name := range names {
		was, changed := p.changed[name]
		if !changed || name.Protocol != plan.UDP {
			continue
		}
		now := p.plan.Services[name]
		before, after := was.Keys(), now.Keys()
		for _, key := range before {
			// Who has taken a frontend over has changed and is an owner too.
			if _, taken := p.owners.owners[key]; !taken {
				gone.Frontends = append(gone.Frontends, key)
			}
		}
		if now != nil && len(after) > 0 && (was == nil || was.Usable != now.Usable || !slices.Equal(before, after)) {
			owners = append(owners, plan.FlowOwner{Frontends: after, Usable: now.Usable})
		}
	}
	if len(gone.Frontends) > 0 {
		owners = append(owners, gone)
	}
	return owners
}
