// SPDX-License-Identifier: Apache-2.0

package kubeproxy

import (
	"testing"

	"signalbox/internal/nstest"
	"signalbox/nft"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// kube-proxy's table is found and goes, and other tables stay as they are, also
// those whose names are nearly the same.
func TestTable(t *testing.T) {
	nstest.Enter(t)
	var taken proxier.TakenOver
	const foreign = `table ip kube-proxy-2 { chain kube-proxy { type nat hook prerouting priority dstnat; ip daddr 10.0.0.1 accept; }; }
table inet kube-proxy { set services { type ipv4_addr; elements = { 10.0.0.1 }; }; }
table ip signalbox { chain services { }; }
`
	nstest.NFT(t, foreign, "-f", "-")
	before := nstest.NFT(t, "", "list", "ruleset")
	for _, f := range plan.Families {
		if hasTable(t.Context(), f, taken) {
			t.Errorf("a table of %s is found that is not there", f)
		}
		nstest.NFT(t, "table "+nft.FamilyOf(f).Word+" kube-proxy { chain services { }; }", "-f", "-")
		if !hasTable(t.Context(), f, taken) {
			t.Errorf("the table of %s is not found", f)
		}
	}
	for _, f := range plan.Families {
		if removed, _, err := removeTable(f, taken, false); err != nil || !removed {
			t.Errorf("the table of %s was removed: %v, %v", f, removed, err)
		}
	}
	if after := nstest.NFT(t, "", "list", "ruleset"); after != before {
		t.Errorf("left is\n%s\nwant\n%s", after, before)
	}
	for _, f := range plan.Families {
		if removed, _, err := removeTable(f, taken, false); err != nil || removed {
			t.Errorf("something was removed without a table of %s: %v, %v", f, removed, err)
		}
	}
}
