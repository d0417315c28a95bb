package nft

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// This file is the part of the shared blocks that deals with packet marks,
// priorities and what packets leave behind in maps.

// Mark is the packet mark.
var Mark = metaValue("meta mark", expr.MetaKeyMARK)

// MarkBits is the mark with only the bits in mask kept, and then those in set
// set.
func MarkBits(mask, set uint32) Value {
	text := fmt.Sprintf("meta mark & 0x%08x", mask|set)
	if set != 0 {
		text += fmt.Sprintf(" | 0x%08x", set)
	}
	return Value{text: text, regs: 1, load: func(reg uint32) []expr.Any {
		return append(Mark.load(reg), bitwise(reg, mask&^set, set))
	}}
}

// SetMark sets the whole mark.
func SetMark(v Value) Statement {
	return Statement{"meta mark set " + v.text, append(v.load(0),
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg32(0)})}
}

// MarkLookedUp is the mark that the map holds for v, whose data are MarkDatum.
func MarkLookedUp(v Value, m string) Value { return turned(LookedUp(v, m), expr.ByteorderNtoh) }

// ConstantMark is a mark to set.
func ConstantMark(mark uint32) Value {
	return Value{text: fmt.Sprintf("0x%08x", mark), regs: 1, load: func(reg uint32) []expr.Any {
		return []expr.Any{&expr.Immediate{Register: reg32(reg), Data: host32(mark)}}
	}}
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

// SetPriority sets the priority.
func SetPriority(id uint32) Statement {
	return Statement{"meta priority set " + ClassIDText(id), []expr.Any{
		&expr.Immediate{Register: reg32(0), Data: host32(id)},
		&expr.Meta{Key: expr.MetaKeyPRIORITY, SourceRegister: true, Register: reg32(0)},
	}}
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
func LeavesNotBy(name string) Statement { return Oifname(name, "!= ", expr.CmpOpNeq) }

// Remember records key -> mark in a map made by Remembering, for the given
// time. Where the key is known already the kernel only starts its time again.
func Remember(m string, key, mark Value, timeout time.Duration) Statement {
	return changeMap(m, key, mark, timeout, unix.NFT_DYNSET_OP_UPDATE)
}

// Forget removes the key from a map made by Remembering. The kernel wants a
// datum all the same.
func Forget(m string, key, mark Value) Statement { return changeMap(m, key, mark, 0, dynsetDelete) }

func changeMap(m string, key, mark Value, timeout time.Duration, op uint32) Statement {
	data := turned(mark, expr.ByteorderHton)
	text := fmt.Sprintf("delete @%s { %s : %s }", m, key.text, data.text)
	if op != dynsetDelete {
		text = fmt.Sprintf("update @%s { %s timeout %s : %s }", m, key.text, durationText(timeout), data.text)
	}
	return Statement{text, append(append(key.load(0), data.load(key.regs)...), &expr.Dynset{
		SrcRegKey: reg32(0), SrcRegData: reg32(key.regs), SetName: m, Operation: op, Timeout: timeout,
	})}
}

// Remembering makes the map one that packets fill with up to size elements: see
// Remember.
func (s *Set) Remembering(size uint32) *Set {
	s.Dynamic, s.Size = true, size
	return s
}

// MarkOfData reads what MarkData writes.
func MarkOfData(data []byte) uint32 { return binary.BigEndian.Uint32(data) }
