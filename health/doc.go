// Package health answers those who ask whether this node serves: /healthz and
// /livez for the node as a whole, and a server for each Service with a
// healthCheckNodePort. The answers are kube-proxy's (KEP-3836 for /healthz).
package health
