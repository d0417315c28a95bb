// SPDX-License-Identifier: Apache-2.0

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

// run returns what a command of the lab prints.
func run(t *testing.T, args ...string) string {
	t.Helper()
	if err := cluster.NeverCached(t.Context()); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), lab, append(args, "--signalbox", signalbox)...).CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
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

// TestCompareObjects compares the Services of a dump, as kubectl prints it. The proxies
// run on the Node beta.
func TestCompareObjects(t *testing.T) {
	t.Parallel()
	out := run(t, "compare", "--objects", "testdata/cluster.yaml", "--node", "beta", "--out", t.TempDir())
	for _, want := range []string{
		"beta becomes node1, and the 2 others node2",
		"ingress/edge: the source range 81.2.69.0/24 becomes 198.51.100.0/24",
		"kube-proxy (nftables), 5 of 5 cases: ",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the output has no %q", want)
		}
	}
}

// TestBench measures a few Services once, from an API server and from a directory. No
// figure decides; `make bench` has the figures.
func TestBench(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"apiserver": {"--kube-proxy", "--kube-proxy-mode", "nftables"},
		"directory": {"--source", "directory"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testBench(t, args...)
		})
	}
}

func testBench(t *testing.T, args ...string) {
	dir := t.TempDir()
	run(t, append([]string{"bench", "--mode", "nftables", "--services", "20", "--rounds", "1", "--moves", "2", "--short", "--out", dir}, args...)...)
	report, err := os.ReadFile(filepath.Join(dir, "report.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []string{
		"cold start", "restart with nothing changed", "restart after changes", "one endpoint moves", "processor during", "memory of the process",
		"IPv4: connect through", "IPv4: new connections", "IPv4: bytes in a second", "IPv4: first datagram",
	} {
		if !strings.Contains(string(report), "\n| "+row) {
			t.Errorf("the report has no row %q:\n%s", row, report)
		}
	}
	for line := range strings.Lines(string(report)) {
		if strings.Contains(line, "| - |") || strings.Contains(line, " failed: ") {
			t.Errorf("a figure is missing: %s", line)
		}
	}
}
