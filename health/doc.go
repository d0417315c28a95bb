// SPDX-License-Identifier: Apache-2.0

// Package health serves health checks: /healthz and /livez of the node, and the
// healthCheckNodePort of each Service that has one. The answers are kube-proxy's
// (KEP-3836 for /healthz).
package health
