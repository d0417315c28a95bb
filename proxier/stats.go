// SPDX-License-Identifier: Apache-2.0

package proxier

import "signalbox/proxier/plan"

// KernelObjects counts what a mode keeps in the kernel, of one kind and in one
// table.
type KernelObjects struct {
	// Table is the name of an nftables or iptables table, and empty for what
	// is in none.
	Table string
	// Kind is "chain", "rule", "element", "virtual-server", "real-server" or
	// "address".
	Kind string
	// Count are there now; Written of them, or in their place, were written by
	// the last sync. Written is 0 in modes that do not count it.
	Count, Written int
}

// RelayStats are a relay's counts and limits. All but these and Connections and
// Flows only grow.
type RelayStats struct {
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

// Add returns the sum of two relays of one family. At most one of them takes new
// connections, so their limits do not add up.
func (s RelayStats) Add(t RelayStats) RelayStats {
	return RelayStats{
		Connections: s.Connections + t.Connections, Flows: s.Flows + t.Flows,
		MaxConnections: max(s.MaxConnections, t.MaxConnections), MaxFlows: max(s.MaxFlows, t.MaxFlows),
		Accepted: s.Accepted + t.Accepted, FlowsMade: s.FlowsMade + t.FlowsMade,
		DialFailures: s.DialFailures + t.DialFailures, NoEndpoint: s.NoEndpoint + t.NoEndpoint,
		Refused: s.Refused + t.Refused, AcceptFailures: s.AcceptFailures + t.AcceptFailures,
		Lost: s.Lost + t.Lost, Transparent: s.Transparent + t.Transparent,
	}
}

// Closed returns the counts that remain when the relay has ended.
func (s RelayStats) Closed() RelayStats {
	s.Connections, s.Flows, s.MaxConnections, s.MaxFlows = 0, 0, 0, 0
	return s
}

// LocalhostStats are the counts of listeners that serve NodePorts on the loopback
// address of one IP family.
type LocalhostStats struct {
	// Serving says that NodePorts are wanted on loopback.
	Serving   bool
	Listeners int
	// Failures counts attempts to listen that failed.
	Failures uint64
	// Refused counts packets to NodePorts on loopback that the mode's rules
	// refused, by protocol.
	Refused map[plan.Protocol]uint64
}
