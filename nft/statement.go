package nft

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// statement is one part of a rule, as the kernel's expressions and as the text
// in which nft lists them. The two are made side by side, and a test compares
// the text with what nft makes of the expressions.
type Statement struct {
	text  string
	exprs []expr.Any
}

// rule is a list of statements; a packet that fails one leaves the rule.
type Rule struct {
	statements []Statement
	comment    string
}

func NewRule(s ...Statement) Rule { return Rule{statements: s} }

func (r Rule) Because(comment string) Rule {
	r.comment = comment
	return r
}

// text is the rule as `nft list` writes it.
func (r Rule) text() string {
	parts := make([]string, 0, len(r.statements)+1)
	for _, s := range r.statements {
		parts = append(parts, s.text)
	}
	if r.comment != "" {
		parts = append(parts, fmt.Sprintf("comment %q", r.comment))
	}
	return strings.Join(parts, " ")
}

func (r Rule) exprs() []expr.Any {
	var list []expr.Any
	for _, s := range r.statements {
		list = append(list, s.exprs...)
	}
	return list
}

// value is something of a packet that can be loaded into registers. Registers
// are the 32-bit ones, counted from 0.
type Value struct {
	text string
	regs uint32
	load func(reg uint32) []expr.Any
}

// reg32 is the kernel's number of a 32-bit register.
func reg32(n uint32) uint32 { return unix.NFT_REG32_00 + n }

// join concatenates values.
func Join(values ...Value) Value {
	texts := make([]string, len(values))
	var regs uint32
	for i, v := range values {
		texts[i] = v.text
		regs += v.regs
	}
	return Value{
		text: strings.Join(texts, " . "),
		regs: regs,
		load: func(reg uint32) []expr.Any {
			var list []expr.Any
			for _, v := range values {
				list = append(list, v.load(reg)...)
				reg += v.regs
			}
			return list
		},
	}
}

func (f *IPFamily) Saddr() Value { return f.address("saddr", f.saddrOff) }
func (f *IPFamily) Daddr() Value { return f.address("daddr", f.daddrOff) }

func (f *IPFamily) address(name string, offset uint32) Value {
	n := uint32(f.AddrLen)
	return Value{text: f.Word + " " + name, regs: n / 4, load: func(reg uint32) []expr.Any {
		return []expr.Any{&expr.Payload{DestRegister: reg32(reg), Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n}}
	}}
}

var L4Proto = metaValue("meta l4proto", expr.MetaKeyL4PROTO)

// dport is the destination port of TCP, UDP and SCTP alike.
var DPort = Value{text: "th dport", regs: 1, load: func(reg uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: reg32(reg), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}}
}}

// priority is skb->priority, the scratch field for ids.
var Priority = metaValue("meta priority", expr.MetaKeyPRIORITY)

func metaValue(text string, key expr.MetaKey) Value {
	return Value{text: text, regs: 1, load: func(reg uint32) []expr.Any {
		return []expr.Any{&expr.Meta{Key: key, Register: reg32(reg)}}
	}}
}

// random draws a number from 0 to n-1.
func Random(n int) Value {
	return Value{text: fmt.Sprintf("numgen random mod %d", n), regs: 1, load: func(reg uint32) []expr.Any {
		return []expr.Any{&expr.Numgen{Register: reg32(reg), Modulus: uint32(n), Type: unix.NFT_NG_RANDOM}}
	}}
}

// priorityBits is the priority with only the bits in mask kept, and then those
// in set set.
func PriorityBits(mask, set uint32) Value {
	text := "meta priority & " + ClassIDText(mask|set)
	if set != 0 {
		text += " | " + ClassIDText(set)
	}
	return Value{text: text, regs: 1, load: func(reg uint32) []expr.Any {
		return append(Priority.load(reg), bitwise(reg, mask&^set, set))
	}}
}

func bitwise(reg, mask, xor uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: reg32(reg), DestRegister: reg32(reg), Len: 4, Mask: host32(mask), Xor: host32(xor)}
}

func host32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// turned changes the byte order of a value of four bytes; nft does not print
// that.
func turned(v Value, op expr.ByteorderOp) Value {
	return Value{text: v.text, regs: 1, load: func(reg uint32) []expr.Any {
		return append(v.load(reg), &expr.Byteorder{SourceRegister: reg32(reg), DestRegister: reg32(reg), Op: op, Len: 4, Size: 4})
	}}
}

func SetPriorityFrom(v Value) Statement {
	return Statement{"meta priority set " + v.text, append(v.load(0),
		&expr.Meta{Key: expr.MetaKeyPRIORITY, SourceRegister: true, Register: reg32(0)})}
}

// clearPriority sets the priority to 0.
func ClearPriority() Statement {
	return Statement{"meta priority set none", []expr.Any{
		&expr.Immediate{Register: reg32(0), Data: host32(0)},
		&expr.Meta{Key: expr.MetaKeyPRIORITY, SourceRegister: true, Register: reg32(0)},
	}}
}

