package daemon

import (
	"maps"

	"signalbox/proxier"
	"signalbox/userspace"
)

// relay is a Proxier that carries bytes itself.
type relay interface{ Stats() userspace.Stats }

// relays is what the relays of each family did and do, with those that only
// end their connections, and with what the closed ones counted.
func (d *dataplanes) relays() map[proxier.Family]userspace.Stats {
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
