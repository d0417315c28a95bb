package userspace

import "sync/atomic"

// Stats are a relay's counts and limits. All but these and Connections and Flows
// only grow.
type Stats struct {
	// Connections and Flows are open now.
	Connections, Flows int64
	// MaxConnections and MaxFlows are limits of all relays of the process together.
	MaxConnections, MaxFlows int64
	// Accepted counts relayed TCP connections, FlowsMade UDP flows.
	Accepted, FlowsMade uint64
	// DialFailures counts attempts to reach an endpoint that failed,
	// NoEndpoint connections and datagrams without an endpoint.
	DialFailures, NoEndpoint uint64
	// Refused counts connections and datagrams beyond the limits.
	Refused uint64
	// AcceptFailures counts failed accepts: mostly, file descriptors were missing.
	AcceptFailures uint64
	// Lost counts datagrams of clients and endpoints that were dropped here: a
	// socket's buffer was full, or a packet filter forbade to send them.
	Lost uint64
	// Transparent counts connections and flows from their client's address.
	Transparent uint64
}

// counters are the counts that the TCP relay does not have.
type counters struct {
	flows                        atomic.Int64
	flowsMade, lost, transparent atomic.Uint64
}

func (r *relay) stats() Stats {
	t, c, most := &r.tcp.Counts, &r.counts, r.tcp.Limits
	return Stats{
		Connections: t.Connections.Load(), Flows: c.flows.Load(),
		MaxConnections: most.Connections.Max, MaxFlows: most.Flows.Max,
		Accepted: t.Accepted.Load(), FlowsMade: c.flowsMade.Load(),
		DialFailures: t.DialFailures.Load(), NoEndpoint: t.NoEndpoint.Load(),
		Refused: t.Refused.Load(), AcceptFailures: t.AcceptFailures.Load(), Lost: c.lost.Load(), Transparent: c.transparent.Load(),
	}
}
