// SPDX-License-Identifier: Apache-2.0

package nfttest

import (
	"cmp"
	"encoding/binary"
	"maps"
	"slices"
	"strings"
	"syscall"

	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nltest"
	"golang.org/x/sys/unix"
)

// list finds what a request for a listing asks for, in the form of messages' data.
func (r ruleset) list(m netlink.Message) (found [][]byte, errno syscall.Errno) {
	table, request := head(m)
	kind := kindOf(m) - 1 // of the message that makes such objects
	set := r.objects[table.of(unix.NFT_MSG_NEWSET, request.text(unix.NFTA_SET_ELEM_LIST_SET))]
	chain := r.objects[table.of(unix.NFT_MSG_NEWCHAIN, request.text(unix.NFTA_RULE_CHAIN))]
	switch {
	case kind == unix.NFT_MSG_NEWSETELEM && set != nil:
		return set.pages(m.Data), 0
	case kind == unix.NFT_MSG_NEWSETELEM, kind == unix.NFT_MSG_NEWSET && r.objects[table] == nil:
		return nil, unix.ENOENT
	case kind == unix.NFT_MSG_NEWRULE && chain != nil:
		for _, rule := range chain.rules {
			found = append(found, rule.message)
		}
		return found, 0
	}
	ids := slices.SortedFunc(maps.Keys(r.objects), func(a, b objectID) int { return cmp.Compare(r.objects[a].number, r.objects[b].number) })
	for _, id := range ids {
		if id.kind == kind && (table.family == 0 || id.family == table.family) && (table.table == "" || id.table == table.table) &&
			(isDump(m) || id.name == request.text(unix.NFTA_OBJ_NAME)) {
			found = append(found, r.objects[id].message)
		}
	}
	if found == nil && !isDump(m) {
		return nil, unix.ENOENT
	}
	return found, 0
}

// pages are the elements by key, as many to a message as an attribute has room for.
func (s *set) pages(request []byte) (list [][]byte) {
	ids := slices.SortedFunc(maps.Keys(s.elements), func(a, b elementID) int { return cmp.Compare(a.key+a.end, b.key+b.end) })
	for page := range slices.Chunk(ids, 100) {
		var items []netlink.Attribute
		for _, id := range page {
			items = append(items, netlink.Attribute{Type: unix.NFTA_LIST_ELEM, Data: s.elements[id].message})
		}
		list = append(list, encode(request, netlink.Attribute{
			Type: unix.NFTA_SET_ELEM_LIST_ELEMENTS, Data: nltest.MustMarshalAttributes(items),
		}))
	}
	return list
}

// answer makes messages of what was found. A dump ends with a message of its own.
func answer(request netlink.Message, found [][]byte) (list []netlink.Message) {
	m := request
	m.Header.Type, m.Header.Flags = m.Header.Type-1, 0 // NFT_MSG_NEWSET answers NFT_MSG_GETSET
	if isDump(request) {
		m.Header.Flags = netlink.Multi
	}
	for _, m.Data = range found {
		list = append(list, m)
	}
	if isDump(request) {
		m.Header.Type, m.Data = netlink.Done, nil
		list = append(list, m)
	}
	return list
}

func isDump(m netlink.Message) bool { return m.Header.Flags&netlink.Dump == netlink.Dump }

// isListing says whether messages of a kind ask for what is there: every third does.
func isListing(kind int) bool { return kind%3 == unix.NFT_MSG_GETTABLE }

// kindOf is the message's number within nf_tables.
func kindOf(m netlink.Message) int { return int(m.Header.Type) & 0xff }

// nfgenmsg is the length of struct nfgenmsg, whose first byte is the address family.
const nfgenmsg = 4

// head is the table that a message names, and the message's attributes.
func head(m netlink.Message) (table objectID, request attributes) {
	request = parse(m.Data[nfgenmsg:])
	return objectID{m.Data[0], request.text(unix.NFTA_TABLE_NAME), unix.NFT_MSG_NEWTABLE, ""}, request
}

// encode is the data of a message of the same family as the request.
func encode(request []byte, list ...netlink.Attribute) []byte {
	return append(request[:nfgenmsg:nfgenmsg], nltest.MustMarshalAttributes(list)...)
}

// without is a message without one of its attributes.
func without(message []byte, kind uint16) []byte {
	return encode(message, slices.DeleteFunc(unmarshal(message[nfgenmsg:]), func(a netlink.Attribute) bool { return a.Type == kind })...)
}

// attributes are those of a message or of an attribute, by type without flags.
type attributes map[uint16][]byte

func parse(b []byte) attributes {
	a := attributes{}
	for _, attribute := range unmarshal(b) {
		a[attribute.Type] = attribute.Data
	}
	return a
}

// unmarshal panics on bytes that the library cannot have made.
func unmarshal(b []byte) []netlink.Attribute {
	list, err := netlink.UnmarshalAttributes(b)
	if err != nil {
		panic("nfttest: malformed attributes: " + err.Error())
	}
	for i := range list {
		list[i].Type &^= unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER
	}
	return list
}

func (a attributes) text(kind uint16) string { return strings.TrimRight(string(a[kind]), "\x00") }

// number is a 32-bit number; 0 if there is none.
func (a attributes) number(kind uint16) uint32 {
	if len(a[kind]) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(a[kind])
}

// verdictChain is the chain to which a verdict leads, or "".
func verdictChain(data []byte) string {
	return parse(parse(data)[unix.NFTA_DATA_VERDICT]).text(unix.NFTA_VERDICT_CHAIN)
}
