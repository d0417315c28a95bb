// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"strings"

	"github.com/google/nftables"

	"github.com/google/nftables/binaryutil"
)

// SetID is the number of a set: its place in the list of its table's sets.
type SetID uint8

// Field is the type of one field of a key or datum.
type Field uint8

// The types of fields in keys and data.
const (
	AddrField Field = iota
	ProtoField
	PortField
	ClassIDField
	MarkField
	// MarkDatum is a mark as the datum of a map. nft reads such data as big-endian
	// unless the set says otherwise, which the library cannot write. So these marks are
	// big-endian, and rules swap their bytes.
	MarkDatum
)

// Set is the declaration of a set or map.
type Set struct {
	Name     string
	Key      []Field
	Data     []Field // nil for a set and for a verdict map
	Verdicts bool
	Interval bool
	Dynamic  bool   // packets fill it
	Shared   bool   // an element may have several holders, and has no data
	Size     uint32 // how many elements packets can add, if Dynamic
	Comment  string // for readers of a listing
}

// declaration is the library's form of the set.
func (s *Set) declaration(f *IPFamily, table *nftables.Table) *nftables.Set {
	set := &nftables.Set{
		Table:         table,
		Name:          s.Name,
		IsMap:         s.Data != nil || s.Verdicts,
		Interval:      s.Interval,
		Concatenation: len(s.Key) > 1 && s.Interval,
		Dynamic:       s.Dynamic,
		HasTimeout:    s.Dynamic,
		KeyType:       datatype(f, s.Key),
		KeyByteOrder:  binaryutil.BigEndian,
		Comment:       s.Comment,
	}
	if len(s.Key) == 1 && (s.Key[0] == ClassIDField || s.Key[0] == MarkField) {
		set.KeyByteOrder = binaryutil.NativeEndian
	}
	if s.Data != nil {
		set.DataType = datatype(f, s.Data)
	}
	if s.Verdicts {
		set.DataType = nftables.TypeVerdict
	}
	if s.Dynamic {
		set.Size = s.Size
	}
	return set
}

func datatype(f *IPFamily, fields []Field) nftables.SetDatatype {
	types := make([]nftables.SetDatatype, len(fields))
	for i, field := range fields {
		types[i] = field.datatype(f)
	}
	if len(types) == 1 {
		return types[0]
	}
	return nftables.MustConcatSetType(types...)
}

// datatype returns the nft type. An id is a "classid", the type of the priority field
// that carries it. nft prints it as two hexadecimal numbers with a colon between them. A
// slot is a "mark", because nft cannot print a plain integer in a concatenation.
func (t Field) datatype(f *IPFamily) nftables.SetDatatype {
	switch t {
	case ProtoField:
		return nftables.TypeInetProto
	case PortField:
		return nftables.TypeInetService
	case ClassIDField, MarkDatum:
		return nftables.TypeClassID
	case MarkField:
		return nftables.TypeMark
	}
	return f.addrType
}

// typeText is the type as nft writes it, for example
// "ipv4_addr . inet_service".
func typeText(f *IPFamily, fields []Field) string {
	names := make([]string, len(fields))
	for i, field := range fields {
		names[i] = field.datatype(f).Name
	}
	return strings.Join(names, " . ")
}

// NewSet declares a set, or with data a map.
func NewSet(name string, key, data []Field, comment string) *Set {
	return &Set{Name: name, Key: key, Data: data, Comment: comment}
}

// OfRanges makes it a set of ranges.
func (s *Set) OfRanges() *Set {
	s.Interval = true
	return s
}

// Remembering makes it a map that packets fill with up to size elements: see Remember.
func (s *Set) Remembering(size uint32) *Set {
	s.Dynamic, s.Size = true, size
	return s
}
