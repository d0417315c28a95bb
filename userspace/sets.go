package userspace

import (
	"signalbox/nft"
)

// tableName is a table of this mode's own, so that a change of mode can write
// one table first and remove the other afterwards.
const tableName = "signalbox-userspace"

// The sets of the table, in the order of creation and listing.
const (
	frontends nft.SetID = iota
	nodePorts
	noInternalEndpoints
	noExternalEndpoints
	nodePortsNoInternalEndpoints
	nodePortsNoExternalEndpoints
	rejected
	dropped
	rejectedNodePorts
	droppedNodePorts
	restricted
	allowedSources
	restrictedNodePorts
	allowedNodePortSources
	clusterIPs
	localPods
	nodePortAddrs
	serviceCIDRs
	setCount
)

// frontendSets are the sets in which a frontend has elements; NodePorts have
// their own, whose keys lack the address.
type frontendSets struct {
	redirected, noInternalEndpoints, noExternalEndpoints, rejected, dropped, restricted, allowed nft.SetID
}

var (
	addressedSets = frontendSets{frontends, noInternalEndpoints, noExternalEndpoints, rejected, dropped, restricted, allowedSources}
	nodePortSets  = frontendSets{nodePorts, nodePortsNoInternalEndpoints, nodePortsNoExternalEndpoints, rejectedNodePorts, droppedNodePorts, restrictedNodePorts, allowedNodePortSources}
)

// setNames holds every set's name by its number.
var setNames = [setCount]string{
	"frontends", "nodeports", "closed-inside", "closed-outside", "closed-nodeports-inside", "closed-nodeports-outside",
	"rejected", "dropped", "rejected-nodeports", "dropped-nodeports",
	"restricted", "allowed-sources", "restricted-nodeports", "allowed-nodeport-sources",
	"cluster-ips", "local-pods", "nodeport-addrs", "service-cidrs",
}

func makeSets() []*nft.Set {
	addr := []nft.Field{nft.AddrField}
	byFrontend := []nft.Field{nft.AddrField, nft.ProtoField, nft.PortField}
	byNodePort := byFrontend[1:]
	sets := make([]*nft.Set, setCount)
	declare := func(n nft.SetID, key, data []nft.Field, comment string) {
		sets[n] = nft.NewSet(setNames[n], key, data, comment)
	}
	declare(frontends, byFrontend, addr, "number of each frontend, as an address of the relay's")
	declare(nodePorts, byNodePort, addr, "the same by node port")
	declare(noInternalEndpoints, byFrontend, nil, "frontends without endpoints for this node and its Pods")
	declare(noExternalEndpoints, byFrontend, nil, "frontends without endpoints for others")
	declare(nodePortsNoInternalEndpoints, byNodePort, nil, "")
	declare(nodePortsNoExternalEndpoints, byNodePort, nil, "")
	declare(rejected, byFrontend, nil, "frontends without endpoints")
	declare(dropped, byFrontend, nil, "frontends without endpoints that may be used here")
	declare(rejectedNodePorts, byNodePort, nil, "")
	declare(droppedNodePorts, byNodePort, nil, "")
	declare(restricted, byFrontend, nil, "frontends that only allowed sources may use")
	declare(allowedSources, append(byFrontend[:3:3], nft.AddrField), nil, "")
	declare(restrictedNodePorts, byNodePort, nil, "")
	declare(allowedNodePortSources, append(byNodePort[:2:2], nft.AddrField), nil, "")
	declare(clusterIPs, addr, nil, "")
	declare(localPods, addr, nil, "")
	declare(nodePortAddrs, addr, nil, "")
	declare(serviceCIDRs, addr, nil, "")
	for _, n := range []nft.SetID{allowedSources, allowedNodePortSources, localPods, serviceCIDRs} {
		sets[n].OfRanges()
	}
	return sets
}
