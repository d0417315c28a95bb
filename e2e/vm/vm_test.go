// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"signalbox/internal/cluster"
	"signalbox/proxier/conformance"
)

var iptables = []string{
	"iptables-nft", "iptables-nft-save", "iptables-nft-restore", "ip6tables-nft", "ip6tables-nft-save", "ip6tables-nft-restore",
	"iptables-legacy", "iptables-legacy-save", "iptables-legacy-restore", "ip6tables-legacy", "ip6tables-legacy-save", "ip6tables-legacy-restore",
}

// systemIPTables are the names that kube-proxy calls in ipvs mode.
var systemIPTables = []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"}

// TestFeatures fails where the kernel or a tool lacks what the modes need, and
// says so more plainly than the contract can.
func TestFeatures(t *testing.T) {
	guestTest{pkg: "./features", tags: "guest", tools: append([]string{"nft"}, iptables...)}.run(t)
}

// TestLab shows that a lab works on this kernel, without any mode.
func TestLab(t *testing.T) {
	guestTest{dir: "../..", pkg: "./internal/netlab", tools: []string{"nft", "readlink"}}.run(t)
}

// soak repeats in the machine what the host's kernel proves as well.
var soak = flag.Bool("soak", false, "run every mode against the whole contract, not only what needs the machine's kernel")

// TestContract runs the IPVS mode against the contract; -run can name another.
func TestContract(t *testing.T) { contract("^TestIPVS$").run(t) }

// onlyHere are scenarios that need the machine's kernel: SCTP in every mode, and
// for the modes that speak nf_tables one of each kind of rule and object, as
// older kernels lack some.
const onlyHere = `^TestIPTables$/./^(sctp|ports-sctp)$|^(TestNFTables|TestUserspace)$/^(` +
	`sctp|ports-sctp|clusterip-basic|nodeport-basic|nodeport-addresses-cidr|externalip-basic|affinity-sticky|affinity-timeout|` +
	`source-ranges-overlap|no-endpoints-refused|hairpin|external-policy-local|unused-clusterip|change-ports|restart|restart-affinity|udp-stale-endpoint)$`

// TestOtherModes runs the other modes against a part of the contract, or with
// -soak against all of it.
func TestOtherModes(t *testing.T) {
	if *soak {
		contract("^(TestIPTables|TestNFTables|TestUserspace)$").run(t)
		return
	}
	contract(onlyHere).run(t)
}

func contract(only string) guestTest {
	return guestTest{dir: "../..", pkg: "./proxier/conformance", tools: append([]string{"nft"}, iptables...), only: only}
}

// TestBrokenSourceRanges breaks the rule about source ranges that the modes share: the
// contract must fail in the IPVS mode, too.
func TestBrokenSourceRanges(t *testing.T) {
	overlay, err := conformance.BreakSourceRanges("../..", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	g := contract("^TestBrokenSourceRanges$/^ipvs$")
	g.overlay, g.env = overlay, []string{"SIGNALBOX_BROKEN_SOURCE_RANGES=1"}
	g.run(t)
}

// TestIPVS runs the tests of the IPVS mode alone, which most machines' kernels
// cannot. What the mode costs is measured only when asked for.
func TestIPVS(t *testing.T) {
	guestTest{dir: "../..", pkg: "./ipvs", tools: []string{"nft"}, skip: "^TestCost$"}.run(t)
}

// TestNotifications runs the tests for which the kernel's order of counting and notifying
// matters.
func TestNotifications(t *testing.T) {
	guestTest{dir: "../..", pkg: "./nft/notify", tools: []string{"nft"}, only: "^TestMute"}.run(t)
}

// TestNodeFaults runs the daemon's tests that need this kernel: kill -9, `signalbox trace` and
// --reset-removed-endpoints in ipvs mode, and a table of connections that is full.
func TestNodeFaults(t *testing.T) {
	guestTest{
		dir: "../..", pkg: "./daemon", only: "^(TestKilled|TestTrace|TestResetRemovedEndpoints)$/^ipvs$|^TestConntrackTableFull$", tools: append([]string{"nft"}, iptables...),
		programs: map[string]string{"SIGNALBOX": buildSignalbox(t)},
	}.run(t)
}

// TestKilled runs kill -9 in ipvs mode again and again.
func TestKilled(t *testing.T) {
	if !*soak {
		t.Skip("it takes an hour: -soak runs it; TestNodeFaults runs it once")
	}
	guestTest{
		dir: "../..", pkg: "./daemon", only: "^TestKilled$/^ipvs$", tools: append([]string{"nft"}, iptables...), count: 200,
		programs: map[string]string{"SIGNALBOX": buildSignalbox(t)},
	}.run(t)
}

// TestKubeProxy hands a node from the real kube-proxy in ipvs mode to signalbox
// and back: to its ipvs mode, and with -soak to its nftables mode.
func TestKubeProxy(t *testing.T) {
	programs, signalbox := build(t)
	g := guestTest{
		pkg: "./kubeproxy", tags: "guest", only: "^TestTakeover$/^ipvs$", tools: append([]string{"nft", "ipset"}, iptables...),
		programs: map[string]string{"SIGNALBOX_VM_KUBE_PROXY": programs.KubeProxy, "SIGNALBOX_VM_SIGNALBOX": signalbox},
	}
	if *soak {
		g.only = ""
	}
	g.run(t)
}

// TestCompare runs `lab compare` on random Services, in ipvs mode, and with SCTP in other
// modes. A real API server takes minutes on an emulated processor.
func TestCompare(t *testing.T) {
	if !*soak {
		t.Skip("it takes minutes: -soak runs it")
	}
	programs, signalbox := build(t)
	// The machine mounts its own /tmp.
	lab, err := filepath.Abs("../.cache/lab")
	if err != nil {
		t.Fatal(err)
	}
	goBuild(t, "../..", "build", "-o", lab, "./cmd/lab")
	guestTest{
		pkg: "./compare", tags: "guest", tools: slices.Concat([]string{"nft", "ipset"}, systemIPTables, iptables),
		programs: map[string]string{
			"SIGNALBOX_VM_ETCD": programs.Etcd, "SIGNALBOX_VM_API_SERVER": programs.APIServer, "SIGNALBOX_VM_KUBE_PROXY": programs.KubeProxy,
			"SIGNALBOX_VM_SIGNALBOX": signalbox, "SIGNALBOX_VM_LAB": lab,
		},
	}.run(t)
}

// build makes the programs of Kubernetes and signalbox.
func build(t *testing.T) (programs cluster.Binaries, signalbox string) {
	t.Helper()
	programs, err := cluster.Build(t.Context(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	return programs, buildSignalbox(t)
}

// buildSignalbox makes signalbox, or takes the program that SIGNALBOX names.
func buildSignalbox(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("SIGNALBOX"); path != "" {
		return path
	}
	path, err := cluster.BuildSignalbox(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return path
}
