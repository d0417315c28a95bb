package nftables

import (
	"signalbox/nft"
	"signalbox/nft/access"
)

const (
	frontends nft.SetID = iota
	internalFrontends
	nodePorts
	internalNodePorts
	masquerade
	nodePortMasquerade
	markChains
	refused
	dropped
	refusedNodePorts
	droppedNodePorts
	restricted
	allowedSources
	restrictedNodePorts
	allowedNodePortSources
	clusterIPs
	hairpin
	pickChains
	endpoints
	affinity
	affinitySlots
	// affinityEndpoints is the first of maxVariants maps.
	affinityEndpoints
)

// maxVariants is how many different endpoint sets one Service port with
// session affinity may have: one map each says which of the Service port's
// endpoints are in the set. The resolver makes at most two, one by each traffic
// policy.
const maxVariants = 4

const (
	localPods = affinityEndpoints + maxVariants + iota
	ownPods
	nodePortAddrs
	serviceCIDRs
	setCount
)

// affinitySize bounds the kernel memory that clients can take up. A client
// that finds the map full is served as though there were no affinity.
const affinitySize = 1 << 18

var (
	idOnly   = []nft.Field{nft.ClassIDField}
	idData   = []nft.Field{nft.MarkDatum}
	addrPort = []nft.Field{nft.AddrField, nft.PortField}
)

// schemas holds every set by its id, in the order of creation and listing.
var schemas = makeSchemas()

func makeSchemas() []*nft.Set {
	list := []*nft.Set{
		{ID: frontends, Name: "frontends", Key: access.FrontendKey, Data: idData,
			Comment: "endpoint set of each frontend; none: it has no endpoints"},
		{ID: internalFrontends, Name: "internal-frontends", Key: access.FrontendKey, Data: idData,
			Comment: "the same, where traffic of this node and its Pods goes elsewhere"},
		{ID: nodePorts, Name: "nodeports", Key: access.NodePortKey, Data: idData},
		{ID: internalNodePorts, Name: "internal-nodeports", Key: access.NodePortKey, Data: idData},
		{ID: masquerade, Name: "masquerade-origins", Key: access.FrontendKey, Data: idData,
			Comment: "all frontends, and whose source is rewritten: 1 Pods here, 2 this node, 4 others"},
		{ID: nodePortMasquerade, Name: "nodeport-masquerade-origins", Key: access.NodePortKey, Data: idData},
		{ID: markChains, Name: "mark-chains", Key: idOnly, Verdicts: true},
		{ID: refused, Name: "refused", Key: access.FrontendKey,
			Comment: "frontends without endpoints"},
		{ID: dropped, Name: "dropped", Key: access.FrontendKey,
			Comment: "those of them that have endpoints elsewhere"},
		{ID: refusedNodePorts, Name: "refused-nodeports", Key: access.NodePortKey},
		{ID: droppedNodePorts, Name: "dropped-nodeports", Key: access.NodePortKey},
		{ID: restricted, Name: "restricted", Key: access.FrontendKey,
			Comment: "frontends that only allowed sources may use"},
		{ID: allowedSources, Name: "allowed-sources", Key: append(access.FrontendKey[:3:3], nft.AddrField), Interval: true},
		{ID: restrictedNodePorts, Name: "restricted-nodeports", Key: access.NodePortKey},
		{ID: allowedNodePortSources, Name: "allowed-nodeport-sources", Key: append(access.NodePortKey[:2:2], nft.AddrField), Interval: true},
		{ID: clusterIPs, Name: "cluster-ips", Key: []nft.Field{nft.AddrField}, Shared: true},
		{ID: hairpin, Name: "hairpin", Key: []nft.Field{nft.AddrField, nft.AddrField}, Shared: true,
			Comment: "endpoints that may be their own clients"},
		{ID: pickChains, Name: "pick-chains", Key: idOnly, Verdicts: true},
		{ID: endpoints, Name: "endpoints", Key: []nft.Field{nft.ClassIDField, nft.MarkField}, Data: addrPort},
		{ID: affinity, Name: "affinity", Key: []nft.Field{nft.AddrField, nft.ClassIDField}, Data: idData, Dynamic: true, Size: affinitySize,
			Comment: "client . Service port : endpoint"},
		{ID: affinitySlots, Name: "affinity-slots", Key: []nft.Field{nft.ClassIDField, nft.MarkField}, Data: idData},
	}
	for v := range maxVariants {
		list = append(list, &nft.Set{
			ID: affinityEndpoints + nft.SetID(v), Name: "affinity-endpoints-" + string(rune('0'+v)), Key: idOnly, Data: addrPort,
		})
	}
	list = append(list,
		&nft.Set{ID: localPods, Name: "local-pods", Key: []nft.Field{nft.AddrField}, Interval: true},
		&nft.Set{ID: ownPods, Name: "own-pods", Key: []nft.Field{nft.AddrField}, Interval: true, Comment: "of these, the ones on this node"},
		&nft.Set{ID: nodePortAddrs, Name: "nodeport-addrs", Key: []nft.Field{nft.AddrField}},
		&nft.Set{ID: serviceCIDRs, Name: "service-cidrs", Key: []nft.Field{nft.AddrField}, Interval: true},
	)
	for i, s := range list {
		if s.ID != nft.SetID(i) {
			panic("nftables: set " + s.Name + " is out of order")
		}
	}
	return list
}
