package daemon

import (
	"maps"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// relays returns the counts of the relays of each family, those that are draining
// and those that are closed included.
func (d *dataplanes) relays() map[plan.Family]proxier.RelayStats {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := maps.Clone(d.ended)
	for family, list := range d.byFamily() {
		for _, p := range list {
			if stats, ok := p.RelayStats(); ok {
				all[family] = all[family].Add(stats)
			}
		}
	}
	return all
}

// localhost counts the listeners on loopback of each family whose NodePorts are
// served there. It asks the kernel without the lock.
func (d *dataplanes) localhost() map[plan.Family]proxier.LocalhostStats {
	d.mu.Lock()
	ended, planes := maps.Clone(d.endedListeners), d.byFamily()
	d.mu.Unlock()
	all := map[plan.Family]proxier.LocalhostStats{}
	for family, list := range planes {
		var s proxier.LocalhostStats
		failures := ended[family]
		for _, p := range list {
			one := p.LocalhostStats()
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

// byFamily lists the Proxiers that are not closed. The lock is held.
func (d *dataplanes) byFamily() map[plan.Family][]proxier.Proxier {
	all := map[plan.Family][]proxier.Proxier{}
	for key, p := range d.open {
		all[key.opts.Family] = append(all[key.opts.Family], p)
	}
	for key, r := range d.retiring {
		all[key.opts.Family] = append(all[key.opts.Family], r.plane)
	}
	return all
}
