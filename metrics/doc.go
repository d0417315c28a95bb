// Package metrics holds every series that signalbox exposes to Prometheus, and
// the server that does so.
//
// What kube-proxy has too is exposed under kube-proxy's name, with its type,
// labels and buckets, so that dashboards and alerts go on working. The rest
// begins with signalbox_. docs/observability.md explains each.
//
// A scrape reads counters: nothing in it walks what a node holds.
package metrics
