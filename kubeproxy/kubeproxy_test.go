package kubeproxy

import (
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netns"

	"signalbox/nft"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

func nftText(t *testing.T, input string, args ...string) string {
	t.Helper()
	cmd := exec.Command("nft", args...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", cmd, err, out)
	}
	return string(out)
}

// kube-proxy's table is found and goes, and other tables stay as they are, also
// those whose names are nearly the same.
func TestTable(t *testing.T) {
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Fatalf("new network namespace (this test needs root): %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	var taken proxier.TakenOver
	const foreign = `table ip kube-proxy-2 { chain kube-proxy { type nat hook prerouting priority dstnat; ip daddr 10.0.0.1 accept; }; }
table inet kube-proxy { set services { type ipv4_addr; elements = { 10.0.0.1 }; }; }
table ip signalbox { chain services { }; }
`
	nftText(t, foreign, "-f", "-")
	before := nftText(t, "", "list", "ruleset")
	for _, f := range plan.Families {
		if hasTable(t.Context(), f, taken) {
			t.Errorf("a table of %s is found that is not there", f)
		}
		nftText(t, "table "+nft.FamilyOf(f).Word+" kube-proxy { chain services { }; }", "-f", "-")
		if !hasTable(t.Context(), f, taken) {
			t.Errorf("the table of %s is not found", f)
		}
	}
	for _, f := range plan.Families {
		if removed, _, err := removeTable(f, taken, false); err != nil || !removed {
			t.Errorf("the table of %s was removed: %v, %v", f, removed, err)
		}
	}
	if after := nftText(t, "", "list", "ruleset"); after != before {
		t.Errorf("left is\n%s\nwant\n%s", after, before)
	}
	for _, f := range plan.Families {
		if removed, _, err := removeTable(f, taken, false); err != nil || removed {
			t.Errorf("something was removed without a table of %s: %v, %v", f, removed, err)
		}
	}
}
