// Package compare runs the short form of `lab compare`: kube-proxy and signalbox side by
// side in two labs, on the same Services.
package compare
