package daemon

import (
	"maps"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// relays returns the counts of the relays of each family, those that are draining
// and those that are closed included.
func (pool *proxierPool) relays() map[plan.Family]proxier.RelayStats {
	pool.mu.Lock()
	defer pool.mu.Unlock()
	all := maps.Clone(pool.closedRelays)
	for family, list := range pool.byFamily() {
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
func (pool *proxierPool) localhost() map[plan.Family]proxier.LocalhostStats {
	pool.mu.Lock()
	closed, open := maps.Clone(pool.closedListenFailures), pool.byFamily()
	pool.mu.Unlock()
	all := map[plan.Family]proxier.LocalhostStats{}
	for family, list := range open {
		var s proxier.LocalhostStats
		failures := closed[family]
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
func (pool *proxierPool) byFamily() map[plan.Family][]proxier.Proxier {
	all := map[plan.Family][]proxier.Proxier{}
	for key, p := range pool.open {
		all[key.opts.Family] = append(all[key.opts.Family], p)
	}
	for key, r := range pool.draining {
		all[key.opts.Family] = append(all[key.opts.Family], r.proxier)
	}
	return all
}
