package iptables

import (
	"hash/maphash"
	"maps"
	"net/netip"
	"slices"
	"strconv"

	"signalbox/proxier/plan"
)

// A tree leads a packet to the rules for its destination. See tree.go for how
// keys are divided, and docs/iptables.md for why.
//
// nf_tables refuses rules by which a packet can come through more than
// maxChains chains after the one on the hook. It counts goto like jump. A tree
// takes at most treeChains of them, whatever its keys: see sizeClass.

const (
	maxChains  = 15
	treeChains = 2*maxSizeClass + 1
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
	routeSourcesChain  = clusterPrefix + "0SRC"
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

// level is higher for chains nearer to the root. There are few of them, because
// the order of names counts within a level: see script.table.
func (t *tree) level(n *treeNode, leads bool) level {
	of := 2 * n.sizeClass()
	if n == t.top {
		of = treeChains
	} else if !leads && of > 0 {
		of--
	}
	return treeLevel + level(t.above*(treeChains+1)+of)
}

// chainSum tells whether a chain is as it was written.
type chainSum struct {
	digest uint64
	rules  int
}

var digestSeed = maphash.MakeSeed()

func (e *edit) sum() chainSum {
	var h maphash.Hash
	h.SetSeed(digestSeed)
	for _, r := range e.rules {
		h.WriteString(r.text)
		h.WriteByte('\n')
	}
	return chainSum{h.Sum64(), len(e.rules)}
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

// takeChanges returns the edits since it was last called, sorted by path. A
// chain whose rules are the same as before is not among them.
func (t *tree) takeChanges() []edit {
	edits := make([]edit, 0, len(t.changed))
	for _, path := range slices.Sorted(maps.Keys(t.changed)) {
		n, leads := t.find(path)
		before, existed := t.written[path]
		if n == nil {
			if existed {
				delete(t.written, path)
				t.rules -= before.rules
				edits = append(edits, removal(t.chain(path)))
			}
			continue
		}
		if e, sum := t.render(n, leads); !existed || sum != before {
			t.written[path] = sum
			t.rules += sum.rules - before.rules
			edits = append(edits, e)
		}
	}
	clear(t.changed)
	return edits
}

// all returns every chain of the tree.
func (t *tree) all() []edit {
	clear(t.changed)
	clear(t.written)
	t.rules = 0
	var edits []edit
	var walk func(n *treeNode, leads bool)
	walk = func(n *treeNode, leads bool) {
		if n.hasChain(leads) {
			e, sum := t.render(n, leads)
			t.written[t.id(n)] = sum
			t.rules += sum.rules
			edits = append(edits, e)
		}
		for child := range n.eachChild {
			walk(child, child.sizeClass() < n.sizeClass())
		}
	}
	walk(t.top, true)
	return edits
}

// render returns the chain of a node. The chain of a group's top node first
// looks for the other nodes of the group, those farther down before those above
// them: what is under both belongs to the former.
func (t *tree) render(n *treeNode, leads bool) (edit, chainSum) {
	path := t.id(n)
	e := edit{name: t.chain(path), level: t.level(n, leads)}
	for _, it := range n.items {
		for _, rule := range it.rules {
			e.rules = append(e.rules, ownedRule{rule, it.owner.String()})
		}
	}
	// After goto a packet that no rule below takes comes back to the root chain
	// at once, whose rules at the end are for it.
	jump := " -g "
	if n == t.top {
		jump = " -j "
	}
	link := func(to *treeNode) {
		e.rules = append(e.rules, ownedRule{text: t.match(to.path, len(path)) + jump + t.chain(string(to.path))})
	}
	if leads {
		n.eachOfGroup(link)
	}
	for child := range n.eachChild {
		if child.sizeClass() < n.sizeClass() {
			link(child)
		}
	}
	if n == t.top {
		for _, rule := range t.tail {
			e.rules = append(e.rules, ownedRule{text: rule})
		}
	}
	return e, e.sum()
}

// chain is the name of the chain at path. Chain names have at most 28 bytes,
// which digits fill in IPv6 only.
func (t *tree) chain(path string) string {
	if path == "" {
		return t.root
	}
	const hexDigits = "0123456789abcdef"
	s := make([]byte, len(path))
	for i := range path {
		s[i] = hexDigits[path[i]]
	}
	if len(path) > 15 {
		return t.prefix + hash(t.prefix + string(s))[:15]
	}
	return t.prefix + string(s)
}

// match is true of the keys below path, among those that have its first digits.
func (t *tree) match(path []byte, first int) string {
	var s string
	n := t.addressDigits()
	if first < n {
		end := min(len(path), n)
		s = " -d " + t.address(path[:end], first) + "/" + t.address(slices.Repeat([]byte{0xf}, end), first)
	}
	if len(path) <= n {
		return s
	}
	proto := plan.Protocols[path[n]].String()
	s += " -p " + proto
	digits := path[n+1:]
	if len(digits) == 0 {
		return s
	}
	low, size := 0, 1<<16
	for _, digit := range digits {
		size /= fanOut
		low += int(digit) * size
	}
	s += " -m " + proto + " --dport " + strconv.Itoa(low)
	if size > 1 {
		s += ":" + strconv.Itoa(low+size-1)
	}
	return s
}

// address is the one with these digits from its end, and zeros in the place of
// those before first.
func (t *tree) address(digits []byte, first int) string {
	bytes := make([]byte, t.family.HostBits()/8)
	for i := first; i < len(digits); i++ {
		bytes[len(bytes)-1-i/2] |= digits[i] << (4 * (i % 2))
	}
	a, _ := netip.AddrFromSlice(bytes)
	return a.String()
}
