package ipvs

import (
	"net/netip"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// tableName is the mode's own table, so that nothing of the nftables mode's is
// in the way of a change from one to the other.
const tableName = "signalbox-ipvs"

// The sets and maps of the table, by their place in newSets.
const (
	vips = access.FirstOwn + iota
	plainServers
	marks
	internalMarks
	nodePortMarks
	internalNodePortMarks
	masquerade
	nodePortMasquerade
	rejected
	dropped
	rejectedNodePorts
	droppedNodePorts
	healthChecks
	hairpin
	affinity
	affinityMarks
	affinityMembers // the first of maxVariants
)

// setCount is the number of sets.
const setCount = affinityMembers + maxVariants

// affinitySize bounds the kernel memory that clients can take up. A client that finds
// the map full is served as though there were no affinity.
const affinitySize = 1 << 18

// maxVariants is how many different endpoint sets one Service port with
// session affinity may have. The resolver makes at most two.
const maxVariants = 4

// setNames are what rules call the sets; a test holds them against newSets.
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
	toMark := func(name string, key fields, comment string) *nft.Set {
		return nft.NewSet(name, key, datum, comment)
	}
	list := append(access.Sets(), []*nft.Set{
		set("vips", fields{addr}, "the addresses on "+deviceName),
		set("virtual-servers", frontend, "IPVS knows these by their address"),
		toMark("marks", frontend, "IPVS knows these by a mark"),
		toMark("internal-marks", frontend, "the same, where traffic of this node and its Pods goes elsewhere"),
		toMark("nodeport-marks", nodePort, ""),
		toMark("internal-nodeport-marks", nodePort, ""),
		set("masqueraded", fields{addr, proto, port, mark}, "frontend . origin"),
		set("nodeport-masquerade", fields{proto, port, mark}, "node port . origin"),
		set("rejected", frontend, "frontends without endpoints"),
		set("dropped", frontend, "frontends without endpoints that may be used here"),
		set("rejected-nodeports", nodePort, ""),
		set("dropped-nodeports", nodePort, ""),
		set("health-checks", frontend, "answered by a daemon of this node"),
		set("hairpin", fields{addr, addr}, "endpoints that may be their own clients"),
		toMark("affinity", fields{addr, mark}, "client . Service port : endpoint").Remembering(affinitySize),
		toMark("affinity-marks", fields{mark, addr, port}, "Service port . endpoint : mark of the endpoint"),
	}...)
	for v := range maxVariants {
		list = append(list, set("affinity-members-"+string(rune('0'+v)), fields{mark}, ""))
	}
	return list
}

// frontendSets are the sets in which a frontend has elements; NodePorts have
// their own, whose keys lack the address.
type frontendSets struct{ marks, internal, masquerade, rejected, dropped nft.SetID }

var (
	addressedSets = frontendSets{marks, internalMarks, masquerade, rejected, dropped}
	nodePortSets  = frontendSets{nodePortMarks, internalNodePortMarks, nodePortMasquerade, rejectedNodePorts, droppedNodePorts}
)

func setsOf(fe *plan.Frontend) frontendSets {
	if fe.Addr.IsValid() {
		return addressedSets
	}
	return nodePortSets
}

func addrBytes(a netip.Addr) string { return string(a.AsSlice()) }

func in(v nft.Value, set nft.SetID) nft.Statement    { return nft.In(v, setNames[set]) }
func notIn(v nft.Value, set nft.SetID) nft.Statement { return nft.NotIn(v, setNames[set]) }
func markOf(v nft.Value, set nft.SetID) nft.Value {
	return nft.MarkLookedUp(v, setNames[set])
}
