package userspace

import "sync/atomic"

// Stats are counts of what a relay did and does, and its limits. All but those
// and Connections and Flows only grow.
type Stats struct {
	// Connections and Flows are open now.
	Connections, Flows int64
	// MaxConnections and MaxFlows may be open, in all relays of the process
	// together: see Refused.
	MaxConnections, MaxFlows int64
	// Accepted counts relayed TCP connections, FlowsMade UDP flows.
	Accepted, FlowsMade uint64
	// DialFailures counts attempts to reach an endpoint that failed,
	// NoEndpoint connections and datagrams that no endpoint could be found for.
	DialFailures, NoEndpoint uint64
	// Refused counts connections and datagrams that found as many connections
	// or flows open as there may be, with those of other relays.
	Refused uint64
	// AcceptFailures counts failed accepts, for want of file descriptors most
	// likely.
	AcceptFailures uint64
	// Lost counts datagrams, of clients and answers, that found no room on this
	// node, because a device was slow or the relay, or that a packet filter
	// forbade to send.
	Lost uint64
	// Transparent counts connections and flows that bear their client's
	// address.
	Transparent uint64
}

// counters are those of Stats that the TCP relay does not count.
type counters struct {
	flows                        atomic.Int64
	flowsMade, lost, transparent atomic.Uint64
}

func (r *relay) stats() Stats {
	t, c, most := &r.tcp.Counts, &r.counts, r.tcp.Limits
	return Stats{
		Connections: t.Connections.Load(), Flows: c.flows.Load(),
		MaxConnections: most.Connections.Most, MaxFlows: most.Flows.Most,
		Accepted: t.Accepted.Load(), FlowsMade: c.flowsMade.Load(),
		DialFailures: t.DialFailures.Load(), NoEndpoint: t.NoEndpoint.Load(),
		Refused: t.Refused.Load(), AcceptFailures: t.AcceptFailures.Load(), Lost: c.lost.Load(), Transparent: c.transparent.Load(),
	}
}
