// SPDX-License-Identifier: Apache-2.0

package nft_test

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/nft/nfttest"
	"signalbox/proxier/plan"
)

const (
	addresses nft.SetID = iota
	clients
)

func newSets() []*nft.Set {
	addr, mark := []nft.Field{nft.AddrField}, []nft.Field{nft.MarkDatum}
	return []*nft.Set{
		nft.NewSet("addresses", addr, nil, "some addresses").OfRanges(),
		nft.NewSet("clients", addr, mark, "").Remembering(100),
	}
}

func open(t *testing.T, kernel *nfttest.Kernel, name string) *nft.Table {
	t.Helper()
	table, err := nft.Open(nft.FamilyOf(plan.IPv4), name, newSets(), kernel.Connection())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { table.Close() })
	return table
}

func commit(t *testing.T, table *nft.Table) {
	t.Helper()
	if err := table.Commit(); err != nil {
		t.Fatal(err)
	}
}

// chains are the names of the chains in the kernel; nil if there is no table.
func chains(t *testing.T, table *nft.Table) []string {
	t.Helper()
	c, err := table.Inspect()
	if err != nil {
		t.Fatal(err)
	}
	if c == nil {
		return nil
	}
	var names []string
	for _, chain := range c.Chains {
		names = append(names, chain.Name)
	}
	return names
}

// refuse makes the kernel refuse every message of a kind.
func refuse(kernel *nfttest.Kernel, kind int, errno syscall.Errno) {
	kernel.Refuse = func(_, k int) syscall.Errno {
		if k == kind {
			return errno
		}
		return 0
	}
}

// TestCommitError: the error says whether the kernel holds what it held before.
func TestCommitError(t *testing.T) {
	for _, test := range []struct {
		name   string
		fault  func(*nfttest.Kernel)
		errno  syscall.Errno
		kind   error // what else the error wraps
		isDone bool
	}{
		{"invalid", func(k *nfttest.Kernel) { refuse(k, unix.NFT_MSG_NEWRULE, unix.EINVAL) }, unix.EINVAL, nil, false},
		{"no memory", func(k *nfttest.Kernel) { refuse(k, unix.NFT_MSG_NEWRULE, unix.ENOMEM) }, unix.ENOMEM, nil, false},
		{"interrupted", func(k *nfttest.Kernel) { refuse(k, unix.NFT_MSG_NEWRULE, unix.EINTR) }, unix.EINTR, nil, false},
		{"missing", func(k *nfttest.Kernel) { refuse(k, unix.NFT_MSG_NEWRULE, unix.ENOENT) }, unix.ENOENT, nft.ErrTableChanged, false},
		{"exists", func(k *nfttest.Kernel) { refuse(k, unix.NFT_MSG_NEWRULE, unix.EEXIST) }, unix.EEXIST, nft.ErrTableChanged, false},
		{"in use", func(k *nfttest.Kernel) { refuse(k, unix.NFT_MSG_NEWRULE, unix.EBUSY) }, unix.EBUSY, nft.ErrTableChanged, false},
		{"answer lost, not done", func(k *nfttest.Kernel) { k.LoseAnswer(false) }, unix.ENOBUFS, nft.ErrUnknownState, false},
		{"answer lost, done", func(k *nfttest.Kernel) { k.LoseAnswer(true) }, unix.ENOBUFS, nft.ErrUnknownState, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			var kernel nfttest.Kernel
			table := open(t, &kernel, "example")
			table.ReplaceTable()
			commit(t, table)
			test.fault(&kernel)
			table.AddChains([]nft.Chain{nft.NewChain("new", nil, nft.NewRule(nft.Drop()))})
			err := table.Commit()
			if !errors.Is(err, test.errno) {
				t.Errorf("error %v, want %v", err, test.errno)
			}
			for _, kind := range []error{nft.ErrTableChanged, nft.ErrUnknownState} {
				if errors.Is(err, kind) != (kind == test.kind) {
					t.Errorf("error %v, and it should wrap %v", err, test.kind)
				}
			}
			kernel.Refuse = nil
			if isDone := len(chains(t, table)) == 1; isDone != test.isDone {
				t.Errorf("the kernel has the chain: %v", isDone)
			}
			before := kernel.Generation()
			commit(t, table)
			if kernel.Generation() != before {
				t.Error("what failed is sent again")
			}
		})
	}
}

