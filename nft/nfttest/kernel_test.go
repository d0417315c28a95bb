// SPDX-License-Identifier: Apache-2.0

package nfttest_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"

	"signalbox/internal/nstest"
	"signalbox/nft"
	"signalbox/nft/nfttest"
	"signalbox/proxier/plan"
)

// The sets have every form that a mode uses.
const (
	frontends nft.SetID = iota
	ids
	chains
	ranges
	sources
	clients
)

func newSets() []*nft.Set {
	frontend, id := []nft.Field{nft.AddrField, nft.ProtoField, nft.PortField}, []nft.Field{nft.MarkDatum}
	return []*nft.Set{
		nft.NewSet("frontends", frontend, nil, "a set"),
		nft.NewSet("ids", frontend, id, "a map"),
		{Name: "chains", Key: []nft.Field{nft.ClassIDField}, Verdicts: true},
		nft.NewSet("ranges", []nft.Field{nft.AddrField}, nil, "ranges").OfRanges(),
		nft.NewSet("sources", append(frontend, nft.AddrField), nil, "").OfRanges(),
		nft.NewSet("clients", []nft.Field{nft.AddrField, nft.ClassIDField}, id, "").Remembering(3),
	}
}

// operation gathers a change in a table.
type operation struct {
	name  string
	write func(*nft.Table)
}

// generator makes operations at random, from so few names and addresses that they clash.
type generator struct {
	*rand.Rand
	*nft.IPFamily
}

func (g generator) chance(percent int) bool { return g.IntN(100) < percent }

func (g generator) chain() nft.Chain {
	name, hook := fmt.Sprintf("chain-%d", g.IntN(4)), (*nft.Hook)(nil)
	if g.chance(20) {
		name, hook = "base", nft.NewHook(nftables.ChainHookForward, *nftables.ChainPriorityFilter, "")
	}
	var rules []nft.Rule
	for range g.IntN(4) {
		rules = append(rules, nft.NewRule([]nft.Statement{
			nft.Jump([]string{"leaf-0", "leaf-1", "leaf-2", "base"}[g.IntN(4)]),
			nft.CountedBy(fmt.Sprintf("counter-%d", g.IntN(2))),
			nft.In(nft.Join(g.Daddr(), nft.L4Proto, nft.DPort), "frontends"),
			nft.VerdictOf(nft.Priority, "chains"),
			nft.Remember("clients", nft.Join(g.Saddr(), nft.Priority), nft.Priority, time.Second),
		}[g.IntN(5)]).Comment("a rule"))
	}
	return nft.NewChain(name, hook, rules...)
}

func (g generator) prefix() netip.Prefix {
	a := netip.AddrFrom4([4]byte{10, 0, 0, byte(g.IntN(16))})
	if g.AddrLen == 16 {
		a = netip.AddrFrom16([16]byte{0xfd, 15: byte(g.IntN(16))})
	}
	p := netip.PrefixFrom(a, a.BitLen()-g.IntN(4)).Masked()
	if g.chance(5) {
		p = netip.PrefixFrom(a, []int{0, 1}[g.IntN(2)]).Masked()
	}
	return p
}

func (g generator) element(set nft.SetID) nft.Element {
	p := g.prefix()
	frontend := func(a netip.Addr) []byte {
		return nft.AppendPort(nft.AppendProto(nft.AppendAddr(nil, a), plan.TCP), 80)
	}
	e := nft.Element{Set: set, Key: string(frontend(p.Addr()))}
	switch set {
	case ids:
		e.Data = nft.MarkData(uint32(g.IntN(2)))
	case chains:
		e.Key, e.Chain = nft.MarkKey(uint32(g.IntN(4))), []string{"leaf-0", "leaf-1", "base"}[g.IntN(3)]
	case ranges:
		// No range ends where a longer one ends: some releases of Linux accept that.
		a := p.Addr().AsSlice()
		a[len(a)-1] &^= 3
		first, _ := netip.AddrFromSlice(a)
		if p = netip.PrefixFrom(first, []int{first.BitLen(), first.BitLen() - 1, first.BitLen() - 4, 0}[g.IntN(4)]).Masked(); a[len(a)-1]&12 == 12 {
			p = netip.PrefixFrom(first, first.BitLen())
		}
		e.Key, e.End = string(nft.AppendAddr(nil, p.Addr())), string(nft.AppendAddr(nil, nft.LastAddr(p)))
	case sources:
		at := frontend(netip.MustParsePrefix(p.String()).Masked().Addr())
		if g.chance(80) {
			at = frontend(g.prefix().Addr())
		}
		e.Key, e.End = string(nft.AppendAddr(slices.Clone(at), p.Addr())), string(nft.AppendAddr(at, nft.LastAddr(p)))
	case clients:
		e.Key, e.Data = string(nft.AppendID(nft.AppendAddr(nil, p.Addr()), 1)), nft.MarkData(1)
	}
	if g.chance(30) && set != chains {
		e.Comment = "of a Service"
	}
	return e
}

func (g generator) elements() []nft.Element {
	set := nft.SetID(g.IntN(6))
	list := []nft.Element{g.element(set)}
	for range g.IntN(3) {
		list = append(list, g.element(set))
	}
	return list
}

