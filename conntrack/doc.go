// Package conntrack removes UDP flows from the kernel's connection tracking
// table that point at what is gone.
//
// The kernel decides where a flow goes at its first packet and keeps to that
// for as long as packets follow. TCP notices when the other end is gone; a UDP
// client that goes on using its source port sends into the void. So after every
// change that reached the kernel, the flows of the Services it was about are
// compared with who still answers for them.
//
// The rule: a UDP flow whose original destination is a frontend of a Service is
// removed unless the source of its replies is one of the Service's serving
// endpoints. That covers a Service without any endpoint, a Service that is gone
// and a Service that is new (its clients may have flows that were made before
// it existed and are not translated at all). At a NodePort, whose port number
// may also be in use by somebody else, only flows to an address of this node
// count, and of those that are not translated only the ones that nobody ever
// answered: a daemon of the host keeps its clients.
package conntrack
