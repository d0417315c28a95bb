// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Value is something of a packet that can be loaded into registers. The registers are
// the 32-bit ones, counted from 0.
type Value struct {
	text string
	regs uint32
	load func(reg uint32) []expr.Any
}

// reg32 is the kernel's number of a 32-bit register.
func reg32(n uint32) uint32 { return unix.NFT_REG32_00 + n }

// Join concatenates values.
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

// Saddr is the source address.
func (f *IPFamily) Saddr() Value { return f.address("saddr", f.SaddrOffset) }

// Daddr is the destination address.
func (f *IPFamily) Daddr() Value { return f.address("daddr", f.DaddrOffset) }

func (f *IPFamily) address(name string, offset uint32) Value {
	n := uint32(f.AddrLen)
	return Value{text: f.Word + " " + name, regs: n / 4, load: func(reg uint32) []expr.Any {
		return []expr.Any{&expr.Payload{DestRegister: reg32(reg), Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n}}
	}}
}

// L4Proto is the transport protocol.
var L4Proto = metaValue("meta l4proto", expr.MetaKeyL4PROTO)

// DPort is the destination port of TCP, UDP and SCTP alike.
var DPort = Value{text: "th dport", regs: 1, load: func(reg uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: reg32(reg), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}}
}}

// Priority is skb->priority.
var Priority = metaValue("meta priority", expr.MetaKeyPRIORITY)

func metaValue(text string, key expr.MetaKey) Value {
	return Value{text: text, regs: 1, load: func(reg uint32) []expr.Any {
		return []expr.Any{&expr.Meta{Key: key, Register: reg32(reg)}}
	}}
}

// Random draws a number from 0 to n-1.
func Random(n int) Value {
	return Value{text: fmt.Sprintf("numgen random mod %d", n), regs: 1, load: func(reg uint32) []expr.Any {
		return []expr.Any{&expr.Numgen{Register: reg32(reg), Modulus: uint32(n), Type: unix.NFT_NG_RANDOM}}
	}}
}

// PriorityBits is the priority with only the bits in mask, and with the bits in set
// added.
func PriorityBits(mask, set uint32) Value {
	return bitsOf(Priority, ClassIDText, mask, set)
}

func bitsOf(v Value, format func(uint32) string, mask, set uint32) Value {
	text := v.text + " & " + format(mask|set)
	if set != 0 {
		text += " | " + format(set)
	}
	return Value{text: text, regs: 1, load: func(reg uint32) []expr.Any {
		return append(v.load(reg), bitwise(reg, mask&^set, set))
	}}
}

func bitwise(reg, mask, xor uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: reg32(reg), DestRegister: reg32(reg), Len: 4, Mask: host32(mask), Xor: host32(xor)}
}

func host32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// byteSwapped changes the byte order of a value of four bytes. nft does not print
// that.
func byteSwapped(v Value, op expr.ByteorderOp) Value {
	return Value{text: v.text, regs: 1, load: func(reg uint32) []expr.Any {
		return append(v.load(reg), &expr.Byteorder{SourceRegister: reg32(reg), DestRegister: reg32(reg), Op: op, Len: 4, Size: 4})
	}}
}

// LookedUp is the datum that the map has for v. Without one the packet leaves the rule.
func LookedUp(v Value, m string) Value {
	return Value{text: v.text + " map @" + m, regs: 1, load: func(reg uint32) []expr.Any {
		return append(v.load(reg), &expr.Lookup{
			SourceRegister: reg32(reg), DestRegister: reg32(reg), IsDestRegSet: true, SetName: m,
		})
	}}
}

// Mark is the packet mark.
var Mark = metaValue("meta mark", expr.MetaKeyMARK)

// MarkBits is the mark with only the bits in mask, and with the bits in set added.
func MarkBits(mask, set uint32) Value {
	return bitsOf(Mark, markText, mask, set)
}

func markText(mark uint32) string { return fmt.Sprintf("0x%08x", mark) }

// MarkLookedUp is the mark that a map with MarkDatum has for v.
func MarkLookedUp(v Value, m string) Value { return byteSwapped(LookedUp(v, m), expr.ByteorderNtoh) }

// ConstantMark is a mark to set.
func ConstantMark(mark uint32) Value { return constant(markText(mark), mark) }

func constant(text string, v uint32) Value {
	return Value{text: text, regs: 1, load: func(reg uint32) []expr.Any {
		return []expr.Any{&expr.Immediate{Register: reg32(reg), Data: host32(v)}}
	}}
}

// MarkOfData reads what MarkData writes.
func MarkOfData(data []byte) uint32 { return binary.BigEndian.Uint32(data) }
