package userspace

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"

	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

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
