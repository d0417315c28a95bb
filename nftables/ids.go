// SPDX-License-Identifier: Apache-2.0

package nftables

import "signalbox/nft/access"

// An id has the 32 bits of the priority field. All ids are from 0x40000000 to
// 0x7fffffff. The kernel's own priorities (0 to 15) and the handles that tc assigns
// (from 8001:) are outside this range.
//
//	0x4, 0x5   an endpoint set: 19 bits of number, 10 bits of chain
//	0x6        a Service port with affinity: 17 bits of number, below them
//	           either 0 and 10 bits of chain, or 1 and 10 bits of endpoint
//	0x7        the same for many endpoints: 11 bits of number, below them
//	           either 0 and the chain, or 1 and 16 bits of endpoint
//
// The chain is the number of the pickChain that picks from the set. A verdict map from
// ids to chains would need an element for each endpoint set, and the kernel walks all of
// them whenever an element is added to any verdict map of the table.
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

	// noSet stands for an empty endpoint set.
	noSet uint32 = 0
)

// endpointFlag is the bit that the id of an endpoint has and the id of a set does not.
func endpointFlag(large bool) uint32 {
	if large {
		return 1 << largeBits
	}
	return 1 << smallBits
}

// rangeMask keeps the bits of an id with affinity that are the Service port's number.
func rangeMask(large bool) uint32 { return ^(endpointFlag(large)<<1 - 1) }

// endpointsPerRange is how many endpoints a range of ids has numbers for.
func endpointsPerRange(large bool) int { return int(endpointFlag(large)) }

// idPools are the pools of one Proxier.
type idPools struct {
	plain, small, large *access.Pool
	// chains numbers the pick chains whose number is not their size.
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

// maxSizeAsNumber is the largest size that is also the number of its chain without
// affinity.
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
