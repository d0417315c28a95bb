package compare

import (
	"os/exec"
	"path/filepath"
	"testing"

	"signalbox/internal/cluster"
)

const root = "../.."

// TestRandom compares kube-proxy and signalbox on a few random Services. The full form is
// `make compare`.
func TestRandom(t *testing.T) {
	if err := cluster.NeverCached(t.Context()); err != nil {
		t.Fatal(err)
	}
	signalbox, err := cluster.BuildSignalbox(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	lab := filepath.Join(t.TempDir(), "lab")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", lab, "./cmd/lab")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build ./cmd/lab: %v\n%s", err, out)
	}
	for _, mode := range []string{"nftables", "iptables-nft"} {
		t.Run(mode, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), lab, "compare", "--signalbox", signalbox, "--mode", mode, "--random", "20", "--seed", "1", "--out", t.TempDir())
			out, err := cmd.CombinedOutput()
			t.Logf("%s", out)
			if err != nil {
				t.Error(err)
			}
		})
	}
}
