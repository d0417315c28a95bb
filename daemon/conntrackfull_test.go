// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"signalbox/modes"
	"signalbox/proxier/plan"
)

// TestConntrackTableFull: while the table of connections is full, open connections go on and
// changes are written. When it has room again, new connections are made. The limit is that
// of the whole machine, so the test runs in the virtual machine alone.
func TestConntrackTableFull(t *testing.T) {
	if os.Getenv("SIGNALBOX_VM_RELEASE") == "" {
		t.Skip("it changes a setting of the whole machine: make vm runs it")
	}
	for _, mode := range modes.All {
		t.Run(mode.Name(), func(t *testing.T) { conntrackTableFull(t, mode.Name()) })
	}
}

func conntrackTableFull(t *testing.T, mode string) {
	const limit = "/proc/sys/net/netfilter/nf_conntrack_max"
	lab := newLab(t)
	host, client, before, after := lab.Host("node1"), lab.Host("pod-x"), lab.Host("pod-a"), lab.Host("pod-b")
	source, web := serviceTo(t, before), netip.MustParseAddrPort("10.96.0.10:80")
	log := start(t, host, build(t), "run", "--source", source, "--mode", mode, "--hostname-override=node1", "--cluster-cidr=10.244.0.0/16",
		"--conntrack-max-per-core=0", "--oom-score-adj=0", "--v=4")
	eventually(t, "both families are served", func() bool { return log.count("level=INFO msg=synced") == 2 })
	open, err := client.Open(t.Context(), "tcp", netip.AddrPort{}, web)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	goesOn := func(when string) {
		t.Helper()
		if a, err := open.Ask(t.Context()); err != nil || a.Server != before.Name {
			t.Errorf("%s, the open connection: %v, %v", when, a, err)
		}
	}
	goesOn("before")

	usual, err := os.ReadFile(limit)
	if err != nil {
		t.Fatal(err)
	}
	set := func(text string) {
		t.Helper()
		if err := os.WriteFile(limit, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { set(strings.TrimSpace(string(usual))) })
	set("1")
	eventually(t, "new connections are dropped", func() bool { return !answers(t, client, web, soon) })
	goesOn("while the table is full")
	syncs := log.count("msg=synced family=" + plan.IPv4.String())
	serviceAt(t, source, after)
	eventually(t, "the change is written", func() bool { return log.count("msg=synced family="+plan.IPv4.String()) > syncs })
	set(strings.TrimSpace(string(usual)))
	eventually(t, "new connections go to the new endpoint", answeredBy(t, client, web, after))
	goesOn("afterwards")
}
