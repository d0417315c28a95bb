// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"signalbox/ipvs/internal/kernel"
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// tableName is not the nftables mode's, so that a node can change from one mode to the other
// without a conflict.
const tableName = "signalbox-ipvs"

// The sets and maps of the table, by their place in newSets.
const (
	vips = access.FirstOwn + iota
	serversByAddress
	marks
	internalMarks
	nodePortMarks
	internalNodePortMarks
	masquerade
	nodePortMasquerade
	healthChecks
	hairpin
	affinity
	affinityMarks
	affinityMembers // the first of maxEndpointSets
)

// setCount is the number of sets.
const setCount = affinityMembers + maxEndpointSets

// affinitySize limits the kernel memory for clients. If the map is full, a new client is served
// without affinity.
const affinitySize = 1 << 18

// setNames are the names of newSets.
var setNames = func() []string {
	names := make([]string, setCount)
	for i, s := range newSets() {
		names[i] = s.Name
	}
	return names
}()

func newSets() []*nft.Set {
	addr, proto, port := nft.AddrField, nft.ProtoField, nft.PortField
	mark, datum := nft.MarkField, []nft.Field{nft.MarkDatum}
	type fields = []nft.Field
	frontend, nodePort := access.FrontendKey, access.NodePortKey
	set := func(name string, key fields, comment string) *nft.Set {
		return nft.NewSet(name, key, nil, comment)
	}
	shared := func(name string, key fields, comment string) *nft.Set {
		return &nft.Set{Name: name, Key: key, Comment: comment, Shared: true}
	}
	toMark := func(name string, key fields, comment string) *nft.Set {
		return nft.NewSet(name, key, datum, comment)
	}
	list := append(access.Sets(), []*nft.Set{
		shared("vips", fields{addr}, "the addresses on "+kernel.DeviceName),
		set("virtual-servers", frontend, "IPVS knows these by their address"),
		toMark("marks", frontend, "IPVS knows these by a mark"),
		toMark("internal-marks", frontend, "the same, where traffic of this node and its Pods goes elsewhere"),
		toMark("nodeport-marks", nodePort, ""),
		toMark("internal-nodeport-marks", nodePort, ""),
		set("masqueraded", fields{addr, proto, port, mark}, "frontend . traffic source"),
		set("nodeport-masquerade", fields{proto, port, mark}, "node port . traffic source"),
		shared("health-checks", frontend, "answered by a daemon of this node"),
		shared("hairpin", fields{addr, addr}, "endpoints that may be their own clients"),
		toMark("affinity", fields{addr, mark}, "client . Service port : endpoint").Remembering(affinitySize),
		toMark("affinity-marks", fields{mark, addr, port}, "Service port . endpoint : mark of the endpoint"),
	}...)
	for v := range maxEndpointSets {
		list = append(list, set("affinity-members-"+string(rune('0'+v)), fields{mark}, ""))
	}
	return list
}

// frontendSets are the sets with elements of a frontend. NodePorts have sets of their own, whose
// keys lack the address.
type frontendSets struct{ marks, internal, masquerade nft.SetID }

var (
	addressedSets = frontendSets{marks, internalMarks, masquerade}
	nodePortSets  = frontendSets{nodePortMarks, internalNodePortMarks, nodePortMasquerade}
)

func setsOf(fe *plan.Frontend) frontendSets {
	if fe.Addr.IsValid() {
		return addressedSets
	}
	return nodePortSets
}

func in(v nft.Value, set nft.SetID) nft.Statement    { return nft.In(v, setNames[set]) }
func notIn(v nft.Value, set nft.SetID) nft.Statement { return nft.NotIn(v, setNames[set]) }
func lookUpMark(v nft.Value, set nft.SetID) nft.Value {
	return nft.MarkLookedUp(v, setNames[set])
}
