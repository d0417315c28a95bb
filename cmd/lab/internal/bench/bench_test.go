// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"signalbox/internal/netlab"
	"signalbox/proxier/plan"
)

// No endpoint is at an address that a lab uses for something else, and no two share one.
func TestObjectsAreDistinct(t *testing.T) {
	o := &objects{families: plan.Families, services: 50, perSlice: 7}
	seen := map[string]bool{}
	for n := range o.services {
		svc := o.service(n)
		if len(svc.Spec.ClusterIPs) != 2 || svc.Spec.Ports[0].TargetPort.IntValue() != othersPort {
			t.Fatalf("Service %d is %+v", n, svc.Spec)
		}
		for _, f := range o.families {
			for _, e := range o.fullSlice(f, n).Endpoints {
				a := netip.MustParseAddr(e.Addresses[0])
				if seen[a.String()] || !endpointRanges[f].Contains(a) {
					t.Fatalf("endpoint %s of Service %d", a, n)
				}
				seen[a.String()] = true
			}
		}
	}
	if fixed := o.service(o.fixed()); len(fixed.Spec.Ports) != len(connectionPorts) || len(o.slice(plan.IPv6, o.fixed()).Ports) != len(connectionPorts) {
		t.Errorf("the Service for connections has ports %v", fixed.Spec.Ports)
	}
	for _, f := range plan.Families {
		if !netlab.ServiceNetwork.Of(f).Contains(o.clusterIP(f, MaxServices+1)) {
			t.Errorf("%s has no room for %d Services", f, MaxServices)
		}
	}
}

func sampleReport() *Report {
	return &Report{
		Date: "2026-11-29", Machine: "2 x test, Linux 6.18", Command: "lab bench", Families: []string{"IPv4"},
		NoKernelMemory: "no control groups",
		Sizes: []SizeResult{{
			Size:   Size{Services: 1000, Endpoints: 10},
			Rounds: 3,
			Floors: map[string][]float64{"cold_wall": {0.05, 0.04, 0.06}},
			Proxies: []ProxyResult{
				{Program: "signalbox", Mode: "nftables", Moves: []float64{0.002, 0.001}, Figures: map[string][]float64{
					"cold_wall": {0.1, 0.11, 0.1}, "move_p50": {0.001, 0.003, 0.002}, "memory_settled": {32 << 20}, "storm_cpu": {0.03},
				}},
				{Program: "signalbox", Mode: "nftables", Variant: "--max-cpu=10%", Figures: map[string][]float64{"storm_cpu": {0.015}}},
				{Program: "kube-proxy", Mode: "iptables-legacy", Failed: "cold start: no answer\nits log"},
				{Program: "kube-proxy", Mode: "nftables", Moves: []float64{1.5}, Figures: map[string][]float64{
					"cold_wall": {1, 1, 1}, "move_p50": {1, 1, 1}, "memory_settled": {64 << 20},
				}, Floors: map[string][]float64{"move_p50": {0.25}}},
			},
		}},
	}
}

func TestMarkdown(t *testing.T) {
	text := sampleReport().markdown("charts")
	for _, want := range []string{
		"| cold start until every virtual IP answers | 0.100 s (0.1) | - | - | 1.00 s | 0.0500 s |",
		"| one endpoint moves: API write to first packet, median | ~0.00200 s (0.002) | - | - | 1.00 s |  |",
		"| memory of the process, settled | 32.0 MiB (0.5) | - | - | 64.0 MiB |  |",
		"| processor during 100 changes a second | 3.0 % | 1.5 % (0.5) | - | - |  |",
		"| cold start until every virtual IP answers | 2 | - | - | 20 |\n",
		"| one endpoint moves: API write to first packet, median |  | - | - | 4 (250 ms) |\n",
		"### 1000 Services with 10 endpoints each, 3 rounds\n", "| signalbox nftables --max-cpu=10% |",
		"kube-proxy iptables-legacy failed: cold start: no answer\n",
		"(charts/move.svg)", "\nMemory of the kernel is left out: no control groups.\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no line %q in\n%s", want, text)
		}
	}
}

func TestRatioText(t *testing.T) {
	for ratio, want := range map[float64]string{0.034: "0.034", 2.1: "2.1", 99.4: "99", 99.6: "100", 312: "312"} {
		if got := ratioText(ratio); got != want {
			t.Errorf("%v is %q, want %q", ratio, got, want)
		}
	}
}

// A report is the same after it was written and read, its charts are drawn, and it takes
// its place in a document.
func TestWrite(t *testing.T) {
	dir := t.TempDir()
	r := sampleReport()
	if err := r.Write(dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range chartNames() {
		svg, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !strings.Contains(string(svg), "</svg>") || strings.Contains(string(svg), "#-") {
			t.Errorf("%s is no SVG, or has an impossible color (%v): %s", name, err, svg)
		}
	}
	again, err := Read(filepath.Join(dir, "report.json"))
	if err != nil || again.markdown("") != r.markdown("") {
		t.Errorf("the report that was read differs: %v", err)
	}
	document := filepath.Join(dir, "performance.md")
	if err := os.WriteFile(document, []byte("before\n"+sectionBegin+"\nearlier\n"+sectionEnd+"\nafter\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := r.Embed(document, "bench"); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(document)
	if err != nil || strings.Contains(string(text), "earlier") || strings.Count(string(text), "### 1000 Services") != 1 ||
		!strings.HasPrefix(string(text), "before\n") || !strings.HasSuffix(string(text), "\nafter\n") {
		t.Errorf("the document is %v\n%s", err, text)
	}
	if err := r.Embed(filepath.Join(dir, "report.md"), "bench"); err == nil {
		t.Error("a document without marks was accepted")
	}
}

// Each proxy has the reference that tells most.
func TestReference(t *testing.T) {
	s := &SizeResult{Proxies: []ProxyResult{
		{Program: "signalbox", Mode: "nftables"}, {Program: "signalbox", Mode: "userspace"}, {Program: "signalbox", Mode: "ipvs"},
		{Program: "kube-proxy", Mode: "iptables-legacy"}, {Program: "kube-proxy", Mode: "nftables"}, {Program: "haproxy", Mode: "tcp"},
		{Program: "signalbox", Mode: "ipvs", Variant: "--max-cpu=1%"},
	}}
	for i, want := range []string{"kube-proxy nftables", "haproxy tcp", "kube-proxy iptables-legacy", "", "", "", "signalbox ipvs"} {
		got := ""
		if ref := s.reference(&s.Proxies[i]); ref != nil {
			got = ref.name()
		}
		if got != want {
			t.Errorf("%s is compared with %q, not with %q", s.Proxies[i].name(), got, want)
		}
	}
}
