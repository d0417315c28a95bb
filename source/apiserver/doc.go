// Package apiserver is the source that asks a Kubernetes API server: one watch
// each for Services, EndpointSlices, this node's Node object and ServiceCIDRs,
// with kube-proxy's selectors and no more rights than kube-proxy has.
//
// No object is kept here. What a watch says goes on to the sink; only names and
// resource versions stay, to know after a relist what is gone.
package apiserver
