// SPDX-License-Identifier: Apache-2.0

// Package metrics holds every series that signalbox exposes to Prometheus, and
// their server.
//
// Series that kube-proxy has keep its names, types, labels and buckets, so that
// dashboards and alerts work unchanged. The others begin with signalbox_.
// docs/observability.md explains each.
//
// A scrape reads counters. Its cost does not depend on the number of Services.
package metrics
