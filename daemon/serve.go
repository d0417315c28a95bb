package daemon

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"signalbox/proxier"
)

// serve runs the loop until ctx ends, but for the times when a signalbox that
// was started later serves the node.
func serve(ctx context.Context, loop *proxier.Loop, old *leftovers, log *slog.Logger) error {
	s := newSeat(log)
	defer s.leave()
	for {
		next := serveUntilAsked(ctx, s, loop, old, log)
		if next == nil {
			return nil
		}
		if err := s.give(next); err != nil {
			log.Warn("the signalbox that takes over has ended before it could", "error", err)
		}
		log.Info("another signalbox was started and serves this node; this one stands by")
		for _, standBy := range old.standBy {
			standBy()
		}
		next.outlive(ctx)
		if ctx.Err() != nil {
			return nil
		}
		log.Warn("the other signalbox has ended; this one serves the node again")
		old.forget()
		loop.Resync()
	}
}

// serveUntilAsked serves until another process wants to, which it returns; nil
// when ctx ends. When it returns nothing is being written.
func serveUntilAsked(ctx context.Context, s *seat, loop *proxier.Loop, old *leftovers, log *slog.Logger) *successor {
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	work.Go(func() { loop.Run(ctx) })
	if !old.wait(ctx) {
		return nil
	}
	err := s.take(ctx)
	work.Go(func() { old.run(ctx) })
	for ; err != nil && ctx.Err() == nil; err = s.take(ctx) {
		log.Warn("another signalbox may write rules on this node, too; asking it again to stop", "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(s.patience):
		}
	}
	if err != nil {
		return nil
	}
	return s.waits(ctx)
}
