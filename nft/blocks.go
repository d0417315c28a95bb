package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	nflib "github.com/google/nftables"
	"github.com/google/nftables/expr"

	"signalbox/proxier/plan"
)

// NewHook makes a hook at which filter chains are run; text is what nft lists
// for it.
func NewHook(num *nflib.ChainHook, priority nflib.ChainPriority, text string) *Hook {
	return &Hook{nflib.ChainTypeFilter, num, priority, text}
}

// NewNATHook makes a hook at which destinations are rewritten.
func NewNATHook(num *nflib.ChainHook, priority nflib.ChainPriority, text string) *Hook {
	return &Hook{nflib.ChainTypeNAT, num, priority, text}
}

// NewChain makes a chain; hook is nil for one that is only jumped to.
func NewChain(name string, hook *Hook, rules ...Rule) Chain {
	return Chain{Name: name, Hook: hook, Rules: rules}
}

// DaddrIs matches packets to the address.
func (f *IPFamily) DaddrIs(a netip.Addr) Statement {
	return Statement{f.Word + " daddr " + a.String(), append(f.Daddr().load(0),
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: a.AsSlice()})}
}

// DNATToPort sends the connection to the address that v gives, and to a port.
func (f *IPFamily) DNATToPort(v Value, port uint16) Statement {
	to := reg32(v.regs)
	if n := uint32(f.AddrLen / 4); n > v.regs {
		to = reg32(n)
	}
	return Statement{fmt.Sprintf("dnat %s to %s:%d", f.Word, v.text, port), append(v.load(0),
		&expr.Immediate{Register: to, Data: binary.BigEndian.AppendUint16(nil, port)},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.Table), RegAddrMin: reg32(0), RegProtoMin: to},
	)}
}

// In matches a packet whose value is an element of the set.
func In(v Value, set string) Statement {
	return Statement{v.text + " @" + set, append(v.load(0), &expr.Lookup{SourceRegister: reg32(0), SetName: set})}
}

// NotIn matches a packet whose value is no element of the set.
func NotIn(v Value, set string) Statement {
	return Statement{v.text + " != @" + set, append(v.load(0), &expr.Lookup{SourceRegister: reg32(0), SetName: set, Invert: true})}
}

// LookedUp is the datum that the map holds for v. A packet for which it holds
// none leaves the rule.
func LookedUp(v Value, m string) Value {
	return Value{text: v.text + " map @" + m, regs: 1, load: func(reg uint32) []expr.Any {
		return append(v.load(reg), &expr.Lookup{
			SourceRegister: reg32(reg), DestRegister: reg32(reg), IsDestRegSet: true, SetName: m,
		})
	}}
}

// PriorityIs matches packets of exactly this priority.
func PriorityIs(id uint32) Statement {
	return Statement{"meta priority " + ClassIDText(id), append(Priority.load(0),
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: host32(id)})}
}

// TransparentSocket matches packets for an open socket of this node that is
// bound to an address which is not the node's.
func TransparentSocket() Statement {
	return Statement{"socket transparent 1", []expr.Any{
		&expr.Socket{Key: expr.SocketKeyTransparent, Register: reg32(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: []byte{1}},
	}}
}

// ProtocolIs matches packets of a transport protocol.
func ProtocolIs(p plan.Protocol) Statement {
	return Statement{"meta l4proto " + p.String(), append(L4Proto.load(0),
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: []byte{byte(p)}})}
}

// DPortsBetween matches packets to the ports from first to last.
func DPortsBetween(first, last uint16) Statement {
	return Statement{fmt.Sprintf("th dport %d-%d", first, last), append(DPort.load(0),
		&expr.Range{Op: expr.CmpOpEq, Register: reg32(0),
			FromData: binary.BigEndian.AppendUint16(nil, first), ToData: binary.BigEndian.AppendUint16(nil, last)})}
}

// NewSet declares a set, or with data a map.
func NewSet(name string, key, data []Field, comment string) *Set {
	return &Set{Name: name, Key: key, Data: data, Comment: comment}
}

// OfRanges makes the set one of ranges.
func (s *Set) OfRanges() *Set {
	s.Interval = true
	return s
}
