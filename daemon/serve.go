package daemon

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"signalbox/proxier"
)

// serve runs the loop until ctx ends, but for the times when a signalbox that
// was started later serves the node. beside is what runs with the loop, and for
// as long: servers, whose ports the other needs. It is given what is closed when
// the other has let go of them. Its error ends everything.
func serve(ctx context.Context, s *seat, loop *proxier.Loop, beside func(context.Context, <-chan struct{}) error, planes *dataplanes, old *leftovers, log *slog.Logger) error {
	for again := false; s.standBy(ctx); again = true {
		if again {
			log.Warn("the other signalbox has ended; this one serves the node again")
			old.forget()
			loop.Resync()
		}
		next, err := serveUntilAsked(ctx, s, loop, beside, old, log)
		if next == nil || err != nil {
			return err
		}
		planes.standBy() // before it is said that nothing is written any more
		if err := s.give(next); err != nil {
			log.Warn("the signalbox that takes over has ended before it could", "error", err)
		}
		log.Info("another signalbox was started and serves this node; this one stands by")
	}
	return nil
}

// serveUntilAsked serves until another process wants to, which it returns; nil
// when ctx ends, or with the error of beside. When it returns nothing is being
// written.
func serveUntilAsked(ctx context.Context, s *seat, loop *proxier.Loop, beside func(context.Context, <-chan struct{}) error, old *leftovers, log *slog.Logger) (*successor, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var work sync.WaitGroup
	var failed error
	free := make(chan struct{})
	seated := sync.OnceFunc(func() { close(free) })
	if s.mine() {
		seated() // another configuration of this process had the ports
	}
	work.Go(func() { loop.Run(ctx) })
	work.Go(func() {
		if failed = beside(ctx, free); failed != nil {
			cancel()
		}
	})
	next := takeSeat(ctx, s, seated, &work, old, log)
	cancel()
	work.Wait()
	return next, failed
}

// takeSeat gets the seat once everything is served, and returns who wants it
// next; nil when ctx ends.
func takeSeat(ctx context.Context, s *seat, seated func(), work *sync.WaitGroup, old *leftovers, log *slog.Logger) *successor {
	if !old.wait(ctx) {
		return nil
	}
	old.settleFlows(ctx)
	err := s.take(ctx)
	work.Go(func() { old.run(ctx, s) })
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
	seated()
	return s.waits(ctx)
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
