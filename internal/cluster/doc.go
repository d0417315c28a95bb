// SPDX-License-Identifier: Apache-2.0

// Package cluster runs a real control plane for tests and for cmd/lab: etcd and a
// kube-apiserver on the loopback interface of the host, with certificates of
// their own, and a Relay through which the hosts of a lab reach it.
//
// There are no controllers and no kubelets. A test plays their parts: it
// creates Nodes, and the EndpointSlices of its Services.
//
// What a test may do to the control plane is what happens to real ones: stop
// and start the API server on the same data (StopAPIServer, StartAPIServer),
// let history expire (Compact), and cut the way to it (Relay.Cut).
package cluster
