// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"signalbox/internal/xtables"
	"signalbox/proxier/plan"
)

// maxForeign is the number of chains of other software that may lead to the
// chains on the hooks.
const maxForeign = 3

// depth is the number of chains after the built-in one on the longest way of
// a packet. Goto counts like jump, as in nf_tables.
func (m *model) depth() int {
	deepest := 0
	for t := range m {
		known := map[string]int{}
		var below func(chain string) int
		below = func(chain string) int {
			if n, ok := known[chain]; ok {
				return n
			}
			n := 0
			for _, rule := range m[t][chain] {
				if target := xtables.JumpTarget(rule); !isBuiltinTarget(target) {
					n = max(n, 1+below(target))
				}
			}
			known[chain] = n
			return n
		}
		for _, hook := range []string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"} {
			deepest = max(deepest, below(hook))
		}
	}
	return deepest
}

// keySets are sets of keys that are hard to divide, and ordinary large ones.
func keySets(family plan.Family) map[string][]plan.FrontendKey {
	base := slices.Repeat([]byte{0x5a}, family.HostBits()/8)
	base[0] = 0x20
	key := func(port int, change func(addr []byte)) plan.FrontendKey {
		addr := slices.Clone(base)
		if change != nil {
			change(addr)
		}
		a, _ := netip.AddrFromSlice(addr)
		return plan.FrontendKey{Addr: a, Port: uint16(port), Protocol: plan.TCP}
	}
	sets := map[string][]plan.FrontendKey{}
	add := func(name string, k ...plan.FrontendKey) { sets[name] = append(sets[name], k...) }
	for port := range 1000 {
		if port < 17 {
			add("17 ports of one address", key(80+port, nil))
		}
		add("1,000 ports of one address", key(30000+port, nil))
		add("ports that are powers of two and their neighbours", key(1<<(port%16)^1<<(port/16%16), nil))
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 10000 {
		add("10,000 at random", key(80, func(a []byte) {
			for i := range a[1:] {
				a[1+i] = byte(r.Uint32())
			}
		}))
	}
	bits := family.HostBits()
	flip := func(a []byte, bit int) { a[bit/8] ^= 0x80 >> (bit % 8) }
	var some func(left, below int, flipped []int)
	some = func(left, below int, flipped []int) {
		if left == 0 {
			add("some bits flipped", key(80, func(a []byte) {
				for _, bit := range flipped {
					flip(a, bit)
				}
			}))
			return
		}
		for i := range below {
			some(left-1, i, append(flipped, i))
		}
	}
	some(map[plan.Family]int{plan.IPv4: 3, plan.IPv6: 2}[family], bits, nil)
	for i := range bits {
		for port := range 17 {
			add("each bit flipped", key(port, func(a []byte) { flip(a, i) }))
			add("chain of prefixes", key(port, func(a []byte) { clear(a[i/8:]); a[i/8] |= 1 << (i % 8) }))
			add("chain of suffixes", key(port, func(a []byte) { clear(a[:1+i/8]); a[i/8] |= 1 << (i % 8) }))
		}
	}
	for i := range bits / 4 {
		for digit := range 16 {
			add("each digit changed", key(80, func(a []byte) { a[i/2] ^= byte(digit) << (i % 2 * 4) }))
		}
	}
	for i := range 1 << 13 {
		add("two values for each digit", key(80, func(a []byte) {
			for bit := range min(13, bits/4) {
				a[len(a)-1-bit/2] ^= byte(i>>bit&1) << (bit % 2 * 4)
			}
		}))
	}
	for i := range bits/4 - 1 {
		for n := range 1 << min(i, 11) {
			add("a subtree half as large at each digit", key(1+n, func(a []byte) { a[i/2] ^= 1 << (i % 2 * 4) }))
		}
	}
	add("deepest", deepestKeys(family)...)
	for name, keys := range sets {
		slices.SortFunc(keys, func(a, b plan.FrontendKey) int { return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Port, b.Port)) })
		sets[name] = slices.Compact(keys)
	}
	return sets
}

