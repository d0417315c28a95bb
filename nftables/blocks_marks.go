package nftables

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"
	"time"

	nflib "github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// This file is the part of the shared blocks that deals with packet marks,
// priorities and what packets leave behind in maps.

const (
	// MarkField is a packet mark or a priority within a key, as the kernel
	// holds it: see MarkKey.
	MarkField = slotField
	// MarkDatum is a mark as the datum of a map: see MarkData.
	MarkDatum = idDatum
)

// NATPostrouting is where source addresses are rewritten.
var NATPostrouting = natPostrouting

// MarkKey is a mark as a field of a key.
func MarkKey(mark uint32) string { return string(appendID(make([]byte, 0, 4), mark)) }

// MarkData is a mark as the datum of a map.
func MarkData(mark uint32) string { return idDatumBytes(mark) }

// Mark is the packet mark.
var Mark = metaValue("meta mark", expr.MetaKeyMARK)

// Priority is the packet's priority.
var Priority = priority

// MarkBits is the mark with only the bits in mask kept, and then those in set
// set.
func MarkBits(mask, set uint32) Value {
	text := fmt.Sprintf("meta mark & 0x%08x", mask|set)
	if set != 0 {
		text += fmt.Sprintf(" | 0x%08x", set)
	}
	return value{text: text, regs: 1, load: func(reg uint32) []expr.Any {
		return append(Mark.load(reg), bitwise(reg, mask&^set, set))
	}}
}

// SetMark sets the whole mark.
func SetMark(v Value) Statement {
	return statement{"meta mark set " + v.text, append(v.load(0),
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg32(0)})}
}

// MarkLookedUp is the mark that the map holds for v, whose data are MarkDatum.
func MarkLookedUp(v Value, m string) Value { return turned(LookedUp(v, m), expr.ByteorderNtoh) }

// ConstantMark is a mark to set.
func ConstantMark(mark uint32) Value {
	return value{text: fmt.Sprintf("0x%08x", mark), regs: 1, load: func(reg uint32) []expr.Any {
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
	return statement{
		text,
		append(MarkBits(mask, 0).load(0), &expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: host32(mark)}),
	}
}

// MarkHas matches packets that bear the mark's bit.
func MarkHas(bit uint32) Statement { return markHas(bit) }

// SetPriority sets the priority.
func SetPriority(id uint32) Statement {
	return statement{"meta priority set " + idText(id), []expr.Any{
		&expr.Immediate{Register: reg32(0), Data: host32(id)},
		&expr.Meta{Key: expr.MetaKeyPRIORITY, SourceRegister: true, Register: reg32(0)},
	}}
}

// HasEntered matches packets that came in by an interface, which those at the
// output hook did not.
func HasEntered() Statement {
	return statement{"iif != 0", []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIF, Register: reg32(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg32(0), Data: host32(0)},
	}}
}

// LeavesNotBy matches packets that leave by another interface.
func LeavesNotBy(name string) Statement { return oifname(name, "!= ", expr.CmpOpNeq) }

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
	return statement{text, append(append(key.load(0), data.load(key.regs)...), &expr.Dynset{
		SrcRegKey: reg32(0), SrcRegData: reg32(key.regs), SetName: m, Operation: op, Timeout: timeout,
	})}
}

// Remembering makes the map one that packets fill with up to size elements: see
// Remember.
func (s *schema) Remembering(size uint32) *Set {
	s.dynamic, s.size = true, size
	return s
}

// ReplaceTableKeeping makes the table anew, as ReplaceTable, but a map of
// packets' making stays with what is in it, if it is there in today's form.
func (w *wire) ReplaceTableKeeping(set int) error {
	present, err := w.listTable()
	if err != nil {
		return err
	}
	want := w.sets[set]
	if !slices.ContainsFunc(present.sets, func(s *nflib.Set) bool {
		return s.Name == want.Name && s.IsMap && s.Dynamic && s.HasTimeout && s.Size == want.Size &&
			s.KeyType.Bytes == want.KeyType.Bytes && s.DataType.Bytes == want.DataType.Bytes
	}) {
		w.ReplaceTable()
		return nil
	}
	w.conn.FlushTable(w.table)
	for _, s := range present.sets {
		if s.Name != want.Name {
			w.conn.DelSet(&nflib.Set{Table: w.table, Name: s.Name})
		}
	}
	for _, c := range present.chains {
		w.conn.DelChain(&nflib.Chain{Table: w.table, Name: c})
	}
	w.addSets(setID(set))
	return nil
}

// listing is what there is in a table of the kernel's.
type listing struct {
	chains []string
	sets   []*nflib.Set
}

func (w *wire) listTable() (l listing, err error) {
	tables, err := w.conn.ListTablesOfFamily(w.family.table)
	if err != nil {
		return l, fmt.Errorf("list tables: %w", err)
	}
	if !slices.ContainsFunc(tables, func(t *nflib.Table) bool { return t.Name == w.table.Name }) {
		return l, nil
	}
	chains, err := w.conn.ListChainsOfTableFamily(w.family.table)
	if err != nil {
		return l, fmt.Errorf("list chains: %w", err)
	}
	for _, c := range chains {
		if c.Table.Name == w.table.Name {
			l.chains = append(l.chains, c.Name)
		}
	}
	l.sets, err = w.conn.GetSets(w.table)
	if err != nil {
		return l, fmt.Errorf("list sets: %w", err)
	}
	return l, nil
}

// ID is what no two elements of a table share.
func (e *element) ID() (set int, key, end string) { return int(e.set), e.key, e.end }

// Name is what rules and listings call the set.
func (s *schema) Name() string { return s.name }

// PriorityBitsAre matches packets whose priority has exactly those of the bits
// in mask set that id has.
func PriorityBitsAre(mask, id uint32) Statement { return priorityIs(mask, id) }

// MarkOfData reads what MarkData writes.
func MarkOfData(data []byte) uint32 { return binary.BigEndian.Uint32(data) }

// Text is the chain as `nft list` writes it.
func (c chain) Text() string { return c.text() }
