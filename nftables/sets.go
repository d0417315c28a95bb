// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"signalbox/nft"
	"signalbox/nft/access"
)

const (
	frontends = access.FirstOwn + iota
	internalFrontends
	nodePorts
	internalNodePorts
	masquerade
	nodePortMasquerade
	markChains
	clusterIPs
	hairpin
	pickChains
	endpoints
	affinity
	affinitySlots
	// affinityEndpoints is the first of maxAffinitySets maps.
	affinityEndpoints
)

// maxAffinitySets is how many different endpoint sets a Service port with session
// affinity can have: each has a map of its endpoints. The resolver makes at most two,
// one for each traffic policy.
const maxAffinitySets = 4

// setCount is the number of sets.
const setCount = affinityEndpoints + maxAffinitySets

// affinitySize bounds the kernel memory that clients can use. While the map is full, new
// clients are served without affinity.
const affinitySize = 1 << 18

var (
	idOnly   = []nft.Field{nft.ClassIDField}
	idData   = []nft.Field{nft.MarkDatum}
	addrPort = []nft.Field{nft.AddrField, nft.PortField}
)

// allSets declares the sets of the table, by their place.
var allSets = makeSets()

func makeSets() []*nft.Set {
	list := append(access.Sets(), []*nft.Set{
		{Name: "frontends", Key: access.FrontendKey, Data: idData,
			Comment: "endpoint set of each frontend; none: it has no endpoints"},
		{Name: "internal-frontends", Key: access.FrontendKey, Data: idData,
			Comment: "the same, where traffic of this node and its Pods goes elsewhere"},
		{Name: "nodeports", Key: access.NodePortKey, Data: idData},
		{Name: "internal-nodeports", Key: access.NodePortKey, Data: idData},
		{Name: "masquerade-sources", Key: access.FrontendKey, Data: idData,
			Comment: "all frontends, and whose source is rewritten: 1 Pods here, 2 this node, 4 others"},
		{Name: "nodeport-masquerade-sources", Key: access.NodePortKey, Data: idData},
		{Name: "mark-chains", Key: idOnly, Verdicts: true},
		{Name: "cluster-ips", Key: []nft.Field{nft.AddrField}, Shared: true},
		{Name: "hairpin", Key: []nft.Field{nft.AddrField, nft.AddrField}, Shared: true,
			Comment: "endpoints that may be their own clients"},
		{Name: "pick-chains", Key: idOnly, Verdicts: true},
		{Name: "endpoints", Key: []nft.Field{nft.ClassIDField, nft.MarkField}, Data: addrPort},
		{Name: "affinity", Key: []nft.Field{nft.AddrField, nft.ClassIDField}, Data: idData, Dynamic: true, Size: affinitySize,
			Comment: "client . Service port : endpoint"},
		{Name: "affinity-slots", Key: []nft.Field{nft.ClassIDField, nft.MarkField}, Data: idData},
	}...)
	for v := range maxAffinitySets {
		list = append(list, &nft.Set{
			Name: "affinity-endpoints-" + string(rune('0'+v)), Key: idOnly, Data: addrPort,
		})
	}
	if len(list) != int(setCount) {
		panic("nftables: the list of sets does not follow their numbers")
	}
	return list
}
