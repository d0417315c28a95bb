package nft

import (
	"strings"

	nflib "github.com/google/nftables"

	"github.com/google/nftables/binaryutil"
)

// SetID is the number of a set: its place in the list of its table's sets.
type SetID uint8

// fieldType is the type of one field of a key or datum.
type Field uint8

const (
	AddrField Field = iota
	ProtoField
	PortField
	ClassIDField
	MarkField
	// idDatum is an id as the datum of a map. nft takes such data for
	// big-endian unless a set says otherwise, which the library cannot make it
	// say; so they are big-endian, and rules turn them round.
	MarkDatum
)

// schema is the declaration of a set or map.
type Set struct {
	ID       SetID
	Name     string
	Key      []Field
	Data     []Field // nil for a set and for a verdict map
	Verdicts bool
	Interval bool
	Dynamic  bool   // filled by the packet path: the affinity map
	Shared   bool   // several Service ports may hold the same element
	Size     uint32 // the most elements that packets may add; 0 for a set that they do not fill
	Comment  string // for whoever reads a listing
}

// declaration is the library's form of the schema.
func (s *Set) declaration(f *IPFamily, table *nflib.Table) *nflib.Set {
	set := &nflib.Set{
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
		set.DataType = nflib.TypeVerdict
	}
	if s.Dynamic {
		set.Size = s.Size
	}
	return set
}

func datatype(f *IPFamily, fields []Field) nflib.SetDatatype {
	types := make([]nflib.SetDatatype, len(fields))
	for i, field := range fields {
		types[i] = field.datatype(f)
	}
	if len(types) == 1 {
		return types[0]
	}
	return nflib.MustConcatSetType(types...)
}

// datatype returns the nft type. An id is a "classid" because that is the type
// of the priority field that carries it; nft prints it as two hexadecimal
// numbers with a colon between. A slot is a "mark" for want of a plain integer
// that nft can print within a concatenation.
func (t Field) datatype(f *IPFamily) nflib.SetDatatype {
	switch t {
	case ProtoField:
		return nflib.TypeInetProto
	case PortField:
		return nflib.TypeInetService
	case ClassIDField, MarkDatum:
		return nflib.TypeClassID
	case MarkField:
		return nflib.TypeMark
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
