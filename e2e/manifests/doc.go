// SPDX-License-Identifier: Apache-2.0

// Package manifests renders what the folder of that name holds, as kubectl and
// helm do it. Its tests apply the result to a real kube-apiserver, whose
// validation and bootstrap roles are the yardstick; no node is needed.
package manifests
