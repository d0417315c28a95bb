// SPDX-License-Identifier: Apache-2.0

// Package ipvs serves Services with virtual servers of the kernel's IPVS, whose schedulers
// choose endpoints. A dummy device has the virtual addresses.
//
// IPVS knows only virtual servers and destinations. One table of nf_tables does the rest: who
// may connect, whose source address is rewritten, what is rejected or dropped, and which
// virtual server a connection needs if address and port do not tell. Its rules are always the
// same, and its sets grow with the Services. docs/ipvs.md follows a packet through it.
//
// # Virtual servers by address and by mark
//
// A frontend at an address of the device, with one endpoint set, is a virtual server by
// address, port and protocol, as in kube-proxy. The following are virtual servers by packet
// mark. A rule sets the mark of a connection's first packet.
//
//   - NodePorts: every address of the node serves them, also a later one.
//   - Frontends with different endpoint sets for internal and external traffic: IPVS has one
//     set of destinations for each address and port, and ignores the source.
//   - Frontends of a Service with session affinity. See below.
//   - An external IP that another device of the node has: the mark distinguishes its server
//     from those of other software.
//
// The mode owns virtual servers with a mark from 0x40000001 to 0x7fffffff, and those at an
// address of the device. It changes no others.
//
// # Session affinity
//
// A map in nf_tables remembers client and Service port -> mark of an endpoint. The mark is
// that of a virtual server with this one destination. IPVS schedules a client that is not in
// the map, and a rule behind IPVS reads the endpoint from the redirected packet.
// docs/design.md says why the kernel's own persistence does not fit.
//
// # When endpoints and Services go
//
// IPVS ends the connections of a removed destination. So a destination that leaves a Service
// gets the weight 0. It is removed after its last connection or after a day, and so are the
// virtual server of a deleted Service, and its address. Meanwhile the rules refuse new
// connections. UDP clients do not notice that an endpoint is gone. So a UDP destination that
// no longer answers is removed immediately.
//
// # One change
//
// The files in the order of a change: proxier.go receives the plan. compile.go (with marks.go)
// makes a record of each changed Service port: elements and virtual servers. compare.go finds
// the difference from the last records and the kernel's virtual servers; rules.go and sets.go
// have the fixed part of the table. All of this is pure. write.go writes the difference
// through package kernel and nf_tables, and state.go commits it. drain.go later removes what
// has drained.
//
// IPVS has no transactions. A sync first adds virtual servers and destinations, then writes the
// table in one transaction, then adds addresses, then removes destinations. If it fails
// half-way, the error wraps proxier.ErrUnknownState, and the next sync reads the kernel.
package ipvs
