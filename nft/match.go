// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// PriorityBitsAre matches packets whose priority has, of the bits in mask, exactly those
// of id.
func PriorityBitsAre(mask, id uint32) Statement {
	v := PriorityBits(mask, 0)
	return equals(v.text+" == "+ClassIDText(id), v, host32(id))
}

func equals(text string, v Value, data []byte) Statement {
	return Statement{text, append(v.load(0), &expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: data})}
}

// StateNew matches packets that open a connection.
func StateNew() Statement {
	return ctBit("ct state new", expr.CtKeySTATE, expr.CtStateBitNEW)
}

// IsDNATed matches connections whose destination is rewritten, by this table or another.
func IsDNATed() Statement {
	const ipsDstNAT = 1 << 5 // enum ip_conntrack_status
	return ctBit("ct status dnat", expr.CtKeySTATUS, ipsDstNAT)
}

func ctBit(text string, key expr.CtKey, bit uint32) Statement {
	return Statement{text, []expr.Any{
		&expr.Ct{Key: key, Register: reg32(0)},
		bitwise(0, bit, 0),
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg32(0), Data: host32(0)},
	}}
}

// SaddrIsLocal matches packets whose source is an address of this node.
func SaddrIsLocal() Statement {
	return fib("fib saddr type local", expr.Fib{FlagSADDR: true}, expr.CmpOpEq)
}

// DaddrIsLocal matches packets to an address of this node.
func DaddrIsLocal() Statement {
	return fib("fib daddr type local", expr.Fib{FlagDADDR: true}, expr.CmpOpEq)
}

// DaddrIsNotLocal matches packets to other than this node's addresses.
func DaddrIsNotLocal() Statement {
	return fib("fib daddr type != local", expr.Fib{FlagDADDR: true}, expr.CmpOpNeq)
}

func fib(text string, lookup expr.Fib, op expr.CmpOp) Statement {
	lookup.Register, lookup.ResultADDRTYPE = reg32(0), true
	return Statement{text, []expr.Any{&lookup, &expr.Cmp{Op: op, Register: reg32(0), Data: host32(unix.RTN_LOCAL)}}}
}

// NotLoopback matches packets to other than loopback addresses.
func (f *IPFamily) NotLoopback() Statement { return f.daddrIn(f.loopback, expr.CmpOpNeq) }

// IsLoopback matches packets to loopback addresses.
func (f *IPFamily) IsLoopback() Statement { return f.DaddrIn(f.loopback) }

// EntersBy matches packets that came in by the interface.
func EntersBy(name string) Statement {
	return interfaceName("iifname", expr.MetaKeyIIFNAME, expr.CmpOpEq, name, whole(name))
}

// EntersByPrefix matches packets that came in by an interface whose name begins so.
func EntersByPrefix(prefix string) Statement {
	data := []byte(prefix[:min(len(prefix), unix.IFNAMSIZ)])
	return interfaceName("iifname", expr.MetaKeyIIFNAME, expr.CmpOpEq, prefix+"*", data)
}

// LeavesBy matches packets that leave by the interface.
func LeavesBy(name string) Statement {
	return interfaceName("oifname", expr.MetaKeyOIFNAME, expr.CmpOpEq, name, whole(name))
}

// LeavesNotBy matches packets that leave by another interface.
func LeavesNotBy(name string) Statement {
	return interfaceName("oifname", expr.MetaKeyOIFNAME, expr.CmpOpNeq, name, whole(name))
}

// whole is the name with the zeros after it: the kernel compares as many bytes as it
// gets.
func whole(name string) []byte {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	return data
}

func interfaceName(word string, key expr.MetaKey, op expr.CmpOp, text string, data []byte) Statement {
	return Statement{fmt.Sprintf("%s %s%q", word, operator(op), text), []expr.Any{
		&expr.Meta{Key: key, Register: reg32(0)},
		&expr.Cmp{Op: op, Register: reg32(0), Data: data},
	}}
}

// operator is how nft writes the comparison.
func operator(op expr.CmpOp) string {
	if op == expr.CmpOpNeq {
		return "!= "
	}
	return ""
}

// MarkHas matches packets whose mark has the bit.
func MarkHas(bit uint32) Statement {
	v := MarkBits(bit, 0)
	return equals(v.text+" == "+markText(bit), v, host32(bit))
}

