// SPDX-License-Identifier: Apache-2.0

package access

import (
	"context"
	"testing"
	"time"

	"signalbox/internal/nstest"
	"signalbox/nft"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// TestWatchBeginsLater: where no descriptor was left to listen, Run tries again. It reports
// what may have changed before, and then each change.
func TestWatchBeginsLater(t *testing.T) {
	nstest.Enter(t)
	nstest.NFT(t, "add table ip services", "-f", "-")
	table, err := nft.Open(nft.FamilyOf(plan.IPv4), "services", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	restore := nstest.NoDescriptors(t)
	w := NewWatch(table)
	restore()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var names []string
	w.Run(ctx, func(w proxier.Writer) { // in the test's network namespace
		if names = append(names, w.Name); len(names) == 2 {
			cancel()
			return
		}
		nstest.NFT(t, "delete table ip services", "-f", "-")
	})
	if len(names) != 2 || names[0] != "" || names[1] != "nft" {
		t.Errorf("reports of %q, want one of nobody and one of nft", names)
	}
}
