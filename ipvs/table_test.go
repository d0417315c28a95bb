// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"slices"
	"strings"
	"testing"
	"time"

	"signalbox/internal/nstest"
	"signalbox/nft/access"

	"github.com/google/go-cmp/cmp"

	"signalbox/nft"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// TestKernelTakesRules writes each chain alone, so that the error names a refused one.
func TestKernelTakesRules(t *testing.T) {
	for _, family := range plan.Families {
		t.Run(family.String(), func(t *testing.T) {
			nstest.Enter(t)
			f := nft.FamilyOf(family)
			table, err := nft.Open(f, tableName, newSets())
			if err != nil {
				t.Fatal(err)
			}
			defer table.Close()
			rules := newRuleset(f, proxier.DefaultMasqueradeMark, plan.Node{
				LocalPods:     plan.LocalPods{Interface: "cni0", InterfacePrefix: "veth"},
				NodePortAddrs: plan.NodePortAddrs{All: true},
				RouteSources:  routeSources(family),
			}, []time.Duration{time.Second, 3 * time.Hour})
			table.ReplaceTable()
			if err := table.Commit(); err != nil {
				t.Fatal(err)
			}
			for _, c := range rules.chains() {
				table.AddChains([]nft.Chain{c})
				if err := table.Commit(); err != nil {
					t.Errorf("%s: %v", c.Text(), err)
				}
			}
		})
	}
}

func routeSources(f plan.Family) []plan.RouteSource {
	w := world{f}
	return []plan.RouteSource{
		{Link: "eth0", Destination: w.prefix("10.1.0.0/16", "fd00:1::/32")},
		{Link: "eth0", Destination: w.prefix("10.0.0.0/8", "fd00::/8"), Source: w.external(9)},
	}
}

// TestListing compares the listing of nft with the text of Render.
func TestListing(t *testing.T) {
	for _, family := range plan.Families {
		t.Run(family.String(), func(t *testing.T) {
			nstest.Enter(t)
			desired := world{family}.example()
			f := nft.FamilyOf(family)
			table, err := nft.Open(f, tableName, newSets())
			if err != nil {
				t.Fatal(err)
			}
			defer table.Close()
			p := &Proxier{IPFamily: f, table: table}
			st := newState(newRuleset(f, proxier.DefaultMasqueradeMark, desired.Node, affinityTimeouts(nil, desired.Services)))
			b := compileBatch(t, st, desired, desired.Names())
			b.all = true
			compare := func(t *testing.T) {
				out := nstest.NFT(t, "", "list", "table", f.Word, tableName)
				_, want, _ := strings.Cut(render(t, family, desired), "# nft -f\n")
				if diff := cmp.Diff(words(want), words(out)); diff != "" {
					t.Errorf("-rendered +listed:\n%s", diff)
				}
			}
			// The second write keeps the map of clients.
			for range 2 {
				if err := p.writeTable(st, b); err != nil {
					t.Fatal(err)
				}
			}
			compare(t)
			for _, sources := range [][]plan.RouteSource{routeSources(family), routeSources(family)[1:], nil} {
				desired.Node.RouteSources = sources
				rules := *st.rules
				rules.Node = desired.Node
				if err := p.writeTable(st, &batch{node: true, rules: &rules, Difference: &access.Difference{}}); err != nil {
					t.Fatal(err)
				}
				st.rules = &rules
				compare(t)
			}
		})
	}
}

// words sorts the lines of a listing, because the kernel keeps elements in its own order.
// Without /etc/protocols, nft lists numbers.
func words(listing string) []string {
	var lines []string
	for line := range strings.Lines(strings.NewReplacer("elements = {", "\n", ",", "\n", " }", "\n",
		"tcp . ", "6 . ", "udp . ", "17 . ", "sctp . ", "132 . ", "l4proto tcp", "l4proto 6", "l4proto udp", "l4proto 17", "l4proto sctp", "l4proto 132").Replace(listing)) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	return lines
}
