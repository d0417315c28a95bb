package iptables

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"

	"signalbox/proxier"
)

// A tree leads a packet to the rules for its destination in steps of at most
// fanOut rules each. Every branch looks at one digit (four bits) of the
// destination: of the address from its end, because the last bits of addresses
// that are handed out in sequence or at random differ most; then the protocol;
// then the port from its begin, because a match on ports takes a range. Trees
// of node ports begin with the protocol.
//
// Where a branch has no more than leafSize items it is a leaf and holds their
// rules. Nothing else decides about its shape, so that trees with the same
// items are equal, whatever the order in which those came and whatever went
// before them.

const (
	fanOut    = 16
	leafSize  = 16
	maxDigits = 32 + 1 + 4 // an IPv6 address, the protocol, the port
)

// treeID names a tree.
type treeID uint8

const (
	servicesTree      treeID = iota // nat: addresses to endpoints
	nodePortsTree                   // nat: node ports to endpoints
	emptyTree                       // filter: cluster IPs without endpoints
	externalTree                    // filter: other addresses without endpoints
	externalPortsTree               // filter: node ports without endpoints
	firewallTree                    // filter: addresses with source ranges
	healthTree                      // filter: health check node ports
	hairpinTree                     // nat: endpoints that may be their own clients
	treeCount
)

// treeShape says where a tree hangs and how its chains are called.
type treeShape struct {
	table  table
	root   string
	prefix string
	keys   keyKind
	// above is the number of trees that one can come to from this root.
	above int
}

// keyKind says what trees look at in keys.
type keyKind uint8

const (
	frontends keyKind = iota // address, protocol and port
	ports                    // protocol and port
	// addresses alone. Any number of ServicePorts may put an item there, which
	// is the same for all of them and belongs to nobody.
	addresses
)

const (
	externalPortsChain = externalPrefix + "0NP"
	hairpinChain       = clusterPrefix + "0HP"
)

// treeShapes keep within prefixes that kube-proxy knows. The 0 after these is
// in no hash, and sorts before all of them: see script.table.
var treeShapes = [treeCount]treeShape{
	servicesTree:      {nat, servicesChain, clusterPrefix + "0IP-", frontends, 1},
	nodePortsTree:     {nat, nodePortsChain, clusterPrefix + "0NP-", ports, 0},
	emptyTree:         {filter, servicesChain, clusterPrefix + "0IP-", frontends, 2},
	externalTree:      {filter, externalServicesChain, externalPrefix + "0IP-", frontends, 1},
	externalPortsTree: {filter, externalPortsChain, externalPortsChain + "-", ports, 0},
	firewallTree:      {filter, proxyFirewallChain, sourcesPrefix + "0IP-", frontends, 0},
	healthTree:        {filter, nodePortsChain, clusterPrefix + "0HC-", ports, 0},
	hairpinTree:       {nat, hairpinChain, hairpinChain + "-", addresses, 0},
}

// level is higher for chains nearer to the root.
func (t *treeShape) level(path []byte) level {
	return treeLevel + level((t.above+1)*(maxDigits+1)-len(path))
}

type tree struct {
	treeShape
	family proxier.Family
	top    branch
	// tail are the rules at the end of the root chain, whatever is in the tree.
	tail []string
	// uses counts how often an address was put, in a tree of addresses.
	uses map[netip.Addr]int
	// changed holds the paths whose chains must be written or removed.
	changed map[string]struct{}
}

// branch is one chain of a tree: a leaf where kids is nil.
type branch struct {
	count int // items in and below it
	kids  *[fanOut]*branch
	items []*item // sorted by compareItems
}

func newTree(id treeID, family proxier.Family) *tree {
	return &tree{treeShape: treeShapes[id], family: family, uses: map[netip.Addr]int{}, changed: map[string]struct{}{}}
}

func compareItems(a, b *item) int {
	return cmp.Or(a.key.Addr.Compare(b.key.Addr), cmp.Compare(a.key.Port, b.key.Port),
		cmp.Compare(a.key.Protocol, b.key.Protocol), a.owner.Compare(b.owner))
}

