// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"errors"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"signalbox/internal/measure"
	"signalbox/proxier/plan"
)

var update = flag.Bool("update", false, "write the golden files anew")

func checkGolden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

// sample is a result with every kind of row in it, two of them wrong.
func sample(t *testing.T, family plan.Family) *familyResult {
	uneven := rowOf(t, "NodePort, Cluster", nodeUnderTest, found(nodeAddr, 4, 3, 2, 1), nodeAddr)
	uneven.tallies["udp"] = failing(found(nodeAddr, 1, 2, 3, 3), 1, syscall.EHOSTUNREACH)
	return &familyResult{
		family: family, serving: 48 * time.Millisecond,
		rows: []row{
			rowOf(t, "ClusterIP", clientPod, found(podAddr, 3, 1, 2, 4), podAddr),
			rowOf(t, "ClusterIP", outsideClient, found(nodeAddr, 3, 1, 2, 4), netip.MustParseAddr("10.244.1.1"), nodeAddr),
			rowOf(t, "ClusterIP, no Pod", clientPod, failing(newTally(), 10, syscall.ECONNREFUSED), podAddr),
			rowOf(t, "NodePort, Local", outsideClient, found(nodeAddr, 5, 5), clientAddr),
			uneven,
		},
		changes: []time.Duration{3 * time.Millisecond, 2 * time.Millisecond, 9 * time.Millisecond},
		connects: measure.Latencies{
			Through: []time.Duration{3 * time.Millisecond, 4 * time.Millisecond, 5 * time.Millisecond},
			Direct:  []time.Duration{2 * time.Millisecond, 2 * time.Millisecond, 2 * time.Millisecond},
		},
	}
}

func TestLayout(t *testing.T) {
	var b strings.Builder
	p := &printer{out: &b}
	p.opening(&Config{Modes: []Mode{{Name: "nftables"}, {Name: "ipvs"}}, Families: plan.Families}, 10)
	results := []*modeResult{
		{mode: "nftables", memory: 40 << 20, processor: 120 * time.Millisecond,
			families: []*familyResult{sample(t, plan.IPv4), sample(t, plan.IPv6)}},
		{mode: "ipvs", unsupported: []error{errors.New("mode ipvs cannot serve IPv4: ip_vs is missing")},
			families: []*familyResult{{family: plan.IPv6}}}, // a step failed before anything was found
	}
	for _, m := range results {
		p.heading(m.mode)
		for _, f := range m.families {
			if len(f.rows) > 0 {
				p.table(m.mode, f, 10)
				p.changes(f)
				p.connects(f)
			}
		}
	}
	p.comparison(results)
	p.printf("%v\n", verdict(results))
	if p.err != nil {
		t.Fatal(p.err)
	}
	checkGolden(t, "layout.txt", b.String())
}

func TestNothingShownIsAnError(t *testing.T) {
	err := verdict([]*modeResult{{mode: "ipvs", unsupported: []error{errors.New("no ip_vs")}}})
	if err == nil || !strings.Contains(err.Error(), "no mode could be shown") {
		t.Errorf("got error %v, want that no mode could be shown", err)
	}
}

func TestPrinterStopsAtTheFirstError(t *testing.T) {
	w := &limitedWriter{allowed: 1}
	stopped := 0
	p := &printer{out: w, stop: func() { stopped++ }}
	p.line("one")
	p.line("two")
	p.columns([][]string{{"three"}})
	if !errors.Is(p.err, errFull) || w.calls != 2 || stopped != 1 {
		t.Errorf("got error %v after %d writes and %d stops, want %v after 2 and 1", p.err, w.calls, stopped, errFull)
	}
}

var errFull = errors.New("nothing more goes in")

type limitedWriter struct{ allowed, calls int }

func (w *limitedWriter) Write(b []byte) (int, error) {
	w.calls++
	if w.calls > w.allowed {
		return 0, errFull
	}
	return len(b), nil
}
