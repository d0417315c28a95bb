// SPDX-License-Identifier: Apache-2.0

// Package lab runs the short forms of `lab compare` and `lab bench`: kube-proxy and
// signalbox side by side, in labs of their own, on the same Services.
package lab
