package userspace

import "context"

// Drain waits until the relay has no connection and no handover is in progress, or
// ctx ends. It still accepts connections: they arrive only while no other process has
// taken over the frontends. It does not wait for UDP flows: the rules of a successor
// send the client's next datagram elsewhere.
func (p *Proxier) Drain(ctx context.Context) {
	p.relay.tcp.Drain(ctx, p.relay.handingOver.Load)
}

// Relays is true as long as the relay exists.
func (p *Proxier) Relays() bool { return true }
