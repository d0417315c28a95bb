// SPDX-License-Identifier: Apache-2.0

// Package e2e tests the signalbox binary on a node of a lab: Services come from
// a real kube-apiserver, and real packets say what became of them. It has no
// code but tests; see internal/cluster for the control plane.
//
//	cd e2e && go test -timeout 30m ./...    # as root
//
// The first run builds kube-apiserver and etcd into e2e/.cache. The environment
// variable SIGNALBOX names a binary to test in place of the one built from this
// tree.
package e2e
