// SPDX-License-Identifier: Apache-2.0

// Package configuration starts signalbox and the real kube-proxy with the same
// flags and files, and compares what they do.
package configuration
