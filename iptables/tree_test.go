// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"signalbox/proxier/plan"
)

// allChains returns every chain of the tree.
func allChains(t *tree) []chain {
	var markAll func(n *treeNode)
	markAll = func(n *treeNode) {
		t.markDirty(n)
		for child := range n.eachChild {
			markAll(child)
		}
	}
	markAll(t.top)
	return slices.DeleteFunc(t.takeChanges(), func(c chain) bool { return c.Gone })
}

func render(t *tree) string {
	s := ""
	for _, c := range allChains(t) {
		s += c.Name + "\n"
		for _, rule := range c.Rules {
			s += "\t" + rule + "\n"
		}
	}
	return s
}

func treeEntry(id treeID, key plan.FrontendKey) *entry {
	return &entry{entryID{id, key}, plan.ServicePortName{}, []string{" -j " + key.String()}}
}

// randomKey makes keys that crowd: few addresses, some of them with very many
// ports.
func randomKey(r *rand.Rand, family plan.Family, ports bool) plan.FrontendKey {
	key := plan.FrontendKey{Port: uint16(1 + r.IntN(4)), Protocol: plan.Protocols[r.IntN(3)]}
	if ports {
		key.Port = uint16(30000 + r.IntN(2768))
		return key
	}
	b := make([]byte, family.HostBits()/8)
	b[0], b[len(b)-1], b[len(b)-2] = 32, byte(r.IntN(40)), byte(r.IntN(3))
	if r.IntN(4) == 0 {
		b[len(b)-1], b[len(b)-2], key.Port = 1, 1, uint16(1+r.IntN(65535))
	}
	key.Addr, _ = netip.AddrFromSlice(b)
	return key
}

// TestTreesWithTheSameEntriesAreEqual: the shape of a tree follows from its entries
// and not from its history, and changes lead from one shape to the next.
func TestTreesWithTheSameEntriesAreEqual(t *testing.T) {
	for seed := range uint64(30) {
		r := rand.New(rand.NewPCG(seed, 1))
		family, id := plan.Families[seed%2], []treeID{servicesTree, nodePortsTree}[seed/2%2]
		grown := newTree(id, family)
		kernel := map[string][]string{}
		entries := map[plan.FrontendKey]*entry{}
		for round := range 40 {
			for range r.IntN(60) {
				e := treeEntry(id, randomKey(r, family, grown.keys == ports))
				if (round/10)%2 == 1 && r.IntN(3) > 0 {
					for _, e = range entries {
						break
					}
					grown.drop(e)
					delete(entries, e.key)
					continue
				}
				grown.put(e)
				entries[e.key] = e
			}
			for _, c := range grown.takeChanges() {
				if delete(kernel, c.Name); !c.Gone {
					kernel[c.Name] = c.Rules
				}
			}
		}
		fresh := newTree(id, family)
		for _, e := range entries {
			fresh.put(e)
		}
		if diff := cmp.Diff(render(fresh), render(grown)); diff != "" {
			t.Fatalf("seed %d: (-fresh +grown)\n%s", seed, diff)
		}
		want := map[string][]string{}
		for _, c := range allChains(fresh) {
			want[c.Name] = c.Rules
		}
		if diff := cmp.Diff(want, kernel); diff != "" {
			t.Fatalf("seed %d: changes lead elsewhere (-fresh +changed)\n%s", seed, diff)
		}
	}
}

