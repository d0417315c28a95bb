// SPDX-License-Identifier: Apache-2.0

package nfttest

import (
	"syscall"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// set is a set or map.
type set struct {
	flags    uint32
	size     int // the most elements; 0 for no limit
	elements map[elementID]element
}

// elementID is what no two elements of a set share. An interval over one field is two
// elements, its start and the first key after it, which closes it.
type elementID struct {
	key, end string
	closes   bool
}

type element struct {
	data    string
	chain   string // of a verdict map
	message []byte
}

func newSet(request attributes) set {
	return set{
		request.number(unix.NFTA_SET_FLAGS),
		int(parse(request[unix.NFTA_SET_DESC]).number(unix.NFTA_SET_DESC_SIZE)),
		map[elementID]element{},
	}
}

// changeElements adds or deletes the elements that a request lists. To delete without a
// list flushes the set.
func (t *transaction) changeElements(id objectID, request attributes, m netlink.Message) syscall.Errno {
	s := t.objects[id]
	if s == nil {
		return unix.ENOENT
	}
	deletes := kindOf(m) == unix.NFT_MSG_DELSETELEM
	if deletes && len(request[unix.NFTA_SET_ELEM_LIST_ELEMENTS]) == 0 {
		t.changed = t.changed || len(s.elements) > 0
		clear(s.elements)
	}
	for _, item := range unmarshal(request[unix.NFTA_SET_ELEM_LIST_ELEMENTS]) {
		a := parse(item.Data)
		key := elementID{
			key:    string(parse(a[unix.NFTA_SET_ELEM_KEY])[unix.NFTA_DATA_VALUE]),
			end:    string(parse(a[nftables.NFTA_SET_ELEM_KEY_END])[unix.NFTA_DATA_VALUE]),
			closes: a.number(unix.NFTA_SET_ELEM_FLAGS)&unix.NFT_SET_ELEM_INTERVAL_END != 0,
		}
		e := element{string(parse(a[unix.NFTA_SET_ELEM_DATA])[unix.NFTA_DATA_VALUE]), verdictChain(a[unix.NFTA_SET_ELEM_DATA]), item.Data}
		errno := syscall.Errno(0)
		if deletes {
			errno = t.deleteElement(s, key)
		} else {
			errno = t.addElement(s, id, key, e)
		}
		if errno != 0 {
			return errno
		}
	}
	return 0
}

func (t *transaction) deleteElement(s *object, key elementID) syscall.Errno {
	if s.has(nftables.NFT_SET_CONCAT) {
		key = s.around(key)
	}
	if _, exists := s.elements[key]; !exists {
		return unix.ENOENT
	}
	delete(s.elements, key)
	t.changed = true
	return 0
}

func (t *transaction) addElement(s *object, id objectID, key elementID, e element) syscall.Errno {
	if e.chain != "" {
		if errno := t.mayRefer(id.of(unix.NFT_MSG_NEWCHAIN, e.chain)); errno != 0 {
			return errno
		}
	}
	switch old, exists := s.elements[key]; {
	case exists && old.data == e.data && old.chain == e.chain:
		return 0
	case exists, s.overlaps(key):
		return unix.EEXIST
	case s.size > 0 && len(s.elements) >= s.size:
		return unix.ENFILE
	}
	s.elements[key], t.changed = e, true
	return 0
}

func (s *set) has(flag uint32) bool { return s.flags&flag != 0 }

// overlaps says whether the element is part of an interval that Linux sees to overlap one
// that is there.
func (s *set) overlaps(id elementID) bool {
	var before, after *elementID // the next bounds of intervals
	for other := range s.elements {
		switch isBefore := other.key < id.key || other.key == id.key && other.closes; {
		case s.has(nftables.NFT_SET_CONCAT):
			if other.contains(id.key) || other.contains(id.end) {
				return true
			}
		case isBefore && (before == nil || other.key > before.key || other.key == before.key && before.closes):
			before = &other
		case !isBefore && (after == nil || other.key < after.key || other.key == after.key && other.closes):
			after = &other
		}
	}
	if !s.has(unix.NFT_SET_INTERVAL) || s.has(nftables.NFT_SET_CONCAT) {
		return false
	}
	isInside := before != nil && !before.closes
	return isInside != id.closes || id.closes && after != nil && after.closes
}

// around is the concatenation of ranges that holds the start of another, by which alone
// Linux finds what it deletes.
func (s *set) around(id elementID) elementID {
	for other := range s.elements {
		if other.contains(id.key) {
			return other
		}
	}
	return id
}

// contains says whether a key lies in a concatenation of ranges. Fields are multiples of
// four bytes; a range of addresses is a prefix, which compares like four bytes at a time.
func (id elementID) contains(key string) bool {
	for i := 0; i < len(key); i += 4 {
		if part := key[i : i+4]; part < id.key[i:i+4] || part > id.end[i:i+4] {
			return false
		}
	}
	return true
}
