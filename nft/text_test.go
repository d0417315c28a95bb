// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"

	"signalbox/internal/nstest"
	"signalbox/proxier/plan"
)

// TestRenderTable prints a table with a part of every kind, and compares it with what nft
// lists after the table is written.
func TestRenderTable(t *testing.T) {
	for _, family := range plan.Families {
		t.Run(family.String(), func(t *testing.T) {
			nstest.Enter(t)
			f := FamilyOf(family)
			const ranges, ids, verdicts = 0, 1, 2
			id := []Field{MarkDatum}
			sets := []*Set{
				NewSet("ranges", []Field{AddrField}, nil, "a set of ranges").OfRanges(),
				NewSet("ids", []Field{AddrField, PortField}, id, ""),
				{Name: "verdicts", Key: []Field{ClassIDField}, Verdicts: true},
				NewSet("clients", []Field{AddrField, ClassIDField}, id, "").Remembering(64),
			}
			hook := NewHook(nftables.ChainHookForward, *nftables.ChainPriorityFilter, "type filter hook forward priority filter")
			chains := []Chain{
				NewChain("leaf", nil, NewRule(Return())),
				NewChain("base", hook,
					NewRule(In(f.Saddr(), "ranges"), CountedBy("packets"), Drop()).Comment("a comment"),
					NewRule(StateNew(), SetPriorityFrom(MarkLookedUp(Join(f.Daddr(), DPort), "ids"))),
					NewRule(Remember("clients", Join(f.Saddr(), Priority), Priority, 3*time.Hour+5*time.Second)),
					NewRule(VerdictOf(Priority, "verdicts")),
					NewRule(TCPPortIs(6443), Return()),
					NewRule(MidStream(), Reset()),
				),
			}
			prefix := netip.PrefixFrom(f.loopback.Addr(), f.HostBits()-4).Masked()
			first := AppendAddr(nil, prefix.Addr())
			elements := []Element{
				{Set: ranges, Key: string(first), End: string(AppendAddr(nil, LastAddr(prefix))), Comment: "a prefix"},
				{Set: ids, Key: string(AppendPort(first, 80)), Data: MarkData(0x10002)},
				{Set: verdicts, Key: MarkKey(0x10002), Chain: "leaf"},
			}
			table, err := Open(f, "example", sets)
			if err != nil {
				t.Fatal(err)
			}
			defer table.Close()
			table.ReplaceTable()
			table.AddCounter("packets")
			table.AddChains(chains)
			table.AddElements(elements)
			if err := table.Commit(); err != nil {
				t.Fatal(err)
			}
			listed, err := exec.Command("nft", "list", "table", f.Word, "example").CombinedOutput()
			if err != nil {
				t.Fatalf("nft: %v\n%s", err, listed)
			}
			rendered := RenderTable(f, "example", []string{"packets"}, sets, elements, chains)
			if diff := cmp.Diff(lines(rendered), lines(string(listed))); diff != "" {
				t.Errorf("-rendered +listed:\n%s", diff)
			}
		})
	}
}

// lines are those with text: nft puts empty ones elsewhere.
func lines(text string) (list []string) {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" {
			list = append(list, line)
		}
	}
	return list
}