// DaddrIs matches packets to the address.
func (f *IPFamily) DaddrIs(a netip.Addr) Statement {
	return f.DaddrIn(netip.PrefixFrom(a, a.BitLen()))
}

// DaddrIn matches packets to an address of the prefix.
func (f *IPFamily) DaddrIn(p netip.Prefix) Statement { return f.daddrIn(p, expr.CmpOpEq) }

func (f *IPFamily) daddrIn(p netip.Prefix, op expr.CmpOp) Statement {
	exprs, text := f.Daddr().load(0), p.String()
	if p.IsSingleIP() {
		text = p.Addr().String()
	} else {
		exprs = append(exprs, &expr.Bitwise{
			SourceRegister: reg32(0), DestRegister: reg32(0), Len: uint32(f.AddrLen),
			Mask: net.CIDRMask(p.Bits(), f.HostBits()), Xor: make([]byte, f.AddrLen),
		})
	}
	return Statement{f.Word + " daddr " + operator(op) + text, append(exprs, &expr.Cmp{Op: op, Register: reg32(0), Data: p.Addr().AsSlice()})}
}

// In matches a packet whose value is an element of the set.
func In(v Value, set string) Statement {
	return Statement{v.text + " @" + set, append(v.load(0), &expr.Lookup{SourceRegister: reg32(0), SetName: set})}
}

// NotIn matches a packet whose value is no element of the set.
func NotIn(v Value, set string) Statement {
	return Statement{v.text + " != @" + set, append(v.load(0), &expr.Lookup{SourceRegister: reg32(0), SetName: set, Invert: true})}
}

// PriorityIs matches packets of exactly this priority.
func PriorityIs(id uint32) Statement {
	return equals("meta priority "+ClassIDText(id), Priority, host32(id))
}

// TransparentSocket matches packets for a socket of this node that is bound to an
// address of another host.
func TransparentSocket() Statement {
	return Statement{"socket transparent 1", []expr.Any{
		&expr.Socket{Key: expr.SocketKeyTransparent, Register: reg32(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: []byte{1}},
	}}
}

// ProtocolIs matches packets of a transport protocol.
func ProtocolIs(p plan.Protocol) Statement {
	return equals("meta l4proto "+p.String(), L4Proto, []byte{byte(p)})
}

// TCPPortIs matches TCP packets to the port.
func TCPPortIs(port uint16) Statement {
	isTCP := ProtocolIs(plan.TCP)
	return Statement{fmt.Sprintf("tcp dport %d", port), append(isTCP.exprs, equals("", DPort, binary.BigEndian.AppendUint16(nil, port)).exprs...)}
}

// MidStream matches TCP packets that do not open a connection.
func MidStream() Statement {
	const fin, syn, rst, ack = 1 << 0, 1 << 1, 1 << 2, 1 << 4
	const mask = fin | syn | rst | ack
	return Statement{"tcp flags != syn / fin,syn,rst,ack", append(slices.Clone(ProtocolIs(plan.TCP).exprs),
		&expr.Payload{DestRegister: reg32(0), Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: reg32(0), DestRegister: reg32(0), Len: 1, Mask: []byte{mask}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg32(0), Data: []byte{syn}})}
}

// DPortsBetween matches packets to the ports from first to last.
func DPortsBetween(first, last uint16) Statement {
	return Statement{fmt.Sprintf("th dport %d-%d", first, last), append(DPort.load(0),
		&expr.Range{Op: expr.CmpOpEq, Register: reg32(0),
			FromData: binary.BigEndian.AppendUint16(nil, first), ToData: binary.BigEndian.AppendUint16(nil, last)})}
}

// MarkIs matches packets whose mark has, of the bits in mask, exactly those of mark.
func MarkIs(mask, mark uint32) Statement {
	v := MarkBits(mask, 0)
	text := v.text + " == " + markText(mark)
	if ones := bits.LeadingZeros32(^mask); ones == 32 {
		text = "meta mark " + markText(mark)
	} else if ones == bits.OnesCount32(mask) && ones > 0 {
		text = fmt.Sprintf("meta mark %s/%d", markText(mark), ones)
	}
	return equals(text, v, host32(mark))
}

// HasEntered matches packets that came in by an interface. Packets at the output hook
// did not.
func HasEntered() Statement {
	return Statement{"iif != 0", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIF, Register: reg32(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg32(0), Data: host32(0)},
	}}
}
