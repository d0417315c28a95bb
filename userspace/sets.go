// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
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
	clusterIPs
	setCount
)

// frontendSets are the sets in which a frontend has elements; NodePorts have
// their own, whose keys lack the address.
type frontendSets struct {
	redirected, noInternalEndpoints, noExternalEndpoints nft.SetID
}

var (
	addressedSets = frontendSets{frontends, noInternalEndpoints, noExternalEndpoints}
	nodePortSets  = frontendSets{nodePorts, nodePortsNoInternalEndpoints, nodePortsNoExternalEndpoints}
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
		nft.NewSet("no-internal-endpoints", byFrontend, nil, "frontends without endpoints for this node and its Pods"),
		nft.NewSet("no-external-endpoints", byFrontend, nil, "frontends without endpoints for others"),
		nft.NewSet("nodeports-no-internal-endpoints", byNodePort, nil, ""),
		nft.NewSet("nodeports-no-external-endpoints", byNodePort, nil, ""),
		&nft.Set{Name: "cluster-ips", Key: addr, Shared: true},
	)
}

// refused are the protocols that the relay does not serve: it would lose the message
// boundaries, streams and addresses that SCTP is used for.
var refused = []plan.Protocol{plan.SCTP}

func relayed(p plan.Protocol) bool { return !slices.Contains(refused, p) }

// compile lists the elements of one Service port.
func compile(f *nft.IPFamily, sp *plan.ServicePort, ids map[plan.FrontendKey]frontendID) []nft.Element {
	c := compiler{family: f, comment: nft.CommentText(sp.Name.String())}
	for i := range sp.Frontends {
		fe := &sp.Frontends[i]
		c.frontend(fe, fe.Key(sp.Name.Protocol), ids)
	}
	return c.list
}

type compiler struct {
	family  *nft.IPFamily
	comment string
	list    []nft.Element
}

func (c *compiler) add(set nft.SetID, key, data, comment string) {
	c.list = append(c.list, nft.Element{Set: set, Key: key, Data: data, Comment: comment})
}

func (c *compiler) frontend(fe *plan.Frontend, k plan.FrontendKey, ids map[plan.FrontendKey]frontendID) {
	sets := addressedSets
	if !fe.Addr.IsValid() {
		sets = nodePortSets
	}
	key := access.FrontendBytes(k)
	open := relayed(k.Protocol)
	inside, outside := open && fe.Internal.Len() > 0, open && fe.External.Len() > 0
	if inside || outside {
		c.add(sets.redirected, key, string(ids[k].addr(c.family.Family).AsSlice()), c.comment)
		if !inside {
			c.add(sets.noInternalEndpoints, key, "", "")
		}
		if !outside {
			c.add(sets.noExternalEndpoints, key, "", "")
		}
	}
	if !inside || !outside {
		c.list = append(c.list, access.RejectElement(fe, k.Protocol, fe.WhenEmpty == plan.Drop && open, c.comment))
	}
	access.SourceElements(fe, k.Protocol, func(e nft.Element) { c.list = append(c.list, e) })
	if fe.Kind == plan.ClusterIP && fe.Addr.IsValid() {
		c.add(clusterIPs, string(fe.Addr.AsSlice()), "", "")
	}
}

// frontendID is the number of a frontend. The rules rewrite a packet's destination
// to an address that contains it, so that the relay can tell from each connection and
// each datagram which frontend it is for.
type frontendID uint32

// idBits is how many bits of the address hold the number.
const idBits = 24

// relayPrefixes are the addresses that stand for frontends. They exist only on the
// node, as one local route each: no packet with such an address leaves it. The
// IPv4 range is a part of the reserved 240.0.0.0/4, the IPv6 range a unique
// local one.
var relayPrefixes = map[plan.Family]netip.Prefix{
	plan.IPv4: netip.MustParsePrefix("251.0.0.0/8"),
	plan.IPv6: netip.MustParsePrefix("fd73:6967:6e61:6c62::/104"),
}

// RelayPrefixes lists the addresses that stand for frontends.
func RelayPrefixes() []netip.Prefix {
	return []netip.Prefix{relayPrefixes[plan.IPv4], relayPrefixes[plan.IPv6]}
}

// addr is the address that stands for the frontend.
func (id frontendID) addr(f plan.Family) netip.Addr {
	b := relayPrefixes[f].Addr().AsSlice()
	tail := b[len(b)-4:]
	binary.BigEndian.PutUint32(tail, binary.BigEndian.Uint32(tail)|uint32(id))
	a, _ := netip.AddrFromSlice(b)
	return a
}

// idOf is the number in an address; false if it stands for no frontend.
func idOf(f plan.Family, a netip.Addr) (frontendID, bool) {
	if !relayPrefixes[f].Contains(a) {
		return 0, false
	}
	b := a.AsSlice()
	return frontendID(binary.BigEndian.Uint32(b[len(b)-4:]) & (1<<idBits - 1)), true
}

// newIDPool numbers frontends. It begins anywhere and gives a free number again only
// after all others: a UDP flow's conntrack entry may contain it for minutes.
func newIDPool() *access.Pool {
	p := access.NewPool(0, 1<<idBits-1, 1)
	p.StartAt(rand.Uint32N(1 << idBits))
	return p
}
