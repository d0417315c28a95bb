// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"signalbox/daemon/nodelock"
	"signalbox/internal/wait"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// serve runs the loop until ctx ends, except while a signalbox that started later
// serves the node. An error is about a port; see servers.open.
func (c *configRun) serve(ctx context.Context) error {
	for again := false; c.nodeLock.WaitWhileHandedOver(ctx); again = true {
		if again {
			c.log.Warn("the other signalbox has ended; this one serves the node again")
			c.initialSync.reset()
			c.loop.RequestFullWrite()
		}
		next, err := c.serveUntilContender(ctx)
		if next == nil || err != nil {
			return err
		}
		c.observer.servers.close() // the other needs the ports
		handOver(c.pool, c.nodeLock, next, c.log)
	}
	return nil
}

// handOver pauses all Proxiers and hands the node lock over. The pause comes first: the
// contender must not write before this process has stopped writing.
func handOver(pool *proxierPool, lock *nodelock.Lock, next *nodelock.Contender, log *slog.Logger) {
	pool.pause()
	if err := lock.HandOver(next); err != nil {
		log.Warn("the signalbox that takes over has ended before it could", "error", err)
		return
	}
	log.Info("another signalbox was started and serves this node; this one is paused")
}

// serveUntilContender serves until another process requests the node lock, and returns
// that process; nil when ctx ends. When it returns, nothing is being written.
func (c *configRun) serveUntilContender(ctx context.Context) (*nodelock.Contender, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := c.observer.servers.open(c, c.nodeLock.Held()); err != nil {
		return nil, err
	}
	var work sync.WaitGroup
	work.Go(func() { _ = c.loop.Run(ctx) }) // it never fails
	next := c.acquireNodeLock(ctx, &work)
	cancel()
	work.Wait()
	return next, nil
}

// acquireNodeLock acquires the node lock once everything is served, and returns the
// next contender; nil when ctx ends.
func (c *configRun) acquireNodeLock(ctx context.Context, work *sync.WaitGroup) *nodelock.Contender {
	if !c.initialSync.wait(ctx) {
		return nil
	}
	c.flushFlows(ctx)
	err := c.acquire(ctx)
	if ctx.Err() != nil {
		return nil
	}
	work.Go(func() { c.foreignRules.run(ctx, c.nodeLock) })
	for ; err != nil && ctx.Err() == nil; err = c.acquire(ctx) {
		c.log.Warn("another signalbox may write rules on this node, too; asking it again to stop", "error", err)
		wait.For(ctx, nodelock.HandoverTimeout)
	}
	if err != nil {
		return nil
	}
	c.observer.servers.predecessorGone()
	return c.nodeLock.NextContender(ctx)
}

// acquire acquires the node lock. It has the mode mend what an earlier process may have
// changed before it handed over. A mode with FullWriteAfterTakeover does that before acquire
// returns, because afterwards things are removed that serve meanwhile.
func (c *configRun) acquire(ctx context.Context) error {
	if c.nodeLock.Held() {
		return nil // no other process has written since
	}
	if err := c.nodeLock.Acquire(ctx, c.cfg.RunDir); err != nil || !c.nodeLock.TookOver() {
		return err
	}
	if !c.choice.Mode.Traits().FullWriteAfterTakeover {
		c.loop.RepairNow()
		return nil
	}
	c.initialSync.reset()
	c.loop.RequestFullWrite()
	c.initialSync.wait(ctx)
	return ctx.Err()
}

// flowFlushTimeout bounds the wait for stale flows.
const flowFlushTimeout = 5 * time.Second

// flushFlows waits until UDP flows have left what served before. A relay that is
// paused refuses their datagrams.
func (c *configRun) flushFlows(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, flowFlushTimeout)
	defer cancel()
	if err := c.flows.Flush(ctx); err != nil {
		c.log.Debug("UDP flows may still lead to the previous process or mode", "error", err)
	}
}

// drainTimeout bounds the wait for relayed connections when the process ends. By
// default, Kubernetes gives a Pod 30 s to end.
const drainTimeout = 25 * time.Second

// drain waits for the end of connections that pass through this process. Meanwhile it
// hands the node lock over on request.
func drain(pool *proxierPool, lock *nodelock.Lock, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	var asked, drained sync.WaitGroup
	defer asked.Wait()
	defer cancel()
	asked.Go(func() {
		if next := lock.NextContender(ctx); next != nil {
			handOver(pool, lock, next, log)
		}
	})
	for _, p := range pool.relaying() {
		drained.Go(func() { p.Drain(ctx) })
	}
	drained.Wait()
	if ctx.Err() != nil {
		log.Warn("connections that are still relayed end with this process", "after", drainTimeout)
	}
}

// initialSync tells when all Services of all families are in the kernel.
type initialSync struct {
	families int
	// onComplete is called each time that they are, before wait returns.
	onComplete func()

	mu      sync.Mutex // guards what follows
	current map[plan.Family]bool
	// written are the families in which everything was written since reset.
	written map[plan.Family]bool
	all     chan struct{} // closed when all families are served
}

func newInitialSync(families int, complete func()) *initialSync {
	s := &initialSync{families: families, onComplete: complete}
	s.reset()
	return s
}

// reset starts anew: every family must be written again.
func (s *initialSync) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current, s.written, s.all = map[plan.Family]bool{}, map[plan.Family]bool{}, make(chan struct{})
}

// synced takes in each sync, and says whether it is the first that serves the family:
// everything was written, and the kernel is up to date. A Service in quarantine does
// not keep the node from serving all others.
func (s *initialSync) synced(r syncer.SyncReport) (first bool) {
	s.mu.Lock()
	s.written[r.Family] = s.written[r.Family] || r.All
	first = r.Current && s.written[r.Family] && !s.current[r.Family]
	if first {
		s.current[r.Family] = true
	}
	last, all := first && len(s.current) == s.families, s.all
	s.mu.Unlock()
	if last {
		s.onComplete()
		close(all)
	}
	return first
}

// wait returns when all families are served; false if ctx ends first.
func (s *initialSync) wait(ctx context.Context) bool {
	s.mu.Lock()
	all := s.all
	s.mu.Unlock()
	select {
	case <-all:
		return true
	case <-ctx.Done():
		return false
	}
}
