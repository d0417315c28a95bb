// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"testing"

	"signalbox/internal/nstest"
	"signalbox/proxier/plan"
)

// The table goes, and other tables stay as they are, also those whose names are
// nearly the same.
func TestCleanup(t *testing.T) {
	nstest.Enter(t)
	const foreign = `table ip signalbox-2 { chain signalbox { type nat hook prerouting priority dstnat; ip daddr 10.0.0.1 accept; }; }
table ip kube-proxy { chain services { }; }
table inet kube-proxy { set signalbox { type ipv4_addr; elements = { 10.0.0.1 }; }; }
table ip filter { chain DOCKER { counter; }; }
`
	nstest.NFT(t, foreign, "-f", "-")
	before := nstest.NFT(t, "", "list", "ruleset")
	for _, f := range plan.Families {
		if err := newProxier(t, f).Sync(t.Context(), &plan.Plan{Family: f}, plan.Change{All: true}); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range plan.Families {
		if removed, _, err := (Dataplane{}).Cleanup(f, false); err != nil || !removed {
			t.Fatalf("something was removed: %v, %v", removed, err)
		}
	}
	if after := nstest.NFT(t, "", "list", "ruleset"); after != before {
		t.Errorf("left is\n%s\nwant\n%s", after, before)
	}
	gen := nstest.Generation(t)
	for _, f := range plan.Families {
		if removed, _, err := (Dataplane{}).Cleanup(f, false); err != nil || removed {
			t.Errorf("something of ours was removed: %v, %v", removed, err)
		}
	}
	if now := nstest.Generation(t); now != gen {
		t.Errorf("with nothing to remove, the kernel counted %d transactions", now-gen)
	}
}
