// Package ipvs serves Services with the kernel's IPVS: virtual servers whose
// schedulers choose endpoints, on a dummy device that holds their addresses.
//
// IPVS is told nothing but virtual servers and destinations. What else a
// Service needs, one nf_tables table does, whose rules are always the same
// and whose maps grow with the Services: who may use a frontend, whose source
// address is rewritten, what is refused or dropped, and which virtual server a
// connection is for where address and port do not tell that.
//
// # Virtual servers by address and by mark
//
// A frontend at an address of the device that leads to one set of endpoints is
// a virtual server by address, port and protocol, as in kube-proxy. These are
// virtual servers by packet mark, which a rule gives to the first packet of a
// connection:
//
//   - NodePorts: any address of the node is theirs, also one that it gets
//     later.
//   - Frontends that lead traffic of this node and its Pods elsewhere than
//     other traffic (externalTrafficPolicy Local): IPVS has one set of
//     destinations for each address and port, and does not look at the source.
//   - Frontends of a Service with session affinity. See below.
//   - An external IP that another device of the node holds: by a mark of this
//     mode it can be told from virtual servers of others.
//
// Marks of virtual servers are from 0x40000001 to 0x7fffffff. So what is this
// mode's in IPVS can be told without remembering: what has such a mark, or is
// at an address of the device. Nothing else is ever touched.
//
// # On the way of a packet
//
// IPVS takes packets at the input hook, and of local processes at the output
// hook. Rules before it find the origin and the frontend, refuse or drop, set
// the mark, and note in the packet's priority whether the source is to be
// rewritten: the mark must be the virtual server's, exactly. IPVS then sends
// what it redirected through the output hook from the start, where rules clear
// mark and priority and set the one bit that asks for masquerading. Only the
// first packet of a connection is dealt with; later ones IPVS knows.
//
// # Session affinity
//
// The kernel's own persistence does not do: it remembers a client for each
// virtual server by itself, so that it would have another endpoint at each of
// a Service's addresses; it rewrites no ports for virtual servers by mark; and
// it forgets nobody while one of the client's connections is still in
// TIME_WAIT. So a map in nf_tables remembers client and Service port -> the
// mark of an endpoint, which is that of a virtual server with this one
// destination. Who is not in it is scheduled by IPVS, and what the scheduler
// chose is read off the redirected packet and remembered.
//
// # When endpoints and Services go
//
// IPVS drops the connections of a destination that is removed. So one that
// leaves a Service gets the weight 0, and is removed when its last connection
// has ended, or a day has passed; so are a virtual server whose Service is
// gone, and its address. New connections to it are refused by the rules in the
// meantime. UDP clients do not notice that an endpoint is gone: a UDP
// destination that answers no more is removed at once.
//
// # Layers
//
// compile turns a Service port into a record: elements of the table, virtual
// servers and addresses. state stages the difference between records; diff is
// that of one virtual server. All of this is pure. handle (IPVS), device and
// the table are what speaks to the kernel; what they change goes through a pipe,
// many messages at a time.
//
// IPVS has no transactions. A Sync sends first what adds virtual servers and
// destinations, then writes the table in one transaction, then addresses, then
// what takes destinations away; one that fails in between returns an error that
// wraps proxier.ErrUnknownState, and the next reads everything back.
package ipvs
