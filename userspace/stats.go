package userspace

import (
	"sync/atomic"

	"signalbox/proxier"
)

// counters are the counts that the TCP relay does not have.
type counters struct {
	flows                        atomic.Int64
	flowsMade, lost, transparent atomic.Uint64
}

func (r *relay) stats() proxier.RelayStats {
	t, c, most := &r.tcp.Counts, &r.counts, r.tcp.Limits
	return proxier.RelayStats{
		Connections: t.Connections.Load(), Flows: c.flows.Load(),
		MaxConnections: most.Connections.Max, MaxFlows: most.Flows.Max,
		Accepted: t.Accepted.Load(), FlowsMade: c.flowsMade.Load(),
		DialFailures: t.DialFailures.Load(), NoEndpoint: t.NoEndpoint.Load(),
		Refused: t.Refused.Load(), AcceptFailures: t.AcceptFailures.Load(), Lost: c.lost.Load(), Transparent: c.transparent.Load(),
	}
}
