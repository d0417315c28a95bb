// Package configuration compares what signalbox and the real kube-proxy make
// of the same flags and files.
package configuration
