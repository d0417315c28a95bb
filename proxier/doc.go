// Package proxier holds what signalbox decides: the objects a node knows
// (Tracker), what this node must do for each Service (Plan), the contract of a
// mode that does it (Proxier) and the loop that drives all three (Loop).
//
// Data goes one way: a source tells a Loop about objects, the Tracker merges
// them, the resolver turns each dirty Service into ServicePorts, the planner
// settles which of several claims to a frontend counts, and a Proxier writes
// the changed ServicePorts into the kernel in one transaction. Every
// rule of the Service API (traffic policy, topology, fallback, masquerade,
// reject or drop) is decided in the resolver; a Proxier only reads frontends
// and endpoint sets.
//
// A Service that the kernel refuses is quarantined, and its rules are tried again.
// The search for it takes turns with new changes, and takes away nothing that this
// process got into the kernel, unless the kernel will not take that again.
//
// Nothing in this package talks to a kernel or to an API server.
package proxier
