package nftables

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/google/nftables"

	"signalbox/proxier/plan"
)

// generation is the kernel's count of transactions.
func generation(t *testing.T) uint32 {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	gen, err := conn.GetGen()
	if err != nil {
		t.Fatal(err)
	}
	return gen.ID
}

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

// The table goes, and other tables stay as they are, also those whose names are
// nearly the same.
func TestCleanup(t *testing.T) {
	inNamespace(t)
	const foreign = `table ip signalbox-2 { chain signalbox { type nat hook prerouting priority dstnat; ip daddr 10.0.0.1 accept; }; }
table ip kube-proxy { chain services { }; }
table inet kube-proxy { set signalbox { type ipv4_addr; elements = { 10.0.0.1 }; }; }
table ip filter { chain DOCKER { counter; }; }
`
	nftText(t, foreign, "-f", "-")
	before := nftText(t, "", "list", "ruleset")
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
	if after := nftText(t, "", "list", "ruleset"); after != before {
		t.Errorf("left is\n%s\nwant\n%s", after, before)
	}
	gen := generation(t)
	for _, f := range plan.Families {
		if removed, _, err := (Dataplane{}).Cleanup(f, false); err != nil || removed {
			t.Errorf("something of ours was removed: %v, %v", removed, err)
		}
	}
	if now := generation(t); now != gen {
		t.Errorf("with nothing to remove, the kernel counted %d transactions", now-gen)
	}
}