// digits is the way to key from the root, of the same length for every key.
func (t *tree) digits(key proxier.FrontendKey) []byte {
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
	out = append(out, byte(slices.Index(proxier.Protocols, key.Protocol)))
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

// full says whether an item more makes a leaf at this depth a branch.
func (b *branch) full(digits []byte, depth int) bool {
	return b.count > leafSize && depth < len(digits)
}

func (t *tree) mark(path []byte) { t.changed[string(path)] = struct{}{} }

// put adds it to the tree, and returns what it replaces, if anything.
func (t *tree) put(it *item) (old *item) {
	if t.keys == addresses {
		if t.uses[it.key.Addr]++; t.uses[it.key.Addr] > 1 {
			return nil
		}
	}
	digits := t.digits(it.key)
	if old = t.find(it, digits); old != nil {
		t.replace(it, digits)
		return old
	}
	b, depth := &t.top, 0
	for b.count++; b.kids != nil; b.count++ {
		kid := &b.kids[digits[depth]]
		if *kid == nil {
			*kid = &branch{}
			t.mark(digits[:depth])
		}
		b = *kid
		depth++
	}
	i, _ := slices.BinarySearchFunc(b.items, it, compareItems)
	b.items = slices.Insert(b.items, i, it)
	t.mark(digits[:depth])
	if b.full(digits, depth) {
		t.split(b, digits[:depth])
	}
	return nil
}

func (t *tree) leaf(digits []byte) (b *branch, depth int) {
	for b = &t.top; b != nil && b.kids != nil; depth++ {
		b = b.kids[digits[depth]]
	}
	return b, depth
}

func (t *tree) find(it *item, digits []byte) *item {
	b, _ := t.leaf(digits)
	if b == nil {
		return nil
	}
	if i, ok := slices.BinarySearchFunc(b.items, it, compareItems); ok {
		return b.items[i]
	}
	return nil
}

func (t *tree) replace(it *item, digits []byte) {
	b, depth := t.leaf(digits)
	i, _ := slices.BinarySearchFunc(b.items, it, compareItems)
	b.items[i] = it
	t.mark(digits[:depth])
}

// split makes a branch of a leaf.
func (t *tree) split(b *branch, path []byte) {
	depth := len(path)
	b.kids = &[fanOut]*branch{}
	for _, it := range b.items {
		digit := t.digits(it.key)[depth]
		kid := b.kids[digit]
		if kid == nil {
			kid = &branch{}
			b.kids[digit] = kid
		}
		kid.items = append(kid.items, it)
		kid.count++
	}
	b.items = nil
	for digit, kid := range b.kids {
		if kid == nil {
			continue
		}
		down := append(slices.Clone(path), byte(digit))
		t.mark(down)
		if kid.full(t.digits(kid.items[0].key), len(down)) {
			t.split(kid, down)
		}
	}
}

// drop removes the item with it's key and owner and returns it; nil if there
// is none. One that was put more than once stays.
func (t *tree) drop(it *item) (old *item) {
	digits := t.digits(it.key)
	if old = t.find(it, digits); old == nil {
		return nil
	}
	if t.keys == addresses {
		if t.uses[it.key.Addr]--; t.uses[it.key.Addr] > 0 {
			return old
		}
		delete(t.uses, it.key.Addr)
	}
	b := &t.top
	for depth := 0; ; depth++ {
		b.count--
		if b.kids == nil {
			i, _ := slices.BinarySearchFunc(b.items, it, compareItems)
			b.items = slices.Delete(b.items, i, i+1)
			t.mark(digits[:depth])
			return old
		}
		if b.count <= leafSize {
			t.merge(b, digits[:depth])
			b.items = slices.DeleteFunc(b.items, func(x *item) bool { return x == old })
			return old
		}
		kid := b.kids[digits[depth]]
		if kid.count == 1 {
			b.kids[digits[depth]] = nil
			t.mark(digits[:depth])
			t.markAll(kid, digits[:depth+1])
			return old
		}
		b = kid
	}
}

// merge makes a leaf of a branch.
func (t *tree) merge(b *branch, path []byte) {
	t.markAll(b, path)
	b.each(func(it *item) { b.items = append(b.items, it) })
	b.kids = nil
	slices.SortFunc(b.items, compareItems)
}

func (t *tree) markAll(b *branch, path []byte) {
	t.mark(path)
	if b.kids == nil {
		return
	}
	for digit, kid := range b.kids {
		if kid != nil {
			t.markAll(kid, append(slices.Clone(path), byte(digit)))
		}
	}
}

func (b *branch) each(f func(*item)) {
	if b.kids == nil {
		for _, it := range b.items {
			f(it)
		}
		return
	}
	for _, kid := range b.kids {
		if kid != nil {
			kid.each(f)
		}
	}
}

// setTail replaces the rules at the end of the root chain.
func (t *tree) setTail(rules []string) {
	if !slices.Equal(t.tail, rules) {
		t.tail = rules
		t.mark(nil)
	}
}

// edit is what must be done to a chain: it is written, or removed where gone.
type edit struct {
	name  string
	level level
	gone  bool
	// rules with their owners; empty owners for rules of nobody in particular.
	rules []ownedRule
}

func removal(name string) edit { return edit{name: name, level: goneLevel, gone: true} }

type ownedRule struct {
	text  string
	owner string
}

// takeChanges returns the edits since it was last called, sorted by path.
func (t *tree) takeChanges() []edit {
	edits := make([]edit, 0, len(t.changed))
	for _, path := range slices.Sorted(maps.Keys(t.changed)) {
		b := &t.top
		for i := 0; i < len(path) && b != nil; i++ {
			if b.kids == nil {
				b = nil
				break
			}
			b = b.kids[path[i]]
		}
		if b == nil {
			edits = append(edits, removal(t.chain([]byte(path))))
			continue
		}
		edits = append(edits, t.render(b, []byte(path)))
	}
	clear(t.changed)
	return edits
}

// all returns every chain of the tree.
func (t *tree) all() []edit {
	clear(t.changed)
	var edits []edit
	var walk func(b *branch, path []byte)
	walk = func(b *branch, path []byte) {
		edits = append(edits, t.render(b, path))
		if b.kids == nil {
			return
		}
		for digit, kid := range b.kids {
			if kid != nil {
				walk(kid, append(slices.Clone(path), byte(digit)))
			}
		}
	}
	walk(&t.top, nil)
	return edits
}

func (t *tree) render(b *branch, path []byte) edit {
	e := edit{name: t.chain(path), level: t.level(path)}
	if b.kids == nil {
		for _, it := range b.items {
			for _, rule := range it.rules {
				e.rules = append(e.rules, ownedRule{rule, it.owner.String()})
			}
		}
	} else {
		for digit, kid := range b.kids {
			if kid != nil {
				down := append(slices.Clone(path), byte(digit))
				e.rules = append(e.rules, ownedRule{text: t.edge(down) + " -j " + t.chain(down)})
			}
		}
	}
	if len(path) == 0 {
		for _, rule := range t.tail {
			e.rules = append(e.rules, ownedRule{text: rule})
		}
	}
	return e
}

// chain is the name of the chain at path. Chain names have at most 28 bytes,
// which digits fill in IPv6 only.
func (t *tree) chain(path []byte) string {
	if len(path) == 0 {
		return t.root
	}
	const hexDigits = "0123456789abcdef"
	s := make([]byte, len(path))
	for i, digit := range path {
		s[i] = hexDigits[digit]
	}
	if len(path) > 15 {
		return t.prefix + hash(t.prefix + string(s))[:15]
	}
	return t.prefix + string(s)
}

// edge is the match on the last digit of path.
func (t *tree) edge(path []byte) string {
	last, digit := len(path)-1, path[len(path)-1]
	if n := t.addressDigits(); last < n {
		return " -d " + t.nibble(last, digit) + "/" + t.nibble(last, 0xf)
	}
	path = path[t.addressDigits():]
	proto := proxier.Protocols[path[0]].String()
	if len(path) == 1 {
		return " -p " + proto
	}
	low, size := 0, 1<<16
	for _, digit := range path[1:] {
		size /= fanOut
		low += int(digit) * size
	}
	match := " -p " + proto + " -m " + proto + " --dport " + strconv.Itoa(low)
	if size > 1 {
		match += ":" + strconv.Itoa(low+size-1)
	}
	return match
}

// nibble is the address in which only the nth digit from the end is set.
func (t *tree) nibble(n int, digit byte) string {
	bytes := make([]byte, t.family.HostBits()/8)
	bytes[len(bytes)-1-n/2] = digit << (4 * (n % 2))
	a, _ := netip.AddrFromSlice(bytes)
	return a.String()
}
