// SPDX-License-Identifier: Apache-2.0

// Package kind runs signalbox as it is deployed: the DaemonSet of the folder
// manifests in a cluster with real nodes, asked from real Pods. Its tests have
// the build tag kind, because they need such a cluster and minutes of time;
// `make e2e-kind` makes one with kind, or takes the one that KUBECONFIG names.
//
// The environment says what the tests use:
//
//	KUBECONFIG              the cluster; it must have no other service proxy
//	SIGNALBOX_IMAGE         default signalbox:devel
//	SIGNALBOX_IPTABLES_IMAGE
//	                        default signalbox-iptables:devel
//	AGNHOST_IMAGE           the Pods' image; default registry.k8s.io/e2e-test-images/agnhost:2.53
//	MODES                   default "nftables userspace iptables"
//	LOAD_BALANCER           not empty: the cluster gives out load balancer addresses
//	                        and this process reaches them
//
// The images must be on the nodes. This process must reach the nodes' addresses,
// as it does where kind runs on the same Linux machine.
package kind
