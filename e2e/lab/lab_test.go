package lab

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"signalbox/internal/cluster"
)

// The programs under test.
var lab, signalbox string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "signalbox-lab-")
	if err == nil {
		lab = filepath.Join(dir, "lab")
		signalbox, err = cluster.BuildSignalbox(context.Background())
	}
	if err == nil {
		build := exec.Command("go", "build", "-o", lab, "./cmd/lab")
		build.Dir, build.Stderr = "../..", os.Stderr
		err = build.Run()
	}
	if err != nil {
		panic(err)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func run(t *testing.T, args ...string) {
	t.Helper()
	if err := cluster.NeverCached(t.Context()); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), lab, append(args, "--signalbox", signalbox)...).CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
}

// TestCompare compares kube-proxy and signalbox on a few random Services. The full form is
// `make compare`.
func TestCompare(t *testing.T) {
	t.Parallel() // all of these tests wait for most of their time
	for _, mode := range []string{"nftables", "iptables-nft"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			run(t, "compare", "--mode", mode, "--random", "20", "--seed", "1", "--out", t.TempDir())
		})
	}
}

// TestBench measures a few Services once. No figure decides; `make bench` has the figures.
func TestBench(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	run(t, "bench", "--kube-proxy", "--mode", "nftables", "--kube-proxy-mode", "nftables",
		"--services", "20", "--rounds", "1", "--moves", "2", "--out", dir)
	report, err := os.ReadFile(filepath.Join(dir, "report.md"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(report)) {
		if strings.Contains(line, "| - |") || strings.Contains(line, " failed: ") {
			t.Errorf("a figure is missing: %s", line)
		}
	}
}
