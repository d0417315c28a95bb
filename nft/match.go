package nft

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"signalbox/proxier/plan"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// PriorityBitsAre matches packets whose priority has exactly those of the bits in
// mask set that id has.
func PriorityBitsAre(mask, id uint32) Statement {
	return Statement{
		fmt.Sprintf("meta priority & %s == %s", ClassIDText(mask), ClassIDText(id)),
		append(PriorityBits(mask, 0).load(0), &expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: host32(id)}),
	}
}

// StateNew matches packets that open a connection.
func StateNew() Statement {
	return ctBit("ct state new", expr.CtKeySTATE, expr.CtStateBitNEW)
}

// IsDNATed matches connections whose destination was rewritten, by whomever.
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

// FibLocal matches packets whose source or destination is an address of this
// node.
func FibLocal(source bool) Statement {
	text := "fib daddr type local"
	if source {
		text = "fib saddr type local"
	}
	return Statement{text, []expr.Any{
		&expr.Fib{Register: reg32(0), ResultADDRTYPE: true, FlagSADDR: source, FlagDADDR: !source},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: host32(unix.RTN_LOCAL)},
	}}
}

// FibNotLocal matches packets to other than this node's addresses.
func FibNotLocal() Statement {
	return Statement{"fib daddr type != local", []expr.Any{
		&expr.Fib{Register: reg32(0), ResultADDRTYPE: true, FlagDADDR: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg32(0), Data: host32(unix.RTN_LOCAL)},
	}}
}

// NotLoopback matches packets to other than loopback addresses.
func (f *IPFamily) NotLoopback() Statement { return f.DaddrIn(f.loopback, "!= ", expr.CmpOpNeq) }

// IsLoopback matches packets to loopback addresses.
func (f *IPFamily) IsLoopback() Statement { return f.DaddrIn(f.loopback, "", expr.CmpOpEq) }

// EntersBy matches packets that came in by the interface, or by any whose name
// begins so.
func EntersBy(name string, isPrefix bool) Statement {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	text := fmt.Sprintf("iifname %q", name)
	if isPrefix {
		data = data[:min(len(name), len(data))]
		text = fmt.Sprintf("iifname %q", name+"*")
	}
	return Statement{text, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg32(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: data},
	}}
}

// MarkHas matches packets that bear the mark's bit.
func MarkHas(bit uint32) Statement {
	return Statement{fmt.Sprintf("meta mark & 0x%08x == 0x%08x", bit, bit), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg32(0)},
		bitwise(0, bit, 0),
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: host32(bit)},
	}}
}

// DaddrIn compares the destination address with a prefix; operator is nft's word for op.
func (f *IPFamily) DaddrIn(p netip.Prefix, operator string, op expr.CmpOp) Statement {
	exprs, text := f.Daddr().load(0), p.String()
	if p.IsSingleIP() {
		text = p.Addr().String()
	} else {
		exprs = append(exprs, &expr.Bitwise{
			SourceRegister: reg32(0), DestRegister: reg32(0), Len: uint32(f.AddrLen),
			Mask: net.CIDRMask(p.Bits(), f.HostBits()), Xor: make([]byte, f.AddrLen),
		})
	}
	return Statement{f.Word + " daddr " + operator + text, append(exprs, &expr.Cmp{Op: op, Register: reg32(0), Data: p.Addr().AsSlice()})}
}

// LeavesBy compares the interface that a packet leaves by.
func LeavesBy(name, operator string, op expr.CmpOp) Statement {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	return Statement{fmt.Sprintf("oifname %s%q", operator, name), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg32(0)},
		&expr.Cmp{Op: op, Register: reg32(0), Data: data},
	}}
}

// DaddrIs matches packets to the address.
func (f *IPFamily) DaddrIs(a netip.Addr) Statement {
	return Statement{f.Word + " daddr " + a.String(), append(f.Daddr().load(0),
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: a.AsSlice()})}
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

// MarkIs matches packets whose mark has exactly those of the bits in mask set
// that mark has.
func MarkIs(mask, mark uint32) Statement {
	text := fmt.Sprintf("meta mark & 0x%08x == 0x%08x", mask, mark)
	if ones := bits.LeadingZeros32(^mask); ones == 32 {
		text = fmt.Sprintf("meta mark 0x%08x", mark)
	} else if ones == bits.OnesCount32(mask) && ones > 0 {
		text = fmt.Sprintf("meta mark 0x%08x/%d", mark, ones)
	}
	return Statement{
		text,
		append(MarkBits(mask, 0).load(0), &expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: host32(mark)}),
	}
}

// HasEntered matches packets that came in by an interface, which those at the
// output hook did not.
func HasEntered() Statement {
	return Statement{"iif != 0", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIF, Register: reg32(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg32(0), Data: host32(0)},
	}}
}

// LeavesNotBy matches packets that leave by another interface.
func LeavesNotBy(name string) Statement { return LeavesBy(name, "!= ", expr.CmpOpNeq) }
