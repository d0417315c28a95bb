package proxier

// FlowCleaner removes connection-tracking flows that point at what is gone.
// The kernel decides where a connection goes once, at its first packet: a UDP
// client that keeps its source port would otherwise send to a removed endpoint
// for as long as it sends at all.
type FlowCleaner interface {
	// Clean queues the work and returns at once. For each owner, every UDP
	// flow to one of its Frontends is removed unless it is answered by an
	// endpoint in Serving.
	Clean(family Family, owners []FlowOwner)
}

// FlowOwner says who may answer UDP flows to some frontends.
type FlowOwner struct {
	// Frontends are of protocol UDP. They include those that the Service had
	// before, as long as no other Service has taken them over.
	Frontends []FrontendKey
	// Serving is empty where the Service is gone or has nobody left.
	Serving *EndpointSet
}
