package ipvs

import (
	"fmt"
	"signalbox/nft/access"
)

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
