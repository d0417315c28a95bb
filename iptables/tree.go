// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"cmp"
	"net/netip"
	"slices"

	"signalbox/proxier/plan"
)

// A dispatch tree leads a packet to the rules for its destination. The digits
// of a key are four bits each: of the address from its end, because the last
// bits of addresses that are assigned in sequence or at random differ most;
// then the protocol; then the port from its start, because a match on ports
// takes a range. Keys of node ports begin with the protocol.
//
// A node with more than leafSize entries has children by the first digit in
// which its keys differ; other nodes are leaves and hold the entries. Nothing
// else decides about a tree's shape. So trees with the same entries are equal,
// in whatever order those came and whatever was there before.

const (
	fanOut    = 16
	leafSize  = 16
	maxDigits = 32 + 1 + 4 // an IPv6 address, the protocol, the port
	// maxSizeClass bounds the number of chains: see sizeClass.
	maxSizeClass = 3
)

type tree struct {
	treeShape
	family plan.Family
	top    *treeNode
	// rootRules are in the root chain, whatever is in the tree.
	rootRules rootRules
	// uses counts how often an address was put, in a tree of addresses.
	uses map[netip.Addr]int
	// dirty holds the paths whose chains may have changed: see id.
	dirty map[string]struct{}
}

// treeNode is a leaf if children is nil.
type treeNode struct {
	// path is what the digits of all keys below begin with. A leaf's path ends
	// with the digit that leads its parent to it.
	path     []byte
	count    int // entries in and below it
	children *[fanOut]*treeNode
	entries  []*entry // sorted by compareEntries
}

func newTree(id treeID, family plan.Family) *tree {
	t := &tree{
		treeShape: treeShapes[id], family: family, top: &treeNode{},
		uses: map[netip.Addr]int{}, dirty: map[string]struct{}{},
	}
	t.markDirty(t.top)
	return t
}

func compareEntries(a, b *entry) int {
	return cmp.Or(a.key.Addr.Compare(b.key.Addr), cmp.Compare(a.key.Port, b.key.Port),
		cmp.Compare(a.key.Protocol, b.key.Protocol), a.owner.Compare(b.owner))
}

// digits are those of key, of the same number for every key of a tree.
func (t *tree) digits(key plan.FrontendKey) []byte {
	out := make([]byte, 0, maxDigits)
	if t.keys != ports {
		addr := key.Addr.AsSlice()
		for i := len(addr) - 1; i >= 0; i-- {
			out = append(out, addr[i]&0xf, addr[i]>>4)
		}
	}
	if t.keys == addresses {
		return out
	}
	out = append(out, byte(slices.Index(plan.Protocols, key.Protocol)))
	for shift := 12; shift >= 0; shift -= 4 {
		out = append(out, byte(key.Port>>shift)&0xf)
	}
	return out
}

func (t *tree) addressDigits() int {
	if t.keys == ports {
		return 0
	}
	return t.family.HostBits() / 4
}

func commonDigits(a, b []byte) int {
	n := 0
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}

// sizeClass is 0 for leaves, 1 for up to 256 entries below, 2 for up to 4,096,
// and 3 for more. It never rises on the way down.
//
// Connected nodes of the same class are a group. The chain of its top node
// leads to each of the others, and these lead to children of lower classes
// only. So a packet passes at most two chains for each class and a leaf, however
// many nodes are on its way. In each class but the last, a node has at least a
// sixteenth of the top node's entries. That bounds the number of rules.
func (n *treeNode) sizeClass() int {
	if n.children == nil {
		return 0
	}
	class := 1
	for limit := leafSize * fanOut; n.count > limit && class < maxSizeClass; limit *= fanOut {
		class++
	}
	return class
}

func (n *treeNode) eachChild(yield func(*treeNode) bool) {
	if n.children == nil {
		return
	}
	for _, child := range n.children {
		if child != nil && !yield(child) {
			return
		}
	}
}

// eachOfGroup visits the nodes below that are of the same group and have a
// chain, those farther down first.
func (n *treeNode) eachOfGroup(visit func(*treeNode)) {
	for child := range n.eachChild {
		if child.sizeClass() == n.sizeClass() {
			child.eachOfGroup(visit)
			if child.hasChain(false) {
				visit(child)
			}
		}
	}
}

// hasChain says whether the node's chain has rules. Nodes in the middle of a
// group may have none: all that is below them is below others of the group.
func (n *treeNode) hasChain(leads bool) bool {
	if leads || n.children == nil {
		return true
	}
	for child := range n.eachChild {
		if child.sizeClass() < n.sizeClass() {
			return true
		}
	}
	return false
}

// id is the path in the name of a node's chain: the root chain is always the
// top node's.
func (t *tree) id(n *treeNode) []byte {
	if n == t.top {
		return nil
	}
	return n.path
}

// markDirty says that the node's chain may have changed.
func (t *tree) markDirty(n *treeNode) {
	path := t.id(n)
	if _, ok := t.dirty[string(path)]; !ok {
		t.dirty[string(path)] = struct{}{}
	}
}

