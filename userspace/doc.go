// SPDX-License-Identifier: Apache-2.0

// Package userspace serves Services with a relay: the kernel hands connections
// and UDP datagrams for a Service to this process, which passes them on to an
// endpoint. docs/userspace.md describes behaviour and limits, docs/design.md the
// alternatives.
//
// On the kernel's side are a table (ruleset.go, sets.go), in which
// each frontend is a map element that leads to an address with the frontend's
// number, and two routes with a rule (routes.go). A Proxier
// (proxier.go, state.go) writes them and gives the relay its targets.
//
// The relay (relay.go) has a socket for each protocol and traffic source (sockets.go). It
// finds the target by the number and forwards datagrams (udp.go). For TCP,
// internal/tcprelay chooses an endpoint and forwards bytes.
package userspace
