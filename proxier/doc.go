// Package proxier holds what signalbox decides: the objects a node knows
// (Tracker), what this node must do for each Service (Resolver, Plan), the
// contract of a mode that does it (Proxier) and the loop that drives all
// three (Loop).
//
// Data goes one way: a source tells a Loop about objects, the Tracker merges
// them, the Resolver turns each dirty Service into ServicePorts, and a Proxier
// writes the changed ServicePorts into the kernel in one transaction. Every
// rule of the Service API (traffic policy, topology, fallback, masquerade,
// reject or drop) is decided in the Resolver; a Proxier only reads frontends
// and endpoint sets.
//
// Nothing in this package talks to a kernel or to an API server.
package proxier
