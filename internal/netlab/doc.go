// SPDX-License-Identifier: Apache-2.0

// Package netlab builds small networks out of network namespaces: a node under
// test, a second node, Pods behind both, clients outside, and the routes
// between them that a real cluster has. Real packets go through the real kernel
// from one host to another, and whoever answers says who it is and which source
// address it saw.
//
//	client1 ──┐            ┌── node1 ──┬ pod-a, pod-b, pod-x
//	          ├── router ──┤           │   host-gw routes or VXLAN
//	client2 ──┘            └── node2 ──┴ pod-c, pod-d
//
// Everything is IPv4 and IPv6 at once. The namespaces have no names: they exist
// as long as the process holds them, so that a lab leaves nothing behind however
// the process ends. Nothing is executed, so a lab also works where there is
// nothing but a kernel.
//
// A lab needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN).
package netlab
