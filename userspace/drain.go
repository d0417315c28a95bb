package userspace

import "context"

// Drain waits until no connection is relayed any more, or ctx ends. New ones are
// still taken: they come only while nobody else has taken over the frontends.
// UDP flows are not waited for, with other rules in place the client's next
// datagram goes another way; but what was on its way at StandBy is.
func (p *Proxier) Drain(ctx context.Context) {
	p.relay.tcp.Drain(ctx, p.relay.leaving.Load)
}

// Relays is true for all of a relay's life.
func (p *Proxier) Relays() bool { return true }
