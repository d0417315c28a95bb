// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"signalbox/modes"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// proxierPool has the Proxiers that are open. They outlive a change of the
// configuration that does not concern them. Otherwise a relay would lose its
// connections, and a table would have to be read back from the kernel.
type proxierPool struct {
	used map[poolKey]bool // by the configuration in force
	// serving says that every Proxier in use was synced under the configuration in
	// force.
	serving atomic.Bool

	mu       sync.Mutex // guards what follows
	open     map[poolKey]proxier.Proxier
	draining map[poolKey]*drainingProxier
	// closedRelays has the counts of closed relays.
	closedRelays map[plan.Family]proxier.RelayStats
	// closedListenFailures counts failures to listen on loopback, of closed Proxiers.
	closedListenFailures map[plan.Family]uint64
}

type poolKey struct {
	mode string
	opts proxier.Options
}

// drainingProxier is a Proxier out of use through which connections pass.
type drainingProxier struct {
	proxier proxier.Proxier
	cancel  context.CancelFunc
	closed  chan struct{} // closed when the Proxier is closed, or in use again
}

func newProxierPool() *proxierPool {
	return &proxierPool{
		used: map[poolKey]bool{}, open: map[poolKey]proxier.Proxier{},
		draining: map[poolKey]*drainingProxier{}, closedRelays: map[plan.Family]proxier.RelayStats{}, closedListenFailures: map[plan.Family]uint64{},
	}
}

// begin starts another configuration. It comes before the first get.
func (pool *proxierPool) begin() {
	pool.used = map[poolKey]bool{}
	pool.serving.Store(false)
}

// get returns the Proxier of a mode, which may be open already.
func (pool *proxierPool) get(mode proxier.Mode, opts proxier.Options) (proxier.Proxier, error) {
	key := poolKey{mode.Name(), opts}
	p := pool.reuse(key)
	if p == nil {
		var err error
		if p, err = mode.New(opts); err != nil {
			return nil, err
		}
	}
	pool.mu.Lock()
	defer pool.mu.Unlock()
	pool.open[key] = p
	pool.used[key] = true
	return p, nil
}

// reuse returns a Proxier that is open, and ends its draining; nil if there is none.
func (pool *proxierPool) reuse(key poolKey) proxier.Proxier {
	pool.mu.Lock()
	defer pool.mu.Unlock()
	draining := pool.draining[key]
	if draining == nil {
		return pool.open[key]
	}
	delete(pool.draining, key)
	draining.cancel()
	return draining.proxier
}

// closeUnused is called when every Proxier in use was synced. Until then, packets went
// through those of the earlier configuration. It closes these, or drains them first if
// connections pass through them.
func (pool *proxierPool) closeUnused(log *slog.Logger) {
	pool.serving.Store(true)
	pool.mu.Lock()
	defer pool.mu.Unlock()
	for key, p := range pool.open {
		if pool.used[key] {
			continue
		}
		delete(pool.open, key)
		if p.Relays() {
			pool.drainAndClose(key, p, log)
		} else {
			logClosing(pool.closeProxier(key, p), log)
		}
	}
	for key, r := range pool.draining {
		// Listeners at NodePorts get connections without any rule.
		if !modes.TraitsOf(key.mode).RelaysByRules || pool.replaced(key) {
			r.proxier.Pause()
		}
	}
}

// closeProxier closes a Proxier and keeps its counts. The lock is held.
func (pool *proxierPool) closeProxier(key poolKey, p proxier.Proxier) error {
	err := p.Close()
	if stats, ok := p.RelayStats(); ok {
		pool.closedRelays[key.opts.Family] = pool.closedRelays[key.opts.Family].Add(stats.Closed())
	}
	pool.closedListenFailures[key.opts.Family] += p.LocalhostStats().Failures
	return err
}

// replaced says whether a Proxier in use has the mode and the family of one that is
// not.
func (pool *proxierPool) replaced(old poolKey) bool {
	for key := range pool.open {
		if pool.used[key] && key.mode == old.mode && key.opts.Family == old.opts.Family {
			return true
		}
	}
	return false
}

// arrivalTime is how long after a change of rules a connection may arrive that obeyed
// the old ones. It includes one retransmission of the first packet.
const arrivalTime = 5 * time.Second

// drainAndClose closes a Proxier once no connection passes through it. The lock is
// held.
func (pool *proxierPool) drainAndClose(key poolKey, p proxier.Proxier, log *slog.Logger) {
	ctx, cancel := context.WithCancel(context.Background())
	r := &drainingProxier{proxier: p, cancel: cancel, closed: make(chan struct{})}
	pool.draining[key] = r
	go func() {
		defer close(r.closed)
		select { // connections that were led here before may arrive yet
		case <-time.After(arrivalTime):
		case <-ctx.Done():
		}
		p.Drain(ctx)
		pool.mu.Lock()
		defer pool.mu.Unlock()
		if pool.draining[key] == r { // else it is in use again
			delete(pool.draining, key)
			logClosing(pool.closeProxier(key, p), log)
		}
	}()
}

// waitDrained waits until no connection passes through Proxiers out of use; false if
// ctx ends first.
func (pool *proxierPool) waitDrained(ctx context.Context) bool {
	pool.mu.Lock()
	var waits []chan struct{}
	for _, r := range pool.draining {
		waits = append(waits, r.closed)
	}
	pool.mu.Unlock()
	for _, gone := range waits {
		select {
		case <-gone:
		case <-ctx.Done():
			return false
		}
	}
	return ctx.Err() == nil
}

// relaying lists the Proxiers, in use or not, through which connections pass.
func (pool *proxierPool) relaying() []proxier.Proxier {
	pool.mu.Lock()
	defer pool.mu.Unlock()
	var list []proxier.Proxier
	for _, r := range pool.draining {
		list = append(list, r.proxier)
	}
	for _, p := range pool.open {
		if p.Relays() {
			list = append(list, p)
		}
	}
	return list
}

// pause pauses all Proxiers, in use or not.
func (pool *proxierPool) pause() {
	pool.mu.Lock()
	defer pool.mu.Unlock()
	for _, r := range pool.draining {
		r.proxier.Pause()
	}
	for _, p := range pool.open {
		p.Pause()
	}
}

// close closes all Proxiers. Rules stay in the kernel.
func (pool *proxierPool) close() error {
	pool.mu.Lock()
	defer pool.mu.Unlock()
	var failed []error
	for key, r := range pool.draining {
		delete(pool.draining, key)
		r.cancel()
		failed = append(failed, pool.closeProxier(key, r.proxier))
	}
	for key, p := range pool.open {
		delete(pool.open, key)
		failed = append(failed, pool.closeProxier(key, p))
	}
	return errors.Join(failed...)
}

func logClosing(err error, log *slog.Logger) {
	if err != nil {
		log.Warn("a mode's connections to the kernel cannot be closed cleanly", "error", err)
	}
}

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
