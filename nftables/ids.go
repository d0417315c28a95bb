package nftables

import "signalbox/nft/access"

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
func rangeMask(large bool) uint32 { return ^(endpointFlag(large)<<1 - 1) }

// blockRoom is how many endpoints an affinity block can tell apart.
func endpointsPerRange(large bool) int { return int(endpointFlag(large)) }

// idPools are the pools of one Proxier.
type idPools struct {
	plain, small, large *access.Pool
	// chains numbers the sized chains that do not have their size for number.
	chains *access.Pool
}

func newIDPools() *idPools {
	return &idPools{
		plain:  access.NewPool(plainFirst, plainLast, 1<<chainBits),
		small:  access.NewPool(smallFirst, smallLast, 2<<smallBits),
		large:  access.NewPool(largeFirst, largeLast, 2<<largeBits),
		chains: access.NewPool(maxSizeAsNumber+1, chainMask, 1),
	}
}

// maxSizeAsNumber is the largest size of a chain without affinity that is its number
// too.
const maxSizeAsNumber = 511

// of returns the pool that an id belongs to.
func (p *idPools) of(id uint32) *access.Pool {
	switch {
	case id >= largeFirst:
		return p.large
	case id >= smallFirst:
		return p.small
	}
	return p.plain
}

// claim takes certain ids out of the pools: all of them, or none if one is in use.
func (p *idPools) claim(ids []uint32) bool {
	for i, id := range ids {
		if !p.of(id).Claim(id) {
			p.release(ids[:i])
			return false
		}
	}
	return true
}

func (p *idPools) release(ids []uint32) {
	for _, id := range ids {
		p.of(id).Release(id)
	}
}
