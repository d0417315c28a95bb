// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"signalbox/proxier/plan"
)

// Element is one element of a set or map, in the kernel's bytes. Without End it is no
// interval.
type Element struct {
	Set      SetID
	Key, End string
	Data     string
	Chain    string // of a verdict map: to jump to
	Comment  string
}

// ElementID identifies an element in its table.
type ElementID struct {
	Set      SetID
	Key, End string
}

// ID returns what identifies the element in its table.
func (e *Element) ID() ElementID { return ElementID{e.Set, e.Key, e.End} }

// LibraryElements appends the library's form of an element of the set. An interval over one plain
// field is two elements in nf_tables, its start and the first value after it.
func (s *Set) LibraryElements(e *Element, list []nftables.SetElement) []nftables.SetElement {
	out := nftables.SetElement{Key: []byte(e.Key), Comment: e.Comment}
	if e.Data != "" {
		out.Val = []byte(e.Data)
	}
	if s.Verdicts {
		out.VerdictData = &expr.Verdict{Kind: expr.VerdictJump, Chain: e.Chain}
	}
	if !s.Interval {
		return append(list, out)
	}
	if len(s.Key) > 1 {
		out.KeyEnd = []byte(e.End)
		return append(list, out)
	}
	after, overflow := successor(e.End)
	if overflow {
		out.IntervalOpen = true
		return append(list, out)
	}
	return append(list, out, nftables.SetElement{Key: after, IntervalEnd: true})
}

// successor adds one to a big-endian number.
func successor(s string) (b []byte, overflow bool) {
	b = []byte(s)
	for i := len(b) - 1; i >= 0; i-- {
		b[i]++
		if b[i] != 0 {
			return b, false
		}
	}
	return b, true
}

// ElementText is the element as `nft list` writes it.
func (s *Set) ElementText(e *Element, f *IPFamily) string {
	var b strings.Builder
	b.WriteString(FieldsText(f, s.Key, e.Key, e.End))
	if e.Comment != "" {
		fmt.Fprintf(&b, " comment %q", e.Comment)
	}
	switch {
	case s.Verdicts:
		b.WriteString(" : jump " + e.Chain)
	case s.Data != nil:
		b.WriteString(" : " + FieldsText(f, s.Data, e.Data, ""))
	}
	return b.String()
}

// FieldsText prints concatenated fields. With an end, it prints an address that differs
// in end as the prefix between the two.
func FieldsText(f *IPFamily, fields []Field, value, end string) string {
	parts := make([]string, len(fields))
	for i, field := range fields {
		n := field.Size(f)
		parts[i] = field.text(value[:n])
		if field == AddrField && end != "" && value[:n] != end[:n] {
			parts[i] = prefixText(value[:n], end[:n])
		}
		value = value[n:]
		if end != "" {
			end = end[n:]
		}
	}
	return strings.Join(parts, " . ")
}

// prefixText prints a prefix by its first and last address.
func prefixText(start, end string) string {
	bits := 0
	for i := range len(start) {
		differ := start[i] ^ end[i]
		for mask := byte(0x80); mask != 0 && differ&mask == 0; mask >>= 1 {
			bits++
		}
		if differ != 0 {
			break
		}
	}
	addr, _ := netip.AddrFromSlice([]byte(start))
	return netip.PrefixFrom(addr, bits).String()
}

// Size is the field's length in a key, padding included.
func (t Field) Size(f *IPFamily) int {
	if t == AddrField {
		return f.AddrLen
	}
	return 4
}

func (t Field) text(s string) string {
	switch t {
	case ProtoField:
		return plan.Protocol(s[0]).String()
	case PortField:
		return fmt.Sprint(binary.BigEndian.Uint16([]byte(s)))
	case ClassIDField:
		return ClassIDText(binary.NativeEndian.Uint32([]byte(s)))
	case MarkDatum:
		return ClassIDText(binary.BigEndian.Uint32([]byte(s)))
	case MarkField:
		return fmt.Sprintf("%#08x", binary.NativeEndian.Uint32([]byte(s)))
	}
	addr, _ := netip.AddrFromSlice([]byte(s))
	return addr.String()
}

// ClassIDText prints an id as nft prints a priority.
func ClassIDText(id uint32) string {
	if id == 0 {
		return "none"
	}
	return fmt.Sprintf("%x:%x", id>>16, id&0xffff)
}

// MarkKey is a packet mark as the key of an element.
func MarkKey(id uint32) string { return string(AppendID(make([]byte, 0, 4), id)) }

// MarkData is a packet mark as the datum of an element.
func MarkData(id uint32) string {
	return string(binary.BigEndian.AppendUint32(make([]byte, 0, 4), id))
}

// maxComment is the longest comment that nft itself would write.
const maxComment = 127

// CommentText makes a comment of a name. A file may have names that the API server would
// refuse, and a listing must stay readable.
func CommentText(name string) string {
	clean := strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			return '?'
		}
		return c
	}, name)
	return clean[:min(len(clean), maxComment)]
}
