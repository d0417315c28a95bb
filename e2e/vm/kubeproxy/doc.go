// SPDX-License-Identifier: Apache-2.0

// Package kubeproxy holds tests with the real kube-proxy in ipvs mode: a node
// is handed from it to signalbox and back. They run in a virtual machine of
// package vm, as most machines' kernels have no IPVS; the build tag guest keeps
// them from running elsewhere.
package kubeproxy