// TestTreesAreShallow bounds the chains and the rules of a first packet's way
// through a tree, whatever its keys.
func TestTreesAreShallow(t *testing.T) {
	for _, family := range plan.Families {
		for name, keys := range keySets(family) {
			for id, shape := range treeShapes {
				t.Run(family.String()+"/"+name+"/"+shape.prefix, func(t *testing.T) {
					testTree(t, treeID(id), family, keys, 64)
				})
			}
		}
	}
}

// testTree makes a tree of the keys and looks each of them up.
func testTree(t *testing.T, id treeID, family plan.Family, keys []plan.FrontendKey, maxRules int) {
	tree := newTree(id, family)
	for _, key := range keys {
		match := ""
		switch tree.keys {
		case ports:
			key.Addr = netip.Addr{}
		case addresses:
			key.Port, match = 0, destination(key.Addr)
		default:
			match = destination(key.Addr)
		}
		if tree.keys != addresses {
			match += " -p " + key.Protocol.String() + " --dport " + strconv.Itoa(int(key.Port))
		}
		tree.put(&entry{entryID{id, key}, plan.ServicePortName{}, []string{match + " -j ACCEPT"}})
	}
	m := newModel()
	for _, c := range allChains(tree) {
		m[tree.table][c.Name] = c.Rules
	}
	m[tree.table]["OUTPUT"] = []string{" -j " + tree.root}
	if n := m.depth(); n > treeChains {
		t.Errorf("a packet can come through %d chains, want %d at most", n, treeChains)
	}
	for i := 0; i < len(keys); i += 1 + len(keys)/100 {
		key := keys[i]
		out, rules := m.run(tree.table, tree.root, packet{src: nodeAddr(family), dst: key.Addr, dport: key.Port, proto: key.Protocol})
		if out["ACCEPT"] != 1 {
			t.Fatalf("a packet to %s meets %v", key, out)
		}
		if rules > maxRules {
			t.Fatalf("a packet to %s passes %d rules", key, rules)
		}
	}
}

// FuzzTrees makes trees of keys that are alike in one pattern or another.
func FuzzTrees(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(seed, uint16(1+seed*100), uint8(1+seed), uint8(seed))
	}
	f.Fuzz(func(t *testing.T, seed uint64, number uint16, digits, values uint8) {
		r := rand.New(rand.NewPCG(seed, 3))
		family, id := plan.Families[seed%2], treeID(seed/2%uint64(treeCount))
		keys := map[plan.FrontendKey]struct{}{}
		for range number {
			keys[alikeKey(r, family, 1+int(digits)%8, 1+int(values)%15)] = struct{}{}
		}
		testTree(t, id, family, slices.Collect(maps.Keys(keys)), math.MaxInt)
	})
}

// alikeKey differs from the others in some digits of the address, by some values,
// and in few bits of the port.
func alikeKey(r *rand.Rand, family plan.Family, digits, values int) plan.FrontendKey {
	addr := slices.Repeat([]byte{0x25}, family.HostBits()/8)
	for range r.IntN(digits + 1) {
		// Not in the first digit, so that the address is of a host.
		i := 1 + r.IntN(2*len(addr)-1)
		addr[i/2] ^= byte(r.IntN(values+1)) << (4 * (1 - i%2))
	}
	key := plan.FrontendKey{Port: uint16(80 ^ 1<<r.IntN(16)), Protocol: plan.Protocols[r.IntN(3)]}
	key.Addr, _ = netip.AddrFromSlice(addr)
	return key
}

// deepestKeys are as few keys as make a tree as deep as it gets: two nodes of
// each size class above a leaf. The last key is in that leaf.
func deepestKeys(family plan.Family) []plan.FrontendKey {
	var keys []plan.FrontendKey
	base := slices.Repeat([]byte{0x25}, family.HostBits()/8)
	add := func(n int, addr []byte) {
		a, _ := netip.AddrFromSlice(addr)
		for port := range n {
			keys = append(keys, plan.FrontendKey{Addr: a, Port: uint16(1 + port), Protocol: plan.TCP})
		}
	}
	// From 4,098 keys these leave 4,097, 258, 257, 18, 17 and 16 below each digit.
	for digit, n := range []int{1, 3839, 1, 239, 1, 1} {
		addr := slices.Clone(base)
		addr[len(addr)-1-digit/2] ^= 1 << (digit % 2 * 4)
		add(n, addr)
	}
	add(leafSize, base)
	return keys
}

