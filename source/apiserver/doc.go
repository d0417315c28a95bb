// Package apiserver is the source that asks a Kubernetes API server: one watch
// each for Services, EndpointSlices, this node's Node object and ServiceCIDRs,
// with kube-proxy's selectors and no more rights than kube-proxy has.
//
// No object is kept here. What a watch says goes on to the sink, trimmed to what
// a proxy looks at; only names and hashes stay, to know what is gone after a
// relist and to tell the sink about real changes alone.
package apiserver