// priorityIs matches packets whose priority has exactly those of the bits in
// mask set that id has.
func PriorityBitsAre(mask, id uint32) Statement {
	return Statement{
		fmt.Sprintf("meta priority & %s == %s", ClassIDText(mask), ClassIDText(id)),
		append(PriorityBits(mask, 0).load(0), &expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: host32(id)}),
	}
}

// dynsetDelete is NFT_DYNSET_OP_DELETE (Linux 5.4), which x/sys lacks.
const dynsetDelete = 2

// durationText prints whole seconds as nft does: 1d2h3m4s.
func durationText(d time.Duration) string {
	var b strings.Builder
	for _, unit := range []struct {
		length time.Duration
		letter string
	}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}} {
		if n := d / unit.length; n > 0 {
			fmt.Fprintf(&b, "%d%s", n, unit.letter)
			d -= n * unit.length
		}
	}
	return b.String()
}

// dnatTo sends the connection to an address and port, which v gives.
func (f *IPFamily) DnatTo(v Value) Statement {
	return Statement{"dnat " + f.Word + " to " + v.text, append(v.load(0), &expr.NAT{
		Type: expr.NATTypeDestNAT, Family: uint32(f.Table),
		RegAddrMin: reg32(0), RegProtoMin: reg32(uint32(f.AddrLen / 4)),
	})}
}

func MasqueradeRandom() Statement {
	return Statement{"masquerade fully-random", []expr.Any{&expr.Masq{FullyRandom: true}}}
}

func (f *IPFamily) Reject() Statement {
	return Statement{"reject", []expr.Any{&expr.Reject{Type: rejectType, Code: f.rejectUnreach}}}
}

func Drop() Statement {
	return Statement{"drop", []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}}
}

func Return() Statement {
	return Statement{"return", []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}}
}

func Jump(chain string) Statement {
	return Statement{"jump " + chain, []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}}
}

func GoTo(chain string) Statement {
	return Statement{"goto " + chain, []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}}
}

// stateNew matches packets that open a connection.
func StateNew() Statement {
	return ctBit("ct state new", expr.CtKeySTATE, expr.CtStateBitNEW)
}

// isDNATed matches connections whose destination was rewritten, by whomever.
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

// fibLocal matches packets whose source or destination is an address of this
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

// fibNotLocal matches packets to other than this node's addresses.
func FibNotLocal() Statement {
	return Statement{"fib daddr type != local", []expr.Any{
		&expr.Fib{Register: reg32(0), ResultADDRTYPE: true, FlagDADDR: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg32(0), Data: host32(unix.RTN_LOCAL)},
	}}
}

// notLoopback matches packets to other than loopback addresses.
func (f *IPFamily) NotLoopback() Statement { return f.DaddrIn(f.loopback, "!= ", expr.CmpOpNeq) }

// isLoopback matches packets to loopback addresses.
func (f *IPFamily) IsLoopback() Statement { return f.DaddrIn(f.loopback, "", expr.CmpOpEq) }

// entersBy matches packets that came in by the interface, or by any whose name
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

// markHas matches packets that bear the mark's bit.
func MarkHas(bit uint32) Statement {
	return Statement{fmt.Sprintf("meta mark & 0x%08x == 0x%08x", bit, bit), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg32(0)},
		bitwise(0, bit, 0),
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: host32(bit)},
	}}
}

// setMarkBit sets or clears the mark's bit and leaves the others, which are
// other software's.
func SetMarkBit(bit uint32, on bool) Statement {
	text, xor := fmt.Sprintf("meta mark set meta mark & 0x%08x", ^bit), uint32(0)
	if on {
		text, xor = fmt.Sprintf("meta mark set meta mark | 0x%08x", bit), bit
	}
	return Statement{text, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg32(0)},
		bitwise(0, ^bit, xor),
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg32(0)},
	}}
}

// VerdictOf goes where the verdict map says, or on if it says nothing.
func VerdictOf(v Value, m string) Statement {
	return Statement{v.text + " vmap @" + m, append(v.load(0), &expr.Lookup{
		SourceRegister: reg32(0), DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: m,
	})}
}

// countedBy counts packets in a counter of the table's.
func CountedBy(name string) Statement {
	return Statement{fmt.Sprintf("counter name %q", name), []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: name}}}
}

// daddrIn compares the destination address with a prefix; operator is nft's word for op.
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

// oifname compares the interface that a packet leaves by.
func Oifname(name, operator string, op expr.CmpOp) Statement {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	return Statement{fmt.Sprintf("oifname %s%q", operator, name), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg32(0)},
		&expr.Cmp{Op: op, Register: reg32(0), Data: data},
	}}
}

// snatRandom rewrites the source to an address, and the port to any.
func (f *IPFamily) SnatRandom(a netip.Addr) Statement {
	return Statement{fmt.Sprintf("snat to %s fully-random", a), []expr.Any{
		&expr.Immediate{Register: reg32(0), Data: a.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.Table), RegAddrMin: reg32(0), FullyRandom: true},
	}}
}
