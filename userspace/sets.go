package userspace

import (
	"signalbox/nft"
	"signalbox/nft/access"
)

// tableName is a table of this mode's own, so that a change of mode can write
// one table first and remove the other afterwards.
const tableName = "signalbox-userspace"

// The sets of the table, in the order of creation and listing.
const (
	frontends = access.FirstOwn + iota
	nodePorts
	noInternalEndpoints
	noExternalEndpoints
	nodePortsNoInternalEndpoints
	nodePortsNoExternalEndpoints
	rejected
	dropped
	rejectedNodePorts
	droppedNodePorts
	clusterIPs
	setCount
)

// frontendSets are the sets in which a frontend has elements; NodePorts have
// their own, whose keys lack the address.
type frontendSets struct {
	redirected, noInternalEndpoints, noExternalEndpoints, rejected, dropped nft.SetID
}

var (
	addressedSets = frontendSets{frontends, noInternalEndpoints, noExternalEndpoints, rejected, dropped}
	nodePortSets  = frontendSets{nodePorts, nodePortsNoInternalEndpoints, nodePortsNoExternalEndpoints, rejectedNodePorts, droppedNodePorts}
)

// setNames holds every set's name by its number.
var setNames = func() (names [setCount]string) {
	for i, s := range makeSets() {
		names[i] = s.Name
	}
	return names
}()

func makeSets() []*nft.Set {
	addr, byFrontend, byNodePort := []nft.Field{nft.AddrField}, access.FrontendKey, access.NodePortKey
	return append(access.Sets(),
		nft.NewSet("frontends", byFrontend, addr, "number of each frontend, as an address of the relay's"),
		nft.NewSet("nodeports", byNodePort, addr, "the same by node port"),
		nft.NewSet("closed-inside", byFrontend, nil, "frontends without endpoints for this node and its Pods"),
		nft.NewSet("closed-outside", byFrontend, nil, "frontends without endpoints for others"),
		nft.NewSet("closed-nodeports-inside", byNodePort, nil, ""),
		nft.NewSet("closed-nodeports-outside", byNodePort, nil, ""),
		nft.NewSet("rejected", byFrontend, nil, "frontends without endpoints"),
		nft.NewSet("dropped", byFrontend, nil, "frontends without endpoints that may be used here"),
		nft.NewSet("rejected-nodeports", byNodePort, nil, ""),
		nft.NewSet("dropped-nodeports", byNodePort, nil, ""),
		nft.NewSet("cluster-ips", addr, nil, ""),
	)
}
