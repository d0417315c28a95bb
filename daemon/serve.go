package daemon

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"signalbox/internal/wait"
)

// serve runs the loop until ctx ends, but for the times when a signalbox that
// was started later serves the node. An error is about a port; see servers.open.
func (g *generation) serve(ctx context.Context) error {
	for again := false; g.seat.standBy(ctx); again = true {
		if again {
			g.log.Warn("the other signalbox has ended; this one serves the node again")
			g.served.forget()
			g.loop.Resync()
		}
		next, err := g.serveUntilAsked(ctx)
		if next == nil || err != nil {
			return err
		}
		g.observer.servers.close() // the other needs the ports
		g.planes.standBy()         // before it is said that nothing is written any more
		if err := g.seat.give(next); err != nil {
			g.log.Warn("the signalbox that takes over has ended before it could", "error", err)
		}
		g.log.Info("another signalbox was started and serves this node; this one stands by")
	}
	return nil
}

// serveUntilAsked serves until another process wants to, which it returns; nil
// when ctx ends. When it returns nothing is being written.
func (g *generation) serveUntilAsked(ctx context.Context) (*successor, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := g.observer.servers.open(g, g.seat.mine()); err != nil {
		return nil, err
	}
	var work sync.WaitGroup
	work.Go(func() { _ = g.loop.Run(ctx) }) // it never fails
	next := g.takeSeat(ctx, &work)
	cancel()
	work.Wait()
	return next, nil
}

// takeSeat gets the seat once everything is served, and returns who wants it
// next; nil when ctx ends.
func (g *generation) takeSeat(ctx context.Context, work *sync.WaitGroup) *successor {
	if !g.served.wait(ctx) {
		return nil
	}
	g.settleFlows(ctx)
	err := g.seat.take(ctx)
	if !g.rewrite(ctx) {
		return nil
	}
	work.Go(func() { g.leftovers.run(ctx, g.seat) })
	for ; err != nil && ctx.Err() == nil; err = g.seat.take(ctx) {
		g.log.Warn("another signalbox may write rules on this node, too; asking it again to stop", "error", err)
		wait.For(ctx, g.seat.patience)
	}
	if err != nil {
		return nil
	}
	g.observer.servers.seated()
	return g.seat.waits(ctx)
}

// rewrite has a mode with RewriteAfterTakeover read back and mend what another
// signalbox, in another mode, may have changed before it let go. It returns before
// anything is removed that serves meanwhile; false if ctx ends first.
func (g *generation) rewrite(ctx context.Context) bool {
	if !g.choice.Mode.Traits().RewriteAfterTakeover || !g.seat.inherited() {
		return true
	}
	g.served.forget()
	g.loop.Resync()
	return g.served.wait(ctx)
}

// settleTime bounds the wait for stale flows.
const settleTime = 5 * time.Second

// settleFlows waits until UDP flows have left what served before. A relay that
// the node is taken from refuses them afterwards.
func (g *generation) settleFlows(ctx context.Context) {
	if g.flows == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	if err := g.flows.Flush(ctx); err != nil {
		g.log.Debug("UDP flows may yet lead to what served before", "error", err)
	}
}

// drainTime bounds the wait for such connections when the process is told to
// end. It is less than the 30 s that Kubernetes gives a Pod for that by default.
const drainTime = 25 * time.Second

// drain lets connections end that pass through this process. Meanwhile it lets
// go of the seat when it is asked to.
func drain(planes *dataplanes, s *seat, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	var asked, drained sync.WaitGroup
	defer asked.Wait()
	defer cancel()
	asked.Go(func() {
		if next := s.waits(ctx); next != nil {
			if err := s.give(next); err != nil {
				log.Warn("the signalbox that takes over has ended before it could", "error", err)
				return
			}
			planes.standBy()
		}
	})
	for _, p := range planes.drainers() {
		drained.Go(func() { p.Drain(ctx) })
	}
	drained.Wait()
	if ctx.Err() != nil {
		log.Warn("connections that are relayed yet end with this process", "after", drainTime)
	}
}
