// Package userspace serves Services with a relay: the kernel hands connections
// and UDP datagrams for a Service to this process, which passes them on to an
// endpoint. docs/userspace.md says what that does for whom, which other ways
// there were, and what its limits are.
//
// On the kernel's side are a table (ruleset.go, sets.go, compile.go), in which
// each frontend is a map element that leads to an address with the frontend's
// number (ids.go), and two routes with a rule (routes.go). A Proxier
// (proxier.go, state.go) writes them and tells the relay its targets.
//
// The relay (relay.go) has a socket for each protocol and origin (sockets.go). It
// finds the target by the number, chooses an endpoint (choice.go), and moves
// bytes (tcp.go) or datagrams (udp.go).
package userspace