// find returns the node whose chain has the path, and whether it leads its
// group; nil if there is no such chain.
func (t *tree) find(path string) (n *treeNode, leads bool) {
	if path == "" {
		return t.top, true
	}
	n, leads = t.top, true
	for n != nil && n.children != nil && len(n.path) < len(path) {
		child := n.children[path[len(n.path)]]
		leads = child != nil && child.sizeClass() < n.sizeClass()
		n = child
	}
	if n == nil || n == t.top || string(n.path) != path || !n.hasChain(leads) {
		return nil, false
	}
	return n, leads
}

// recount changes the number of entries below a node. The chains of its
// children depend on whether they are of its group.
func (t *tree) recount(n *treeNode, by int) {
	before := n.sizeClass()
	n.count += by
	t.markDirty(n)
	if n.sizeClass() != before {
		for child := range n.eachChild {
			t.markDirty(child)
		}
	}
}

// put adds an entry to the tree, or replaces the one with its key and owner.
func (t *tree) put(e *entry) {
	if t.keys == addresses {
		if t.uses[e.key.Addr]++; t.uses[e.key.Addr] > 1 {
			return
		}
	}
	digits := t.digits(e.key)
	if leaf := t.leaf(digits); leaf != nil {
		if i, exists := leaf.search(e); exists {
			leaf.entries[i] = e
			t.markDirty(leaf)
			return
		}
	}
	at := &t.top
	for depth := 0; *at == nil || (*at).children != nil; {
		if *at == nil {
			*at = &treeNode{path: digits[:depth]}
			break
		}
		if common := commonDigits((*at).path, digits); common < len((*at).path) {
			t.fork(at, digits[:common])
		}
		n := *at
		t.recount(n, 1)
		at, depth = &n.children[digits[len(n.path)]], len(n.path)+1
	}
	leaf := *at
	i, _ := leaf.search(e)
	leaf.entries = slices.Insert(leaf.entries, i, e)
	t.recount(leaf, 1)
	if leaf.count > leafSize {
		t.split(leaf)
	}
}

// leaf returns the leaf in which a key with these digits would be, or nil.
func (t *tree) leaf(digits []byte) *treeNode {
	n := t.top
	for n != nil && n.children != nil {
		n = n.children[digits[len(n.path)]]
	}
	return n
}

func (n *treeNode) search(e *entry) (int, bool) {
	return slices.BinarySearchFunc(n.entries, e, compareEntries)
}

// fork puts a node with this path above another one.
func (t *tree) fork(at **treeNode, path []byte) {
	below := *at
	t.markDirty(below)
	*at = &treeNode{path: path, count: below.count, children: &[fanOut]*treeNode{}}
	(*at).children[below.path[len(path)]] = below
	t.markDirty(below)
}

// split gives a leaf children, unless its keys are all the same.
func (t *tree) split(n *treeNode) {
	first := t.digits(n.entries[0].key)
	common := len(first)
	for _, e := range n.entries[1:] {
		common = min(common, commonDigits(first, t.digits(e.key)))
	}
	if common == len(first) {
		return
	}
	n.path, n.children = first[:common], &[fanOut]*treeNode{}
	t.markDirty(n)
	for _, e := range n.entries {
		digits := t.digits(e.key)
		child := n.children[digits[common]]
		if child == nil {
			child = &treeNode{path: digits[:common+1]}
			n.children[digits[common]] = child
		}
		child.entries = append(child.entries, e)
		t.recount(child, 1)
	}
	n.entries = nil
}

// drop removes the entry with the same key and owner, if there is one. One
// that was put more than once stays.
func (t *tree) drop(e *entry) {
	digits := t.digits(e.key)
	leaf := t.leaf(digits)
	if leaf == nil {
		return
	}
	i, exists := leaf.search(e)
	if !exists {
		return
	}
	if t.keys == addresses {
		if t.uses[e.key.Addr]--; t.uses[e.key.Addr] > 0 {
			return
		}
		delete(t.uses, e.key.Addr)
	}
	leaf.entries = slices.Delete(leaf.entries, i, i+1)
	t.shrink(&t.top, digits, 0)
}

// shrink counts one entry less on the way down. It gives the tree the shape
// that it would have if the entry had never been there.
func (t *tree) shrink(at **treeNode, digits []byte, depth int) {
	n := *at
	t.recount(n, -1)
	switch {
	case n.children == nil:
		if n.count == 0 && n != t.top {
			*at = nil
		}
		return
	case n.count <= leafSize:
		t.merge(n, digits[:depth])
		return
	}
	t.shrink(&n.children[digits[len(n.path)]], digits, len(n.path)+1)
	var only *treeNode
	for child := range n.eachChild {
		if only != nil {
			return
		}
		only = child
	}
	t.markDirty(only)
	*at = only
	if only.children == nil {
		only.path = digits[:depth]
	}
	t.markDirty(only)
}

// merge makes a node a leaf.
func (t *tree) merge(n *treeNode, path []byte) {
	var collect func(*treeNode)
	collect = func(below *treeNode) {
		t.markDirty(below)
		n.entries = append(n.entries, below.entries...)
		for child := range below.eachChild {
			collect(child)
		}
	}
	for child := range n.eachChild {
		collect(child)
	}
	n.path, n.children = path, nil
	t.markDirty(n)
	slices.SortFunc(n.entries, compareEntries)
}
