package ipvs

import (
	"fmt"
	"net/netip"

	"signalbox/ipvs/internal/kernel"

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
		set("vips", fields{addr}, "the addresses on "+kernel.DeviceName),
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

// A virtual server that cannot be told by one address and port is told by the
// packet mark. Marks of virtual servers lie from 0x40000001 to 0x7fffffff:
//
//	0x4, 0x5   an endpoint set
//	0x6, 0x7   a Service port with affinity: 18 bits of number, below them
//	           either 0, 8 bits for the time-out and 2 for the endpoint set,
//	           or 1 and 10 bits for an endpoint
//
// IPVS compares the whole mark, so for the first packet of a connection to such
// a server whatever other software keeps in the mark is lost.
const (
	markSpace uint32 = 0x4000_0000
	markMask  uint32 = 0xc000_0000

	// noEndpoints stands for an endpoint set that is empty, where another one
	// of the same frontend is not.
	noEndpoints uint32 = markSpace

	setFirst, setLast        = markSpace + 1, uint32(0x5fff_ffff)
	stickySpace              = uint32(0x6000_0000)
	stickyMask               = uint32(0xe000_0000)
	stickyLast               = uint32(0x7fff_f800)
	blockBits                = 11
	blockMask         uint32 = ^uint32(1<<blockBits - 1)
	endpointFlag      uint32 = 1 << 10
	variantBits              = 2
	maxTimeouts              = 1 << 8
	maxKnownEndpoint         = 1 << 10
)

func isOurs(mark uint32) bool { return mark&markMask == markSpace }

func isSticky(mark uint32) bool { return mark&stickyMask == stickySpace }

// baseOf is the mark, or for one of a Service port with affinity the first of
// that Service port's marks: what is taken and given back as a whole.
func baseOf(mark uint32) uint32 {
	if isSticky(mark) {
		return mark & blockMask
	}
	return mark
}

// markPool gives out marks. What needs one are Service ports, and virtual servers that
// are in the kernel, still or already.
type markPool struct{ sets, blocks *access.Pool }

func newMarkPool() *markPool {
	return &markPool{access.NewPool(setFirst, setLast, 1), access.NewPool(stickySpace, stickyLast, 1<<blockBits)}
}

// takeSet returns a mark for an endpoint set, which is in use from now on.
func (p *markPool) takeSet() (uint32, error) { return numbered(p.sets.Take()) }

// takeBlock returns the first mark of a Service port with affinity.
func (p *markPool) takeBlock() (uint32, error) { return numbered(p.blocks.Take()) }

func numbered(mark uint32, err error) (uint32, error) {
	if err != nil {
		return 0, fmt.Errorf("packet marks for virtual servers: %w", err)
	}
	return mark, nil
}

func (p *markPool) of(mark uint32) *access.Pool {
	if isSticky(mark) {
		return p.blocks
	}
	return p.sets
}

func (p *markPool) hold(mark uint32) { p.of(mark).Hold(baseOf(mark)) }

func (p *markPool) release(mark uint32) { p.of(mark).Release(baseOf(mark)) }
