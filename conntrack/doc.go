// SPDX-License-Identifier: Apache-2.0

// Package conntrack removes stale flows from the kernel's connection tracking
// table. It also lists the table's connections (List), and follows them (Follow).
//
// The kernel decides at a flow's first packet where the flow goes, and keeps to
// that as long as packets follow. TCP notices that the other end is gone. A UDP
// client that keeps its source port goes on sending to an endpoint that is gone.
// So after every change that reached the kernel, the Cleaner compares the flows of
// the changed Services with their usable endpoints.
//
// The rule: a UDP flow to a frontend of a Service is removed unless a usable
// endpoint of the Service answers it. That includes Services without endpoints,
// deleted Services, and new Services: clients may have flows from before the
// Service existed, which are not translated.
//
// TCP flows to endpoints that no EndpointSlice has any more are removed too, if
// plan.ServicePort.Listed asks for that. The rules answer the client's next packet with
// a reset, because it belongs to no connection that the kernel knows.
//
// A daemon of the host may use the number of a NodePort on other addresses, and
// may have clients from before the Service existed. So at a NodePort only flows to
// an address of this node count, and an untranslated flow only if nobody has
// answered it.
package conntrack
