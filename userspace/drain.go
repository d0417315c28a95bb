package userspace

import (
	"context"
	"time"
)

// Drain waits until no connection is relayed any more, or ctx ends. New ones are
// still taken: they come only while nobody else has taken over the frontends.
// UDP flows are not waited for, with other rules in place the client's next
// datagram goes another way; but what was on its way at StandBy is.
func (p *Proxier) Drain(ctx context.Context) {
	tick := time.NewTicker(drainInterval)
	defer tick.Stop()
	for p.Stats().Connections > 0 || p.relay.leaving.Load() {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

const drainInterval = 50 * time.Millisecond
