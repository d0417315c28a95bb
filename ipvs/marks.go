// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"fmt"
	"net/netip"
	"slices"

	"signalbox/ipvs/internal/kernel"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// Marks of virtual servers are from 0x40000001 to 0x7fffffff:
//
//	0x4, 0x5   an endpoint set
//	0x6, 0x7   a Service port with affinity. The first mark of its range has 18 bits of
//	           number. The 11 bits below are either 0, 8 bits of timeout index and 2 bits
//	           of set index, or 1 and 10 bits of endpoint number.
//
// IPVS compares the whole mark. So the first packet of a connection to such a server loses
// the mark that other software has set.
const (
	markSpace uint32 = 0x4000_0000
	markMask  uint32 = 0xc000_0000

	// noEndpoints stands for an empty endpoint set, if the frontend's other set is not empty.
	noEndpoints = kernel.ProbeMark

	setFirst, setLast        = markSpace + 1, uint32(0x5fff_ffff)
	affinitySpace            = uint32(0x6000_0000)
	affinityMask             = uint32(0xe000_0000)
	affinityLast             = uint32(0x7fff_f800)
	rangeBits                = 11
	rangeMask         uint32 = ^uint32(1<<rangeBits - 1)
	endpointFlag      uint32 = 1 << 10
	setIndexBits             = 2
	maxTimeouts              = 1 << 8
	maxKnownEndpoints        = 1 << 10
)

// maxEndpointSets limits the endpoint sets of a Service port with affinity. The resolver makes
// at most two.
const maxEndpointSets = 1 << setIndexBits

func isOurs(mark uint32) bool { return mark&markMask == markSpace }

// isOfAffinity says whether a mark belongs to a Service port with affinity.
func isOfAffinity(mark uint32) bool { return mark&affinityMask == affinitySpace }

// allocationOf is the number that the pool counts for a mark: the first mark of a range, or
// the mark of an endpoint set.
func allocationOf(mark uint32) uint32 {
	if isOfAffinity(mark) {
		return mark & rangeMask
	}
	return mark
}

// markPool allocates marks. Records and virtual servers in the kernel use them.
type markPool struct{ sets, ranges *access.Pool }

func newMarkPool() *markPool {
	return &markPool{access.NewPool(setFirst, setLast, 1), access.NewPool(affinitySpace, affinityLast, 1<<rangeBits)}
}

func (p *markPool) of(mark uint32) *access.Pool {
	if isOfAffinity(mark) {
		return p.ranges
	}
	return p.sets
}

func (p *markPool) hold(mark uint32) { p.of(mark).Hold(allocationOf(mark)) }

func (p *markPool) release(mark uint32) { p.of(mark).Release(allocationOf(mark)) }

// releaseAll releases the marks of a record, which may be nil.
func (p *markPool) releaseAll(r *record) {
	if r == nil {
		return
	}
	for _, mark := range r.allocated {
		p.release(mark)
	}
}

// markKey is a frontend, for internal or for external traffic.
type markKey struct {
	frontend plan.FrontendKey
	internal bool
}

// newMark returns the mark for the i-th endpoint set: its old one if possible.
func (c *portCompiler) newMark(i int, k markKey) (uint32, error) {
	if c.hasAffinity() {
		if i >= maxEndpointSets {
			return 0, fmt.Errorf("a Service port with affinity can have %d different endpoint sets", maxEndpointSets)
		}
		timeout := slices.Index(c.rules.timeouts, c.port.AffinityTimeout)
		if timeout >= maxTimeouts {
			return 0, fmt.Errorf("Services can have %d different affinity timeouts", maxTimeouts)
		}
		return c.out.allocated[0] | uint32(timeout)<<setIndexBits | uint32(i), nil
	}
	old := c.oldMarks[k]
	usable := old != 0 && old != noEndpoints && !isOfAffinity(old) && !slices.Contains(c.out.allocated, old)
	return c.allocate(old, usable, c.marks.sets)
}

// allocateRange gives the range of a Service port with affinity: its old one if possible,
// because the map of clients has marks of the range.
func (c *portCompiler) allocateRange() error {
	for i := range c.port.Frontends {
		for _, internal := range []bool{false, true} {
			old := c.oldMarks[markKey{c.port.Frontends[i].Key(c.port.Name.Protocol), internal}]
			if first := allocationOf(old); isOfAffinity(old) && !c.used[first] {
				_, err := c.allocate(first, true, c.marks.ranges)
				return err
			}
		}
	}
	_, err := c.allocate(0, false, c.marks.ranges)
	return err
}

// allocate takes the old number, or else a free one of the pool.
func (c *portCompiler) allocate(old uint32, usable bool, pool *access.Pool) (uint32, error) {
	mark := old
	if usable && !c.used[old] {
		pool.Hold(old)
	} else {
		var err error
		if mark, err = pool.Take(); err != nil {
			return 0, fmt.Errorf("packet marks for virtual servers: %w", err)
		}
	}
	c.out.allocated = append(c.out.allocated, mark)
	return mark, nil
}

// endpointMarks numbers the endpoints of a Service port with affinity.
type endpointMarks struct {
	first uint32
	old   map[netip.AddrPort]uint32
	taken map[uint32]bool
	next  uint32
}

func newEndpointMarks(first uint32, old map[netip.AddrPort]uint32) *endpointMarks {
	m := &endpointMarks{first: first, old: old, taken: make(map[uint32]bool, len(old)), next: uint32(len(old))} // mostly free
	for _, mark := range old {
		m.taken[mark] = true
	}
	return m
}

// of returns the old mark of an endpoint, or a free one. It returns 0 if none is free.
func (m *endpointMarks) of(endpoint netip.AddrPort) uint32 {
	if mark := m.old[endpoint]; mark != 0 {
		return mark
	}
	for range maxKnownEndpoints {
		mark := m.first | endpointFlag | m.next%maxKnownEndpoints
		m.next++
		if !m.taken[mark] {
			m.taken[mark] = true
			return mark
		}
	}
	return 0
}
