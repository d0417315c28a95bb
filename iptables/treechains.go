// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strconv"

	"signalbox/internal/xtables"
	"signalbox/proxier/plan"
)

// nf_tables refuses rules by which a packet can come through more than
// maxChains chains after the one on the hook. It counts goto like jump. A tree
// takes at most treeChains of them, whatever its keys: see sizeClass.

const (
	maxChains  = 15
	treeChains = 2*maxSizeClass + 1
)

// chain is one chain to write or to remove.
type chain = xtables.Chain

// Levels of chains: rules jump only to chains of lower levels.
const (
	staticLevel uint8 = iota // every other may jump to these
	endpointLevel
	bucketLevel
	setLevel
	dispatcherLevel
	sourcesLevel
	treeLevel // the deepest leaf; see tree.level

	masqueradeLevel  = staticLevel + 1
	postroutingLevel = 254 // leads to a tree
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

// treeShape is the place of a tree and the names of its chains.
type treeShape struct {
	table  table
	root   string
	prefix string
	keys   keyKind
	// above is the number of trees to which the root rules lead.
	above uint8
}

// keyKind is the part of keys that a tree matches.
type keyKind uint8

const (
	frontends keyKind = iota // address, protocol and port
	ports                    // protocol and port
	// addresses alone. Any number of ServicePorts may put the same entry there;
	// it has no owner.
	addresses
)

// treeShapes keep within prefixes that kube-proxy knows.
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

// level is higher for chains nearer to the root. There are few levels, because
// the order of names counts within a level: see xtables.Script.Add.
func (t *tree) level(n *treeNode, leads bool) uint8 {
	of := 2 * n.sizeClass()
	if n == t.top {
		of = treeChains
	} else if !leads && of > 0 {
		of--
	}
	return treeLevel + t.above*(treeChains+1) + uint8(of)
}

// takeChanges returns the chains that may have changed since it was last
// called, sorted by path.
func (t *tree) takeChanges() []chain {
	chains := make([]chain, 0, len(t.dirty))
	for _, path := range slices.Sorted(maps.Keys(t.dirty)) {
		if n, leads := t.find(path); n != nil {
			chains = append(chains, t.render(n, leads))
		} else {
			chains = append(chains, xtables.Removal(t.chain([]byte(path))))
		}
	}
	clear(t.dirty)
	return chains
}

// way hands out the chains from the root to the leaf of a key.
func (t *tree) way(key plan.FrontendKey) iter.Seq[chain] {
	return func(yield func(chain) bool) {
		digits := t.digits(key)
		for n, leads := t.top, true; n != nil; {
			if n == t.top || n.hasChain(leads) {
				if !yield(t.render(n, leads)) {
					return
				}
			}
			if n.children == nil {
				return
			}
			child := n.children[digits[len(n.path)]]
			leads = child != nil && child.sizeClass() < n.sizeClass()
			n = child
		}
	}
}

// render returns the chain of a node. The chain of a group's top node first
// jumps to the other nodes of the group: those farther down come first, because
// their keys match the nodes above them too.
func (t *tree) render(n *treeNode, leads bool) chain {
	path := t.id(n)
	c := chain{Name: t.chain(path), Level: t.level(n, leads)}
	if n == t.top {
		c.Rules = append(c.Rules, t.rootRules.first...)
		c.Owners = make([]string, len(c.Rules))
	}
	for _, e := range n.entries {
		for _, rule := range e.rules {
			c.Rules = append(c.Rules, rule)
			if t.keys != addresses {
				c.Owners = append(c.Owners, e.owner.String())
			}
		}
	}
	c.Owners = append(c.Owners, "") // no Service port owns what follows
	// After a goto, a packet that no rule takes returns to the root chain at
	// once, and comes to the root rules.
	jump := " -g "
	if n == t.top {
		jump = " -j "
	}
	link := func(to *treeNode) {
		c.Rules = append(c.Rules, t.match(to.path, len(path))+jump+t.chain(to.path))
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
		c.Rules = append(c.Rules, t.rootRules.last...)
	}
	return c
}

// chain is the name of the chain at path. Chain names have at most 28 bytes,
// which digits exceed in IPv6 only.
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

// address is the one with these digits from its end. The digits before first
// count as zeros.
func (t *tree) address(digits []byte, first int) string {
	bytes := make([]byte, t.family.HostBits()/8)
	for i := first; i < len(digits); i++ {
		bytes[len(bytes)-1-i/2] |= digits[i] << (4 * (i % 2))
	}
	a, _ := netip.AddrFromSlice(bytes)
	return a.String()
}
