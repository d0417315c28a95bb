package ipvs

import (
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"signalbox/nftables"
	"signalbox/proxier"
)

// inNamespace moves the test to a network namespace of its own until it ends.
// The thread is not unlocked: it ends with the test's goroutine.
func inNamespace(tb testing.TB) {
	tb.Helper()
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		tb.Fatalf("new network namespace (this test needs root): %v", err)
	}
	tb.Cleanup(func() { ns.Close() })
}

// TestKernelTakesRules writes each chain by itself, so that a rule that the
// kernel refuses is named.
func TestKernelTakesRules(t *testing.T) {
	for _, family := range proxier.Families {
		t.Run(family.String(), func(t *testing.T) {
			inNamespace(t)
			f := nftables.FamilyOf(family)
			table, err := nftables.OpenTable(f, tableName, newSets())
			if err != nil {
				t.Fatal(err)
			}
			defer table.Close()
			rules := &ruleset{IPFamily: f, mark: proxier.DefaultMasqueradeMark,
				timeouts: []time.Duration{time.Second, 3 * time.Hour},
				node: proxier.Node{
					LocalPods:     proxier.LocalPods{Interface: "cni0", InterfacePrefix: "veth"},
					NodePortAddrs: proxier.NodePortAddrs{All: true},
				}}
			table.ReplaceTable()
			if err := table.Commit(); err != nil {
				t.Fatal(err)
			}
			for _, c := range rules.chains() {
				table.AddChains([]nftables.Chain{c})
				if err := table.Commit(); err != nil {
					t.Errorf("%s: %v", c.Text(), err)
				}
			}
		})
	}
}