// TestDeleteTable: a table is deleted once, and a failed listing fails the Commit.
func TestDeleteTable(t *testing.T) {
	var kernel nfttest.Kernel
	table, other := open(t, &kernel, "example"), open(t, &kernel, "other")
	for _, table := range []*nft.Table{table, other} {
		table.ReplaceTable()
		commit(t, table)
	}
	refuse(&kernel, unix.NFT_MSG_GETTABLE, unix.EPERM)
	table.DeleteTable()
	if err := table.Commit(); !errors.Is(err, unix.EPERM) {
		t.Errorf("error %v, want %v", err, unix.EPERM)
	}
	kernel.Refuse = nil
	for _, want := range []bool{true, false} {
		if exists := table.DeleteTable(); exists != want {
			t.Errorf("DeleteTable says %v, want %v", exists, want)
		}
		commit(t, table)
	}
	if exists, err := other.Exists(); !exists || err != nil {
		t.Errorf("the other table exists: %v (%v)", exists, err)
	}
}

// TestInspect lists one table, and says which listing failed.
func TestInspect(t *testing.T) {
	var kernel nfttest.Kernel
	table, other := open(t, &kernel, "example"), open(t, &kernel, "other")
	other.ReplaceTable()
	other.AddChains([]nft.Chain{nft.NewChain("elsewhere", nil)})
	commit(t, other)
	if c, err := table.Inspect(); c != nil || err != nil {
		t.Errorf("without a table Inspect answers %v (%v)", c, err)
	}
	table.ReplaceTable()
	table.AddCounter("packets")
	table.AddChains([]nft.Chain{nft.NewChain("one", nil, nft.NewRule(nft.CountedBy("packets"))), nft.NewChain("two", nil)})
	commit(t, table)
	c, err := table.Inspect()
	if err != nil {
		t.Fatal(err)
	}
	var sets []string
	for _, s := range c.Sets {
		sets = append(sets, s.Name)
	}
	want := [][]string{{"one", "two"}, {"packets"}, {"addresses", "clients"}}
	if diff := cmp.Diff(want, [][]string{chains(t, table), c.Counters, sets}); diff != "" {
		t.Errorf("chains, counters and sets (-want +got):\n%s", diff)
	}
	for kind, want := range map[int]string{
		unix.NFT_MSG_GETTABLE: "list tables", unix.NFT_MSG_GETCHAIN: "list chains",
		unix.NFT_MSG_GETSET: "list sets", unix.NFT_MSG_GETOBJ: "list counters",
	} {
		refuse(&kernel, kind, unix.ENOMEM)
		if _, err := table.Inspect(); !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one that says %q", err, want)
		}
	}
}

// TestReplaceContents: the map that packets fill keeps its elements, and nothing else stays.
func TestReplaceContents(t *testing.T) {
	var kernel nfttest.Kernel
	table := open(t, &kernel, "example")
	table.ReplaceTable()
	table.AddChains([]nft.Chain{nft.NewChain("to", nil), nft.NewChain("from", nil, nft.NewRule(nft.Jump("to")))})
	first, last := nft.AppendAddr(nil, netip.MustParseAddr("10.0.0.0")), nft.AppendAddr(nil, netip.MustParseAddr("10.0.0.255"))
	table.AddElements([]nft.Element{
		{Set: addresses, Key: string(first), End: string(last)},
		{Set: clients, Key: string(first), Data: nft.MarkData(7)},
	})
	commit(t, table)
	c, err := table.Inspect()
	if err != nil {
		t.Fatal(err)
	}
	if !table.HasSet(c, clients) || table.HasSet(nil, clients) {
		t.Error("the map of clients is not found, or found in no table")
	}
	i := slices.IndexFunc(c.Sets, func(s *nftables.Set) bool { return s.Name == "clients" })
	c.Sets[i].Size++
	if table.HasSet(c, clients) {
		t.Error("a map of another size is taken for today's")
	}
	table.ReplaceContents(c, clients)
	table.AddChain(nft.NewChain("new", nil))
	commit(t, table)
	if got := chains(t, table); !slices.Equal(got, []string{"new"}) {
		t.Errorf("chains %v", got)
	}
	for set, want := range []int{addresses: 0, clients: 1} {
		elements, err := table.Read(nft.SetID(set))
		if err != nil || len(elements) != want {
			t.Errorf("set %d has %d elements (%v), want %d", set, len(elements), err, want)
		}
	}
}

// TestTry: the kernel sees everything and keeps nothing.
func TestTry(t *testing.T) {
	var kernel nfttest.Kernel
	table := open(t, &kernel, "example")
	write := func() { table.AddChains([]nft.Chain{nft.NewChain("new", nil, nft.NewRule(nft.Drop()))}) }
	if err := table.Try(write); err != nil {
		t.Error(err)
	}
	refuse(&kernel, unix.NFT_MSG_NEWRULE, unix.ENOENT)
	if err := table.Try(write); !errors.Is(err, unix.ENOENT) {
		t.Errorf("error %v, want %v", err, unix.ENOENT)
	}
	if n := kernel.Generation(); n != 0 {
		t.Errorf("%d changes", n)
	}
}

