// SPDX-License-Identifier: Apache-2.0

package kernel

import "encoding/binary"

// attributes are encoded netlink attributes: length, type, and a value that is padded to four
// bytes. The library's encoder makes a dozen allocations for each request, and each
// destination is a request.
type attributes []byte

func (a *attributes) header(kind uint16, length int) {
	*a = binary.NativeEndian.AppendUint16(*a, uint16(4+length))
	*a = binary.NativeEndian.AppendUint16(*a, kind)
}

func (a *attributes) pad() {
	for len(*a)%4 != 0 {
		*a = append(*a, 0)
	}
}

func (a *attributes) bytes(kind uint16, value []byte) {
	a.header(kind, len(value))
	*a = append(*a, value...)
	a.pad()
}

func (a *attributes) text(kind uint16, value string) {
	a.header(kind, len(value)+1)
	*a = append(*a, value...)
	*a = append(*a, 0)
	a.pad()
}

func (a *attributes) uint16(kind, value uint16) {
	a.header(kind, 2)
	*a = binary.NativeEndian.AppendUint16(*a, value)
	a.pad()
}

func (a *attributes) uint32(kind uint16, value uint32) {
	a.header(kind, 4)
	*a = binary.NativeEndian.AppendUint32(*a, value)
}

// nested adds an attribute that contains the attributes of fill.
func (a *attributes) nested(kind uint16, fill func(*attributes)) {
	start := len(*a)
	a.header(nested|kind, 0)
	fill(a)
	binary.NativeEndian.PutUint16((*a)[start:], uint16(len(*a)-start))
}

// nested is NLA_F_NESTED.
const nested = 1 << 15
