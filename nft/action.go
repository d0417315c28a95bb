// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// SetPriorityFrom sets the priority to a value.
func SetPriorityFrom(v Value) Statement { return setMeta("priority", expr.MetaKeyPRIORITY, v) }

// SetPriority sets the priority to a constant.
func SetPriority(id uint32) Statement { return SetPriorityFrom(constant(ClassIDText(id), id)) }

// ClearPriority sets the priority to 0.
func ClearPriority() Statement { return SetPriority(0) }

// SetMark sets the whole packet mark.
func SetMark(v Value) Statement { return setMeta("mark", expr.MetaKeyMARK, v) }

func setMeta(field string, key expr.MetaKey, v Value) Statement {
	return Statement{"meta " + field + " set " + v.text, append(v.load(0),
		&expr.Meta{Key: key, SourceRegister: true, Register: reg32(0)})}
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

// DNATTo sends the connection to an address and port, which v gives.
func (f *IPFamily) DNATTo(v Value) Statement {
	return Statement{"dnat " + f.Word + " to " + v.text, append(v.load(0), &expr.NAT{
		Type: expr.NATTypeDestNAT, Family: uint32(f.Table),
		RegAddrMin: reg32(0), RegProtoMin: reg32(uint32(f.AddrLen / 4)),
	})}
}

// MasqueradeRandom rewrites the source to an address of the outgoing interface and a
// random port.
func MasqueradeRandom() Statement {
	return Statement{"masquerade fully-random", []expr.Any{&expr.Masq{FullyRandom: true}}}
}

// Reject answers with ICMP port unreachable.
func (f *IPFamily) Reject() Statement {
	return Statement{"reject", []expr.Any{&expr.Reject{Type: rejectType, Code: f.rejectUnreach}}}
}

// Reset answers a TCP packet with a reset.
func Reset() Statement {
	return Statement{"reject with tcp reset", []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}}
}

// Drop discards the packet.
func Drop() Statement {
	return Statement{"drop", []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}}
}

// Return ends the chain and continues after the rule that jumped here.
func Return() Statement {
	return Statement{"return", []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}}
}

// Jump evaluates a chain, and then the next rule.
func Jump(chain string) Statement {
	return Statement{"jump " + chain, []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}}
}

// GoTo evaluates a chain and does not return to this one.
func GoTo(chain string) Statement {
	return Statement{"goto " + chain, []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}}
}

// SetMarkBit sets or clears one bit of the mark. The other bits belong to other
// software.
func SetMarkBit(bit uint32, on bool) Statement {
	v, set := MarkBits(^bit, 0), uint32(0)
	if on {
		v.text, set = fmt.Sprintf("meta mark | 0x%08x", bit), bit
	}
	v.load = func(reg uint32) []expr.Any { return append(Mark.load(reg), bitwise(reg, ^bit, set)) }
	return SetMark(v)
}

// VerdictOf jumps to the chain that the verdict map has for v, if any.
func VerdictOf(v Value, m string) Statement {
	return Statement{v.text + " vmap @" + m, append(v.load(0), &expr.Lookup{
		SourceRegister: reg32(0), DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: m,
	})}
}

// CountedBy counts packets in a named counter of the table.
func CountedBy(name string) Statement {
	return Statement{fmt.Sprintf("counter name %q", name), []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: name}}}
}

// SNATRandom rewrites the source to an address, and the port to any.
func (f *IPFamily) SNATRandom(a netip.Addr) Statement {
	return Statement{fmt.Sprintf("snat to %s fully-random", a), []expr.Any{
		&expr.Immediate{Register: reg32(0), Data: a.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.Table), RegAddrMin: reg32(0), FullyRandom: true},
	}}
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

// Remember puts key -> mark into a map of NewSet(...).Remembering, for the given time.
// If the map has the key, the kernel only restarts its time.
func Remember(m string, key, mark Value, timeout time.Duration) Statement {
	return changeMap(m, key, mark, timeout, unix.NFT_DYNSET_OP_UPDATE)
}

// Forget removes the key from such a map. The kernel wants a datum too.
func Forget(m string, key, mark Value) Statement { return changeMap(m, key, mark, 0, dynsetDelete) }

func changeMap(m string, key, mark Value, timeout time.Duration, op uint32) Statement {
	data := byteSwapped(mark, expr.ByteorderHton)
	text := fmt.Sprintf("delete @%s { %s : %s }", m, key.text, data.text)
	if op != dynsetDelete {
		text = fmt.Sprintf("update @%s { %s timeout %s : %s }", m, key.text, durationText(timeout), data.text)
	}
	return Statement{text, append(append(key.load(0), data.load(key.regs)...), &expr.Dynset{
		SrcRegKey: reg32(0), SrcRegData: reg32(key.regs), SetName: m, Operation: op, Timeout: timeout,
	})}
}