// longestWay is a plan in which the trees of addresses are as deep as they get.
// The deepest leaf leads to a Service with source ranges, affinity and so many
// endpoints that they are spread. The other Services are simple, because
// iptables-nft checks every way to a chain.
func longestWay(family plan.Family) *plan.Plan {
	port := func(name string, affinity time.Duration) *plan.ServicePort {
		return &plan.ServicePort{AffinityTimeout: affinity, Name: plan.ServicePortName{
			ServiceName: plan.ServiceName{Namespace: "ns", Name: name}, Protocol: plan.TCP,
		}}
	}
	long, short, empty := port("long", time.Hour), port("short", 0), port("empty", 0)
	keys := deepestKeys(family)
	many, one, none := &plan.EndpointSet{}, &plan.EndpointSet{}, &plan.EndpointSet{}
	for i := range maxRun + 1 {
		many.Endpoints = append(many.Endpoints, plan.Endpoint{AddrPort: netip.AddrPortFrom(keys[0].Addr, uint16(1+i))})
	}
	one.Endpoints = many.Endpoints[:1]
	for i, key := range keys {
		f := plan.Frontend{Kind: plan.LoadBalancerIP, Addr: key.Addr, Port: key.Port, Internal: one, External: one}
		if i < len(keys)-1 {
			short.Frontends = append(short.Frontends, f)
		} else {
			f.Internal, f.External, f.WhenEmpty, f.Masquerade = many, none, plan.Drop, plan.FromNode
			f.Sources = []netip.Prefix{netip.PrefixFrom(key.Addr, 16)}
			long.Frontends = append(long.Frontends, f)
			f.Kind, f.Addr, f.Port = plan.NodePort, netip.Addr{}, 30000
			long.Frontends = append(long.Frontends, f)
		}
		empty.Frontends = append(empty.Frontends, plan.Frontend{Addr: key.Addr, Port: 10000 + key.Port, Internal: none, External: none})
	}
	for i := range uint16(2767) {
		short.Frontends = append(short.Frontends, plan.Frontend{Kind: plan.NodePort, Port: 30001 + i, Internal: one, External: one})
	}
	desired := planOf(family, long, short, empty)
	desired.Node.LocalPods = plan.LocalPods{Interface: "cni0", InterfacePrefix: "veth"}
	desired.Node.NodePortAddrs.All = true
	return desired
}

// TestRulesAreShallow leaves room for chains of other software that lead to ours.
func TestRulesAreShallow(t *testing.T) {
	for _, family := range plan.Families {
		_, m := stateOf(t, longestWay(family))
		if n := m.depth(); n != maxChains-maxForeign {
			t.Errorf("%s: the longest way of a packet has %d chains, want %d", family, n, maxChains-maxForeign)
		}
	}
}

// TestKernelTakesTheLongestWay has chains of other software lead to ours, as
// many as there is room for.
func TestKernelTakesTheLongestWay(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		mustSync(t, p, longestWay(p.opts.Family), plan.Change{All: true})
		for table := range tableCount {
			run(t, foreignChains(table), p.tools.Restore, "--noflush")
		}
	})
}

// foreignChains are maxForeign chains for each hook of a table. The last one
// leads to ours.
func foreignChains(table table) string {
	var chains, rules strings.Builder
	for _, from := range []string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"} {
		last := from
		for i := range maxForeign {
			next := fmt.Sprintf("%s-%d", from, i)
			for _, j := range jumps {
				if j.table != table || j.from != from {
					continue
				}
				if last != next {
					fmt.Fprintf(&chains, ":%s - [0:0]\n", next)
					fmt.Fprintf(&rules, "-A %s -j %s\n", last, next)
					last = next
				}
				if i == maxForeign-1 {
					fmt.Fprintf(&rules, "-A %s -j %s\n", last, j.target)
				}
			}
		}
	}
	return fmt.Sprintf("*%s\n%s%sCOMMIT\n", table, &chains, &rules)
}
