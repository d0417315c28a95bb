package userspace

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"

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

// idPool numbers frontends. It gives a free number again only after all others: a
// UDP flow's conntrack entry may contain it for minutes.
type idPool struct {
	used map[frontendID]bool
	next frontendID
}

func newIDPool() *idPool {
	return &idPool{used: map[frontendID]bool{}, next: frontendID(rand.Uint32N(1 << idBits))}
}

func (p *idPool) take() (frontendID, error) {
	for range 1 << idBits {
		id := p.next
		p.next = (p.next + 1) % (1 << idBits)
		if !p.used[id] {
			p.used[id] = true
			return id, nil
		}
	}
	return 0, fmt.Errorf("all %d numbers of frontends are in use", 1<<idBits)
}

// claim takes a certain number; false if it is taken.
func (p *idPool) claim(id frontendID) bool {
	if p.used[id] {
		return false
	}
	p.used[id] = true
	return true
}

func (p *idPool) giveBack(id frontendID) { delete(p.used, id) }
