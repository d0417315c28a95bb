// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"signalbox/internal/nstest"
)

// A list with as many clients as the kernel keeps is full; lists of other
// programs do not count.
func TestFullAffinityLists(t *testing.T) {
	nstest.Enter(t)
	want := func(want int) {
		t.Helper()
		if full, err := new(Dataplane).FullAffinityLists(); err != nil || full != want {
			t.Errorf("%d lists are full, %v; want %d", full, err, want)
		}
	}
	want(0)
	run(t, "*filter\n-A INPUT -m recent --name KUBE-SEP-A --set\n-A INPUT -m recent --name KUBE-SEP-B --set\n-A INPUT -m recent --name ours --set\nCOMMIT\n",
		"iptables-nft-restore")
	for list, clients := range map[string]int{"KUBE-SEP-A": 100, "KUBE-SEP-B": 99, "ours": 100} {
		for i := range clients {
			entry := fmt.Appendf(nil, "+10.1.0.%d\n", i)
			if err := os.WriteFile(filepath.Join(recentLists, list), entry, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	want(1)
}
