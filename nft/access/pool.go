// SPDX-License-Identifier: Apache-2.0

package access

import "fmt"

// Pool assigns numbers in turn. A released number is assigned late, because a packet, a
// connection or a conntrack entry may still have it.
type Pool struct {
	first, last, step uint32
	next              uint32
	uses              map[uint32]int32
}

// NewPool makes a pool of the numbers first, first+step and so on to last.
func NewPool(first, last, step uint32) *Pool {
	return &Pool{first: first, last: last, step: step, next: first, uses: map[uint32]int32{}}
}

// StartAt makes n the next number.
func (p *Pool) StartAt(n uint32) { p.next = n }

// Next is the next number, if nothing uses it.
func (p *Pool) Next() uint32 { return p.next }

// InUse counts the numbers that something uses.
func (p *Pool) InUse() int { return len(p.uses) }

// Uses counts the uses of a number.
func (p *Pool) Uses(n uint32) int { return int(p.uses[n]) }

// Take assigns a number that nothing uses. The number has one use then.
func (p *Pool) Take() (uint32, error) {
	room := int((p.last-p.first)/p.step) + 1
	if len(p.uses) >= room {
		return 0, fmt.Errorf("all %d are in use", room)
	}
	for {
		n := p.next
		p.advance(n)
		if p.uses[n] == 0 {
			p.uses[n] = 1
			return n, nil
		}
	}
}

// Claim takes the number n, unless something uses it. Take continues after n.
func (p *Pool) Claim(n uint32) bool {
	if p.uses[n] > 0 {
		return false
	}
	p.uses[n] = 1
	if n >= p.next && n < p.last {
		p.advance(n)
	}
	return true
}

// Hold adds one use of a number.
func (p *Pool) Hold(n uint32) { p.uses[n]++ }

// Release ends one use. After the last one the number is free.
func (p *Pool) Release(n uint32) {
	if p.uses[n]--; p.uses[n] <= 0 {
		delete(p.uses, n)
	}
}

func (p *Pool) advance(n uint32) {
	if p.next = n + p.step; p.next > p.last || p.next < p.first {
		p.next = p.first
	}
}
