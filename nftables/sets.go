package nftables

// setID names one of the table's sets and maps; all are fixed.
type setID uint8

const (
	frontends setID = iota
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
	idOnly   = []fieldType{idField}
	idData   = []fieldType{idDatum}
	addrPort = []fieldType{addrField, portField}
)

// schemas holds every set by its id, in the order of creation and listing.
var schemas = makeSchemas()

func makeSchemas() []*schema {
	list := []*schema{
		{id: frontends, name: "frontends", key: frontendKey, data: idData,
			comment: "endpoint set of each frontend; none: it has no endpoints"},
		{id: internalFrontends, name: "internal-frontends", key: frontendKey, data: idData,
			comment: "the same, where traffic of this node and its Pods goes elsewhere"},
		{id: nodePorts, name: "nodeports", key: nodePortKey, data: idData},
		{id: internalNodePorts, name: "internal-nodeports", key: nodePortKey, data: idData},
		{id: masquerade, name: "masquerade-origins", key: frontendKey, data: idData,
			comment: "all frontends, and whose source is rewritten: 1 Pods here, 2 this node, 4 others"},
		{id: nodePortMasquerade, name: "nodeport-masquerade-origins", key: nodePortKey, data: idData},
		{id: markChains, name: "mark-chains", key: idOnly, verdicts: true},
		{id: refused, name: "refused", key: frontendKey,
			comment: "frontends without endpoints"},
		{id: dropped, name: "dropped", key: frontendKey,
			comment: "those of them that have endpoints elsewhere"},
		{id: refusedNodePorts, name: "refused-nodeports", key: nodePortKey},
		{id: droppedNodePorts, name: "dropped-nodeports", key: nodePortKey},
		{id: restricted, name: "restricted", key: frontendKey,
			comment: "frontends that only allowed sources may use"},
		{id: allowedSources, name: "allowed-sources", key: append(frontendKey[:3:3], addrField), interval: true},
		{id: restrictedNodePorts, name: "restricted-nodeports", key: nodePortKey},
		{id: allowedNodePortSources, name: "allowed-nodeport-sources", key: append(nodePortKey[:2:2], addrField), interval: true},
		{id: clusterIPs, name: "cluster-ips", key: []fieldType{addrField}, shared: true},
		{id: hairpin, name: "hairpin", key: []fieldType{addrField, addrField}, shared: true,
			comment: "endpoints that may be their own clients"},
		{id: pickChains, name: "pick-chains", key: idOnly, verdicts: true},
		{id: endpoints, name: "endpoints", key: []fieldType{idField, slotField}, data: addrPort},
		{id: affinity, name: "affinity", key: []fieldType{addrField, idField}, data: idData, dynamic: true, size: affinitySize,
			comment: "client . Service port : endpoint"},
		{id: affinitySlots, name: "affinity-slots", key: []fieldType{idField, slotField}, data: idData},
	}
	for v := range maxVariants {
		list = append(list, &schema{
			id: affinityEndpoints + setID(v), name: "affinity-endpoints-" + string(rune('0'+v)), key: idOnly, data: addrPort,
		})
	}
	list = append(list,
		&schema{id: localPods, name: "local-pods", key: []fieldType{addrField}, interval: true},
		&schema{id: ownPods, name: "own-pods", key: []fieldType{addrField}, interval: true, comment: "of these, the ones on this node"},
		&schema{id: nodePortAddrs, name: "nodeport-addrs", key: []fieldType{addrField}},
		&schema{id: serviceCIDRs, name: "service-cidrs", key: []fieldType{addrField}, interval: true},
	)
	for i, s := range list {
		if s.id != setID(i) {
			panic("nftables: set " + s.name + " is out of order")
		}
	}
	return list
}
