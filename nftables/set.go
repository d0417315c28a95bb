package nftables

import (
	"strings"

	nflib "github.com/google/nftables"

	"github.com/google/nftables/binaryutil"
)

// fieldType is the type of one field of a key or datum.
type fieldType uint8

const (
	addrField fieldType = iota
	protoField
	portField
	idField
	slotField
	// idDatum is an id as the datum of a map. nft takes such data for
	// big-endian unless a set says otherwise, which the library cannot make it
	// say; so they are big-endian, and rules turn them round.
	idDatum
)

// schema is the declaration of a set or map.
type schema struct {
	id       setID
	name     string
	key      []fieldType
	data     []fieldType // nil for a set and for a verdict map
	verdicts bool
	interval bool
	dynamic  bool   // filled by the packet path: the affinity map
	shared   bool   // several Service ports may hold the same element
	size     uint32 // the most elements that packets may add; 0 for a set that they do not fill
	comment  string // for whoever reads a listing
}

// declaration is the library's form of the schema.
func (s *schema) declaration(f *family, table *nflib.Table) *nflib.Set {
	set := &nflib.Set{
		Table:         table,
		Name:          s.name,
		IsMap:         s.data != nil || s.verdicts,
		Interval:      s.interval,
		Concatenation: len(s.key) > 1 && s.interval,
		Dynamic:       s.dynamic,
		HasTimeout:    s.dynamic,
		KeyType:       datatype(f, s.key),
		KeyByteOrder:  binaryutil.BigEndian,
		Comment:       s.comment,
	}
	if len(s.key) == 1 && (s.key[0] == idField || s.key[0] == slotField) {
		set.KeyByteOrder = binaryutil.NativeEndian
	}
	if s.data != nil {
		set.DataType = datatype(f, s.data)
	}
	if s.verdicts {
		set.DataType = nflib.TypeVerdict
	}
	if s.dynamic {
		set.Size = s.size
	}
	return set
}

func datatype(f *family, fields []fieldType) nflib.SetDatatype {
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
func (t fieldType) datatype(f *family) nflib.SetDatatype {
	switch t {
	case protoField:
		return nflib.TypeInetProto
	case portField:
		return nflib.TypeInetService
	case idField, idDatum:
		return nflib.TypeClassID
	case slotField:
		return nflib.TypeMark
	}
	return f.addrType
}

// typeText is the type as nft writes it, for example
// "ipv4_addr . inet_service".
func typeText(f *family, fields []fieldType) string {
	names := make([]string, len(fields))
	for i, field := range fields {
		names[i] = field.datatype(f).Name
	}
	return strings.Join(names, " . ")
}
