// Package userspace serves Services with a relay: the kernel hands connections
// and UDP datagrams for a Service to this process, which passes them on to an
// endpoint. It costs more than translating addresses in the kernel, and can do
// what rules cannot: an endpoint that does not answer is replaced by another
// before the client notices.
//
// # Capture
//
// One nf_tables table rewrites the destination of what is for a frontend to an
// address that stands for that frontend (251.0.0.0/8, or
// fd73:6967:6e61:6c62::/104), and to one of three ports: one each for this
// node's Pods, its own processes and everybody else. So each connection and each
// datagram arrives with the number of its frontend and with its origin, whatever
// it took to find that out, and three TCP and three UDP sockets serve any number
// of Services. The number of rules is constant; Services are elements of maps.
// A route makes the addresses local ones; no packet with one leaves the node,
// and what is sent to the relay's ports otherwise is refused.
//
// TPROXY, the other way to one socket for all, does not work for Pods on a
// bridge where br_netfilter is on, as the kernel lets go of the socket that was
// assigned in the bridge's hook. A redirect by interface needs an address of the
// family on every Pod's interface, and UDP would not know the destination.
//
// What must be refused or dropped, by source ranges or for want of endpoints,
// is so by rules; the relay never sees it. SCTP is not relayed: its ports
// refuse, and the log names the Service.
//
// # Source addresses
//
// Where the plan does not ask for the node's address, an endpoint sees the
// client's: the relay binds it (IP_TRANSPARENT), and a rule takes the answers
// in, which bear the masquerade mark on their way. That works only where the
// answers pass through this node's IP layer. So the node's address is used
// instead when client and endpoint are reached by the same link (two Pods on a
// bridge), and when the endpoint is on the host network of this node. A client
// that opens a connection directly to the endpoint of a relayed one, from a port
// that the relay uses at that time with the client's address, does not get its
// answers; its system tries again from another port or gives up.
//
// # TCP
//
// Bytes are moved by the kernel (splice) and not copied through this process.
// The end of one direction is passed on, the other stays open; a reset is passed
// on as a reset. What one side does not read is not read from the other. Peers
// that vanished are noticed by keepalive, after four minutes of silence. A
// connection that no endpoint can be found for is reset: the client's connect
// succeeds first.
//
// An endpoint that leaves the Service gets no new connections and keeps those
// it has, also when the Service itself goes.
//
// # UDP
//
// A flow is one client address and port at one frontend. It has a connected
// socket to its endpoint until neither side has sent anything for 120 s, or for
// 10 s after a lone question. A flow whose endpoint no longer serves, or refuses
// the datagram, moves to another one with the next datagram.
//
// # Limits
//
// RLIMIT_NOFILE is raised as far as possible (to 1,048,576); connections get
// three quarters and flows one quarter of it. What exceeds that is reset or
// dropped, counted and logged. Where accepting fails for want of files,
// connections wait.
//
// With the node's address, connections to one endpoint share the ports that
// net.ipv4.ip_local_port_range allows, and where the client ends first each is
// held for a minute after: about 470 new connections a second to one endpoint by
// default. net.ipv4.tcp_tw_reuse=1 lifts that. A shortage is logged and is not
// held against the endpoint.
//
// # Restarts
//
// Relayed connections end with the process, and clients are refused until
// another one relays. That can start before the old one ends: both listen on the
// same ports, and the new one's rules replace the old one's at its first sync.
// Frontends keep their numbers, so that UDP clients go on; their flows get new
// sockets. Session affinity is kept in memory and begins anew.
package userspace
