package iptables

import (
	"cmp"
	"net/netip"
	"slices"

	"signalbox/proxier/plan"
)

// The digits of a key are four bits each: of the address from its end, because
// the last bits of addresses that are handed out in sequence or at random
// differ most; then the protocol; then the port from its begin, because a match
// on ports takes a range. Keys of node ports begin with the protocol.
//
// A node with more than leafSize items has children by the first digit in which
// its keys differ; other nodes are leaves and hold the items. Nothing else
// decides about a tree's shape, so that trees with the same items are equal,
// whatever the order in which those came and whatever went before them.

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
	// tail are the rules at the end of the root chain, whatever is in the tree.
	tail []string
	// uses counts how often an address was put, in a tree of addresses.
	uses map[netip.Addr]int
	// changed holds the paths whose chains may have changed: see id.
	changed map[string]struct{}
	// written are the chains as takeChanges or all returned them, by path.
	written map[string]chainSum
	rules   int // in written
}

// treeNode is a leaf where children is nil.
type treeNode struct {
	// path is what the digits of all keys below begin with. A leaf's path ends
	// with the digit by which its parent knows it.
	path     []byte
	count    int // items in and below it
	children *[fanOut]*treeNode
	items    []*item // sorted by compareItems
}

func newTree(id treeID, family plan.Family) *tree {
	return &tree{
		treeShape: treeShapes[id], family: family, top: &treeNode{},
		uses: map[netip.Addr]int{}, changed: map[string]struct{}{}, written: map[string]chainSum{},
	}
}

func compareItems(a, b *item) int {
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

// sizeClass is 0 for leaves, 1 for up to 256 items below, 2 for up to 4,096, and
// 3 for more. It never rises on the way down.
//
// Nodes of the same class that hang together are a group. The chain of its top
// node leads to each of the others, which leads to children of lower classes
// only. So a packet passes at most two chains for each class and a leaf, however
// many nodes are on its way. In a class but the last a node has at least a
// sixteenth of the items that the top node has, which bounds the rules.
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

// hasChain says whether there is anything to be written in the node's chain. All
// that is below some nodes in the middle of a group is below others of it.
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

// id is the path by which a node's chain is known: the root chain is always the
// top node's.
func (t *tree) id(n *treeNode) string {
	if n == t.top {
		return ""
	}
	return string(n.path)
}

func (t *tree) mark(path []byte) {
	if _, ok := t.changed[string(path)]; !ok {
		t.changed[string(path)] = struct{}{}
	}
}

// markNode says that the node's chain may have changed.
func (t *tree) markNode(n *treeNode) {
	if n == t.top {
		t.mark(nil)
	} else {
		t.mark(n.path)
	}
}

// find returns the node whose chain is known by path, and whether it is the top
// of its group; nil where there is no such chain.
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

// recount follows the number of items below a node on the way to a change. The
// chains of its children depend on whether they are of its group.
func (t *tree) recount(n *treeNode, by int) {
	before := n.sizeClass()
	n.count += by
	t.markNode(n)
	if n.sizeClass() != before {
		for child := range n.eachChild {
			t.markNode(child)
		}
	}
}

// put adds it to the tree, and returns what it replaces, if anything.
func (t *tree) put(it *item) (old *item) {
	if t.keys == addresses {
		if t.uses[it.key.Addr]++; t.uses[it.key.Addr] > 1 {
			return nil
		}
	}
	digits := t.digits(it.key)
	if leaf := t.leaf(digits); leaf != nil {
		if i, ok := leaf.search(it); ok {
			old, leaf.items[i] = leaf.items[i], it
			t.markNode(leaf)
			return old
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
	i, _ := leaf.search(it)
	leaf.items = slices.Insert(leaf.items, i, it)
	t.recount(leaf, 1)
	if leaf.count > leafSize {
		t.split(leaf)
	}
	return nil
}

// leaf returns the leaf in which a key with these digits would be, or nil.
func (t *tree) leaf(digits []byte) *treeNode {
	n := t.top
	for n != nil && n.children != nil {
		n = n.children[digits[len(n.path)]]
	}
	return n
}

func (n *treeNode) search(it *item) (int, bool) {
	return slices.BinarySearchFunc(n.items, it, compareItems)
}

// fork puts a node with this path above another one.
func (t *tree) fork(at **treeNode, path []byte) {
	below := *at
	t.markNode(below)
	*at = &treeNode{path: path, count: below.count, children: &[fanOut]*treeNode{}}
	(*at).children[below.path[len(path)]] = below
	t.markNode(below)
}

// split gives a leaf children, unless its keys are all the same.
func (t *tree) split(n *treeNode) {
	first := t.digits(n.items[0].key)
	common := len(first)
	for _, it := range n.items[1:] {
		common = min(common, commonDigits(first, t.digits(it.key)))
	}
	if common == len(first) {
		return
	}
	n.path, n.children = first[:common], &[fanOut]*treeNode{}
	t.markNode(n)
	for _, it := range n.items {
		digits := t.digits(it.key)
		child := n.children[digits[common]]
		if child == nil {
			child = &treeNode{path: digits[:common+1]}
			n.children[digits[common]] = child
		}
		child.items = append(child.items, it)
		t.recount(child, 1)
	}
	n.items = nil
}

// drop removes the item with the same key and owner and returns it; nil if
// there is none. One that was put more than once stays.
func (t *tree) drop(it *item) (old *item) {
	digits := t.digits(it.key)
	leaf := t.leaf(digits)
	if leaf == nil {
		return nil
	}
	i, ok := leaf.search(it)
	if !ok {
		return nil
	}
	old = leaf.items[i]
	if t.keys == addresses {
		if t.uses[it.key.Addr]--; t.uses[it.key.Addr] > 0 {
			return old
		}
		delete(t.uses, it.key.Addr)
	}
	leaf.items = slices.Delete(leaf.items, i, i+1)
	t.shrink(&t.top, digits, 0)
	return old
}

// shrink counts one item less on the way down, and makes what is left what it
// would be had the item never been there.
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
	t.markNode(only)
	*at = only
	if only.children == nil {
		only.path = digits[:depth]
	}
	t.markNode(only)
}

// merge makes a node a leaf.
func (t *tree) merge(n *treeNode, path []byte) {
	var collect func(*treeNode)
	collect = func(below *treeNode) {
		t.markNode(below)
		n.items = append(n.items, below.items...)
		for child := range below.eachChild {
			collect(child)
		}
	}
	for child := range n.eachChild {
		collect(child)
	}
	n.path, n.children = path, nil
	t.markNode(n)
	slices.SortFunc(n.items, compareItems)
}
