// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the tables of docs/compatibility.md anew")

const compatibility = "../../../../docs/compatibility.md"

// tableHead is above each table of the page.
const tableHead = "| kube-proxy 1.37 | signalbox |\n| --- | --- |\n"

// TestTables compares the tables of the page with differences.yaml, their source.
func TestTables(t *testing.T) {
	rules, err := deliberate()
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(compatibility)
	if err != nil {
		t.Fatal(err)
	}
	want, err := withTables(string(page), rules)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(page), want); diff != "" && !*update {
		t.Errorf("docs/compatibility.md differs from differences.yaml: run this test with -update\n%s", diff)
	}
	if *update {
		if err := os.WriteFile(compatibility, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// withTables replaces the tables below the headings that the page has.
func withTables(page string, rules []Rule) (string, error) {
	rows := map[string]string{}
	for _, r := range rules {
		rows[r.Table] += fmt.Sprintf("| %s | %s |\n", r.KubeProxy, r.Signalbox)
	}
	for table, text := range rows {
		before, after, found := strings.Cut(page, "\n### "+table+"\n\n"+tableHead)
		if !found {
			return "", fmt.Errorf("the page has no table %q", table)
		}
		for strings.HasPrefix(after, "|") {
			_, after, _ = strings.Cut(after, "\n")
		}
		page = before + "\n### " + table + "\n\n" + tableHead + text + after
	}
	return page, nil
}

// TestEveryPatternHasAReason: the report prints it.
func TestEveryPatternHasAReason(t *testing.T) {
	rules, err := deliberate()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		if (len(r.Seen) > 0) != (r.Reason != "") {
			t.Errorf("%q has %d patterns and the reason %q", r.KubeProxy, len(r.Seen), r.Reason)
		}
	}
}

func TestPattern(t *testing.T) {
	p := Pattern{Modes: []string{"nftables"}, Clients: []string{"node1"}, Networks: []string{"udp"}, KubeProxy: "not permitted", Signalbox: "refused|silent"}
	if err := p.compile(); err != nil {
		t.Fatal(err)
	}
	rule := Rule{Seen: []Pattern{p}}
	match := func(mode, client, network string, kubeProxy, signalbox Outcome) bool {
		return rule.explains(Config{Mode: mode, KubeProxyMode: mode},
			Difference{Probe: Probe{Client: client, Network: network}, KubeProxy: kubeProxy, Signalbox: signalbox})
	}
	if !match("nftables", "node1", "udp", Outcome{"not permitted"}, Outcome{"refused"}) {
		t.Error("the pattern does not match what it describes")
	}
	for what, matched := range map[string]bool{
		"mode":      match("userspace", "node1", "udp", Outcome{"not permitted"}, Outcome{"refused"}),
		"client":    match("nftables", "pod-x", "udp", Outcome{"not permitted"}, Outcome{"refused"}),
		"network":   match("nftables", "node1", "tcp", Outcome{"not permitted"}, Outcome{"refused"}),
		"kubeProxy": match("nftables", "node1", "udp", Outcome{"refused"}, Outcome{"refused"}),
		"signalbox": match("nftables", "node1", "udp", Outcome{"not permitted"}, Outcome{"pod-a", "refused"}),
	} {
		if matched {
			t.Errorf("the pattern matches another %s", what)
		}
	}
}

// TestPatternSeesDifferingParts: endpoints that answer in both labs do not matter.
func TestPatternSeesDifferingParts(t *testing.T) {
	p := Pattern{KubeProxy: "silent", Signalbox: "pod-c .*"}
	if err := p.compile(); err != nil {
		t.Fatal(err)
	}
	same := "pod-a 10.244.1.10:8080 sees its client"
	d := Difference{KubeProxy: Outcome{same, "silent"}, Signalbox: Outcome{same, "pod-c 10.244.2.10:8080 sees its client"}}
	if !p.matches(Config{}, d) {
		t.Error("a common part prevents the match")
	}
	d.KubeProxy = Outcome{"silent"}
	if p.matches(Config{}, d) {
		t.Error("the pattern matches although another endpoint differs, too")
	}
}