// TestReadAll reads sets of more than one message, but none that packets fill.
func TestReadAll(t *testing.T) {
	var kernel nfttest.Kernel
	table := open(t, &kernel, "example")
	table.ReplaceTable()
	var list []nft.Element
	a := netip.MustParseAddr("10.0.0.0")
	for range 1000 {
		key := string(nft.AppendAddr(nil, a))
		list = append(list, nft.Element{Set: addresses, Key: key, End: key})
		a = a.Next().Next()
	}
	list = append(list, nft.Element{Set: clients, Key: list[0].Key, Data: nft.MarkData(1)})
	table.AddElements(list)
	commit(t, table)
	bounds := 0
	err := table.ReadAll(func(set nft.SetID, elements []nftables.SetElement) {
		if set != addresses {
			t.Errorf("set %d is read", set)
		}
		bounds += len(elements)
	})
	if err != nil || bounds != 2000 {
		t.Errorf("%d bounds of 1000 ranges (%v)", bounds, err)
	}
	refuse(&kernel, unix.NFT_MSG_GETSETELEM, unix.EINTR)
	if err := table.ReadAll(func(nft.SetID, []nftables.SetElement) {}); !errors.Is(err, unix.EINTR) {
		t.Errorf("error %v, want %v", err, unix.EINTR)
	}
}

// TestCompare: what another program adds and removes is named, and Correct repairs
// elements.
func TestCompare(t *testing.T) {
	var kernel nfttest.Kernel
	table, other := open(t, &kernel, "example"), open(t, &kernel, "example")
	ranges := func(from, to byte) (list []nft.Element) {
		for n := from; n < to; n++ {
			key := string([]byte{10, 0, n, 0})
			list = append(list, nft.Element{Set: addresses, Key: key, End: key})
		}
		return list
	}
	wanted := ranges(1, 4)
	own := []nft.Chain{nft.NewChain("a", nil, nft.NewRule(nft.Drop())), nft.NewChain("b", nil)}
	table.ReplaceTable()
	table.AddChains(own)
	table.AddElements(wanted)
	table.AddElements([]nft.Element{{Set: clients, Key: string([]byte{10, 0, 0, 1}), Data: nft.MarkData(1)}})
	commit(t, table)
	compare := func(want ...string) *nft.Difference {
		t.Helper()
		have, err := table.ReadElements()
		if err != nil {
			t.Fatal(err)
		}
		d := table.Compare(have, func(emit func(nft.Element)) {
			for _, e := range wanted {
				emit(e)
			}
		})
		if diff := cmp.Diff(want, d.Texts()); diff != "" {
			t.Errorf("elements (-want +got)\n%s", diff)
		}
		return d
	}
	compareChains := func(want ...string) {
		t.Helper()
		c, err := table.Inspect()
		if err != nil {
			t.Fatal(err)
		}
		got, err := table.CompareChains(c, own)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("chains (-want +got), %v\n%s", err, diff)
		}
	}
	compare()
	compareChains()

	other.RemoveElements(ranges(1, 2))
	other.AddElements(ranges(10, 12))
	commit(t, other)
	table.Correct(compare("set addresses lacks 2 elements", "set addresses has 4 elements that signalbox did not write"))
	commit(t, table)
	compare()

	other.RewriteChains([]nft.Chain{nft.NewChain("a", nil, nft.NewRule(nft.Return()))})
	commit(t, other)
	compareChains("chain a has another rule, with handle 0, in the place of: drop")
	other.RewriteChains([]nft.Chain{nft.NewChain("a", nil, nft.NewRule(nft.Drop()).Comment("mine"))})
	commit(t, other)
	compareChains("chain a has another rule, with handle 0, in the place of: drop")

	other.DeleteChain("b")
	other.RewriteChains([]nft.Chain{nft.NewChain("a", nil)})
	other.AddChain(nft.NewChain("c", nil))
	commit(t, other)
	compareChains("chain a has 0 rules instead of 1", "chain b is missing", "chain c is not signalbox's")
	otherSets, err := nft.Open(nft.FamilyOf(plan.IPv4), "example", []*nft.Set{newSets()[0], nft.NewSet("clients", []nft.Field{nft.AddrField}, nil, "")}, kernel.Connection())
	if err != nil {
		t.Fatal(err)
	}
	defer otherSets.Close()
	otherSets.ReplaceTable()
	otherSets.AddChains([]nft.Chain{own[0], nft.NewChain("b", nft.NewHook(nftables.ChainHookOutput, 0, ""))})
	commit(t, otherSets)
	compareChains("set clients has another type", "chain b has another type, hook, priority or policy")
	other.DeleteTable()
	commit(t, other)
	compareChains("the table is missing")
}
