package nftables

import "fmt"

// Ids share the 32 bits of the priority field. All lie from 0x40000000 to
// 0x7fffffff, where neither the kernel's own priorities (0 to 15) nor the
// handles that tc gives out by itself (from 8001:) are.
//
//	0x4, 0x5   an endpoint set: 19 bits of number, 10 bits of chain
//	0x6        a Service port with affinity: 17 bits of number, below them
//	           either 0 and 10 bits of chain, or 1 and 10 bits of endpoint
//	0x7        the same for many endpoints: 11 bits of number, below them
//	           either 0 and the chain, or 1 and 16 bits of endpoint
//
// The chain is the number of the sizedChain that picks from the set. It is in
// the id, and not the datum of a map by id, because a verdict map with an
// element for every endpoint set makes the kernel walk all of them whenever one
// element is added to any verdict map of the table.
const (
	idSpace     uint32 = 0x4000_0000
	idSpaceMask uint32 = 0xc000_0000

	chainBits        = 10
	chainMask uint32 = 1<<chainBits - 1

	plainFirst, plainLast uint32 = 0x4000_0000 + 1<<chainBits, 0x6000_0000 - 1<<chainBits
	smallFirst, smallLast uint32 = 0x6000_0000, 0x7000_0000 - 2<<smallBits
	largeFirst, largeLast uint32 = 0x7000_0000, 0x8000_0000 - 2<<largeBits

	// smallBits and largeBits are the lengths of an endpoint's number.
	smallBits, largeBits = 10, 16

	// noSet stands for an endpoint set that is empty.
	noSet uint32 = 0
)

// endpointFlag is the bit that tells the id of an endpoint from that of a set.
func endpointFlag(large bool) uint32 {
	if large {
		return 1 << largeBits
	}
	return 1 << smallBits
}

// blockMask keeps the bits of an affinity id that name the Service port.
func blockMask(large bool) uint32 { return ^(endpointFlag(large)<<1 - 1) }

// blockRoom is how many endpoints an affinity block can tell apart.
func blockRoom(large bool) int { return int(endpointFlag(large)) }

// idPool gives out numbers in turn, so that one given back is not soon given
// out again: a packet under way may still carry it.
type idPool struct {
	first, last, step uint32
	next              uint32
	used              map[uint32]struct{}
}

func newIDPool(first, last, step uint32) *idPool {
	return &idPool{first: first, last: last, step: step, next: first, used: make(map[uint32]struct{})}
}

func (p *idPool) take() (uint32, error) {
	if room := int((p.last-p.first)/p.step) + 1; len(p.used) >= room {
		return 0, fmt.Errorf("all %d are in use", room)
	}
	for {
		id := p.next
		if p.next == p.last {
			p.next = p.first
		} else {
			p.next += p.step
		}
		if _, taken := p.used[id]; !taken {
			p.used[id] = struct{}{}
			return id, nil
		}
	}
}

// claim takes a certain id, and goes on giving out those after it. It fails if
// the id is taken.
func (p *idPool) claim(id uint32) bool {
	if _, taken := p.used[id]; taken {
		return false
	}
	p.used[id] = struct{}{}
	if id >= p.next && id < p.last {
		p.next = id + p.step
	}
	return true
}

func (p *idPool) giveBack(id uint32) { delete(p.used, id) }

// idPools are the pools of one Proxier.
type idPools struct {
	plain, small, large *idPool
	// chains numbers the sized chains that do not have their size for number.
	chains *idPool
}

func newIDPools() *idPools {
	return &idPools{
		plain:  newIDPool(plainFirst, plainLast, 1<<chainBits),
		small:  newIDPool(smallFirst, smallLast, 2<<smallBits),
		large:  newIDPool(largeFirst, largeLast, 2<<largeBits),
		chains: newIDPool(ownNumber+1, chainMask, 1),
	}
}

// ownNumber is the largest size of a chain without affinity that is its number
// too.
const ownNumber = 511

// of returns the pool that an id belongs to.
func (p *idPools) of(id uint32) *idPool {
	switch {
	case id >= largeFirst:
		return p.large
	case id >= smallFirst:
		return p.small
	}
	return p.plain
}

func (p *idPools) giveBack(ids []uint32) {
	for _, id := range ids {
		p.of(id).giveBack(id)
	}
}