func (g generator) operation() operation {
	list, chain, set := g.elements(), g.chain(), nft.SetID(g.IntN(6))
	counter := fmt.Sprintf("counter-%d", g.IntN(2))
	leaf := fmt.Sprintf("leaf-%d", g.IntN(3))
	switch n := g.IntN(100); {
	case n < 35:
		return operation{fmt.Sprintf("add elements %q", list), func(t *nft.Table) { t.AddElements(list) }}
	case n < 52:
		return operation{fmt.Sprintf("remove elements %q", list), func(t *nft.Table) { t.RemoveElements(list) }}
	case n < 60:
		return operation{"add chain " + chain.Text(), func(t *nft.Table) { t.AddChains([]nft.Chain{chain}) }}
	case n < 66:
		return operation{"rewrite chain " + chain.Text(), func(t *nft.Table) { t.RewriteChains([]nft.Chain{chain}) }}
	case n < 71:
		return operation{"delete chain " + chain.Name, func(t *nft.Table) { t.DeleteChain(chain.Name) }}
	case n < 78:
		return operation{"add chain " + leaf, func(t *nft.Table) { t.AddChain(nft.Chain{Name: leaf}) }}
	case n < 81:
		return operation{"delete chain " + leaf, func(t *nft.Table) { t.DeleteChain(leaf) }}
	case n < 83:
		return operation{fmt.Sprint("flush set ", set), func(t *nft.Table) { t.FlushSet(set) }}
	case n < 90:
		return operation{"add " + counter, func(t *nft.Table) { t.AddCounter(counter) }}
	case n < 93:
		return operation{"delete " + counter, func(t *nft.Table) { t.DeleteCounter(counter) }}
	case n < 94:
		return operation{"replace the contents", func(t *nft.Table) {
			if c, err := t.Inspect(); err == nil && t.HasSet(c, clients) {
				t.ReplaceContents(c, clients)
			}
		}}
	case n < 98:
		// A key that is not there: releases of Linux differ in what they do to its timeout.
		key := nft.AppendID(nft.AppendAddr(nil, g.prefix().Addr()), g.Uint32())
		read := []nftables.SetElement{{Key: key, Val: []byte(nft.MarkData(1)), Timeout: time.Hour}}
		return operation{"add a client", func(t *nft.Table) { t.AddRead(clients, read) }}
	case n < 99:
		return operation{"delete the table", func(t *nft.Table) { t.DeleteTable() }}
	}
	return operation{"replace the table", (*nft.Table).ReplaceTable}
}

// TestAgreesWithLinux runs the same operations on this kernel and on Linux, and compares
// errors and what is read back.
func TestAgreesWithLinux(t *testing.T) {
	for _, family := range plan.Families {
		for seed := range uint64(2) {
			t.Run(fmt.Sprint(family, "/", seed), func(t *testing.T) {
				t.Parallel() // for the most part Linux sleeps
				nstest.Enter(t)
				var kernel nfttest.Kernel
				f := nft.FamilyOf(family)
				g := generator{rand.New(rand.NewPCG(seed, uint64(family))), f}
				linux, fake := open(t, f), open(t, f, kernel.Connection())
				done := []string{"replace the table"}
				for _, table := range []*nft.Table{linux, fake} {
					table.ReplaceTable()
					if err := table.Commit(); err != nil {
						t.Fatal(err)
					}
				}
				for range 100 {
					var operations []operation
					for range 1 + g.IntN(3) {
						operations = append(operations, g.operation())
					}
					var names []string
					results := map[*nft.Table]string{}
					before := map[*nft.Table]uint32{linux: nstest.Generation(t), fake: nstest.Generation(t, kernel.Connection())}
					for _, table := range []*nft.Table{linux, fake} {
						names = nil
						for _, o := range operations {
							names = append(names, o.name)
							o.write(table)
						}
						results[table] = fmt.Sprintln("error:", table.Commit())
					}
					done = append(done, strings.Join(names, "\n and "))
					results[linux] += fmt.Sprintln("changed:", nstest.Generation(t) != before[linux]) + contents(t, linux)
					results[fake] += fmt.Sprintln("changed:", nstest.Generation(t, kernel.Connection()) != before[fake]) + contents(t, fake, kernel.Connection())
					if diff := cmp.Diff(results[linux], results[fake]); diff != "" {
						t.Fatalf("after %s (-Linux +fake):\n%s", strings.Join(done[max(0, len(done)-3):], "\n then "), diff)
					}
				}
			})
		}
	}
}

// contents is all that can be read back.
func contents(t *testing.T, table *nft.Table, options ...nftables.ConnOption) string {
	t.Helper()
	text, err := nfttest.Listing(options...)
	if err != nil {
		t.Fatal(err)
	}
	c, err := table.Inspect()
	if c != nil {
		text += fmt.Sprintln(c.Dormant, len(c.Chains), c.Counters)
	}
	text += fmt.Sprintln(err)
	n, err := table.CounterPackets("counter-0")
	text += fmt.Sprintln(n, err)
	text += fmt.Sprintln(table.ReadAll(func(set nft.SetID, elements []nftables.SetElement) {
		text += fmt.Sprintln(set, len(elements))
	}))
	return text
}

func open(t *testing.T, f *nft.IPFamily, options ...nftables.ConnOption) *nft.Table {
	t.Helper()
	table, err := nft.Open(f, "example", newSets(), options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { table.Close() })
	return table
}