// TestAddressesAreThereOnce checks that a tree of addresses holds one for as long
// as anybody needs it. Its shape does not depend on how many do.
func TestAddressesAreThereOnce(t *testing.T) {
	for _, family := range plan.Families {
		tree, r := newTree(hairpinTree, family), rand.New(rand.NewPCG(1, 1))
		var list []*entry
		for range 100 {
			e := treeEntry(hairpinTree, plan.FrontendKey{Addr: randomKey(r, family, false).Addr})
			list = append(list, e, e)
			tree.put(e)
		}
		once := render(tree)
		for _, e := range list[:100] {
			tree.put(e)
		}
		if diff := cmp.Diff(once, render(tree)); diff != "" {
			t.Errorf("put again: (-before +after)\n%s", diff)
		}
		for _, e := range list[:100] {
			tree.drop(e)
		}
		if diff := cmp.Diff(once, render(tree)); diff != "" {
			t.Errorf("dropped once: (-before +after)\n%s", diff)
		}
		for i := 0; i < len(list); i += 2 {
			tree.drop(list[i])
		}
		if got := render(tree); got != hairpinChain+"\n" || len(tree.uses) > 0 {
			t.Errorf("dropped: %v, and\n%s", tree.uses, got)
		}
	}
}

func TestChainNames(t *testing.T) {
	for id := range treeCount {
		for _, family := range plan.Families {
			tree := newTree(id, family)
			for n := range maxDigits + 1 {
				path := make([]byte, n)
				if n > len(tree.digits(plan.FrontendKey{Addr: nodeAddr(family), Protocol: plan.TCP})) {
					break
				}
				name := tree.chain(path)
				if len(name) > 28 {
					t.Errorf("%s is too long for a chain", name)
				}
				if n > 0 && !isServiceChain(name) {
					t.Errorf("kube-proxy would leave %s behind", name)
				}
			}
		}
	}
	// Names by which kube-proxy knows a Service, so that it replaces them.
	sp := plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "ns1", Name: "svc1"}, Port: "p80", Protocol: plan.TCP}
	e := plan.Endpoint{AddrPort: netip.MustParseAddrPort("10.180.0.1:80")}
	for got, want := range map[string]string{
		clusterPrefix + portHash(sp, 0): "KUBE-SVC-XPGD46QRK7WJZT7O",
		endpointChain(sp, e):            "KUBE-SEP-SXIVWICOYRO3J4NJ",
	} {
		if got != want {
			t.Errorf("chain %s, kube-proxy's is %s", got, want)
		}
	}
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		id     treeID
		family plan.Family
		path   []byte
		first  int
		want   string
	}{
		{servicesTree, plan.IPv4, []byte{5}, 0, " -d 0.0.0.5/0.0.0.15"},
		{servicesTree, plan.IPv4, []byte{5, 10}, 1, " -d 0.0.0.160/0.0.0.240"},
		{servicesTree, plan.IPv4, []byte{5, 10, 0, 1}, 1, " -d 0.0.16.160/0.0.255.240"},
		{servicesTree, plan.IPv4, []byte{0, 0, 0, 0, 0, 0, 0, 1}, 7, " -d 16.0.0.0/240.0.0.0"},
		{servicesTree, plan.IPv4, []byte{0, 0, 0, 0, 0, 0, 0, 1, 1}, 8, " -p udp"},
		{servicesTree, plan.IPv4, []byte{0, 0, 0, 0, 0, 0, 0, 1, 1}, 7, " -d 16.0.0.0/240.0.0.0 -p udp"},
		{servicesTree, plan.IPv4, []byte{1, 0, 0, 0, 0, 6, 0, 1, 1, 1}, 0, " -d 16.96.0.1/255.255.255.255 -p udp -m udp --dport 4096:8191"},
		{servicesTree, plan.IPv6, []byte{5, 10}, 1, " -d ::a0/::f0"},
		{nodePortsTree, plan.IPv4, []byte{2}, 0, " -p sctp"},
		{nodePortsTree, plan.IPv4, []byte{0, 7}, 1, " -p tcp -m tcp --dport 28672:32767"},
		{nodePortsTree, plan.IPv4, []byte{0, 7, 5, 3, 1}, 4, " -p tcp -m tcp --dport 30001"},
	} {
		if got := newTree(c.id, c.family).match(c.path, c.first); got != c.want {
			t.Errorf("match of %v from %d is %q, want %q", c.path, c.first, got, c.want)
		}
	}
}
