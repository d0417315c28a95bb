package daemon

import (
	"maps"

	"signalbox/internal/localhost"
	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/userspace"
)

// relay is a Proxier that carries bytes itself.
type relay interface{ Stats() userspace.Stats }

// relays is what the relays of each family did and do, with those that only
// end their connections, and with what the closed ones counted.
func (d *dataplanes) relays() map[plan.Family]userspace.Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := maps.Clone(d.ended)
	add := func(key planeKey, p proxier.Proxier) {
		if r, ok := p.(relay); ok {
			all[key.opts.Family] = sum(all[key.opts.Family], r.Stats())
		}
	}
	for key, p := range d.open {
		add(key, p)
	}
	for key, r := range d.retiring {
		add(key, r.plane)
	}
	return all
}

// sum is of two relays of one family, of which one at most takes anything new:
// their limits do not add up.
func sum(a, b userspace.Stats) userspace.Stats {
	return userspace.Stats{
		Connections: a.Connections + b.Connections, Flows: a.Flows + b.Flows,
		MaxConnections: max(a.MaxConnections, b.MaxConnections), MaxFlows: max(a.MaxFlows, b.MaxFlows),
		Accepted: a.Accepted + b.Accepted, FlowsMade: a.FlowsMade + b.FlowsMade,
		DialFailures: a.DialFailures + b.DialFailures, NoEndpoint: a.NoEndpoint + b.NoEndpoint,
		Refused: a.Refused + b.Refused, AcceptFailures: a.AcceptFailures + b.AcceptFailures,
		Lost: a.Lost + b.Lost, Transparent: a.Transparent + b.Transparent,
	}
}

// listener is a Proxier that serves NodePorts on loopback by listeners.
type listener interface{ LocalhostStats() localhost.Stats }

// localhost counts the listeners on loopback of each family whose NodePorts are
// served there. It asks the kernel without the lock.
func (d *dataplanes) localhost() map[plan.Family]localhost.Stats {
	d.mu.Lock()
	ended, planes := maps.Clone(d.endedListeners), map[plan.Family][]listener{}
	add := func(key planeKey, p proxier.Proxier) {
		if l, ok := p.(listener); ok {
			planes[key.opts.Family] = append(planes[key.opts.Family], l)
		}
	}
	for key, p := range d.open {
		add(key, p)
	}
	for key, r := range d.retiring {
		add(key, r.plane)
	}
	d.mu.Unlock()
	all := map[plan.Family]localhost.Stats{}
	for family, list := range planes {
		var s localhost.Stats
		failures := ended[family]
		for _, l := range list {
			one := l.LocalhostStats()
			failures += one.Failures
			if one.Serving {
				s = one
			}
		}
		if s.Serving {
			s.Failures = failures
			all[family] = s
		}
	}
	return all
}
