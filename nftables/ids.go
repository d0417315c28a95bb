package nftables

import "fmt"

// Ids share the 32 bits of the priority field. All lie from 0x40000000 to
// 0x7fffffff, where neither kernel classes (0 to 15) nor the handles that tc
// gives out by itself (from 8001:) are.
//
//	0x4nnnnnnn  an endpoint set without affinity
//	0x5nnneeee  Service port nnn with affinity and many endpoints
//	0x6, 0x7    a Service port with affinity: 19 bits of number, 10 bits below
//
// In the lower bits of an affinity block, 0 to maxVariants-1 are the Service
// port's sets and the rest are its endpoints.
const (
	idSpace     uint32 = 0x4000_0000
	idSpaceMask uint32 = 0xc000_0000

	plainFirst, plainLast uint32 = 0x4000_0001, 0x4fff_ffff

	largeFirst, largeLast uint32 = 0x5000_0000, 0x5fff_0000
	largeBits                    = 16
	smallFirst, smallLast uint32 = 0x6000_0000, 0x7fff_fc00
	smallBits                    = 10

	// noSet stands for an endpoint set that is empty.
	noSet uint32 = 0
)

// blockMask keeps the bits of an affinity id that name the Service port.
func blockMask(large bool) uint32 {
	if large {
		return 0xffff_ffff &^ (1<<largeBits - 1)
	}
	return 0xffff_ffff &^ (1<<smallBits - 1)
}

// blockRoom is how many endpoints an affinity block can tell apart.
func blockRoom(large bool) int {
	return int(^blockMask(large)) + 1 - maxVariants
}

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
		return 0, fmt.Errorf("all %d ids are in use", room)
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

func (p *idPool) giveBack(id uint32) { delete(p.used, id) }

// idPools are the pools of one Proxier.
type idPools struct{ plain, small, large *idPool }

func newIDPools() *idPools {
	return &idPools{
		plain: newIDPool(plainFirst, plainLast, 1),
		small: newIDPool(smallFirst, smallLast, 1<<smallBits),
		large: newIDPool(largeFirst, largeLast, 1<<largeBits),
	}
}

// of returns the pool that an id belongs to.
func (p *idPools) of(id uint32) *idPool {
	switch {
	case id >= smallFirst:
		return p.small
	case id >= largeFirst:
		return p.large
	}
	return p.plain
}

func (p *idPools) giveBack(ids []uint32) {
	for _, id := range ids {
		p.of(id).giveBack(id)
	}
}
