package vm

import (
	"flag"
	"os"
	"testing"

	"signalbox/internal/cluster"
	"signalbox/proxier/conformance"
)

var iptables = []string{
	"iptables-nft", "iptables-nft-save", "iptables-nft-restore", "ip6tables-nft", "ip6tables-nft-save", "ip6tables-nft-restore",
	"iptables-legacy", "iptables-legacy-save", "iptables-legacy-restore", "ip6tables-legacy", "ip6tables-legacy-save", "ip6tables-legacy-restore",
}

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

// TestKubeProxy hands a node from the real kube-proxy in ipvs mode to signalbox
// and back: to its ipvs mode, and with -soak to its nftables mode.
func TestKubeProxy(t *testing.T) {
	programs, err := cluster.Build(t.Context(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	signalbox := os.Getenv("SIGNALBOX")
	if signalbox == "" {
		if signalbox, err = cluster.BuildSignalbox(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	g := guestTest{
		pkg: "./kubeproxy", tags: "guest", only: "^TestTakeover$/^ipvs$", tools: append([]string{"nft", "ipset"}, iptables...),
		programs: map[string]string{"SIGNALBOX_VM_KUBE_PROXY": programs.KubeProxy, "SIGNALBOX_VM_SIGNALBOX": signalbox},
	}
	if *soak {
		g.only = ""
	}
	g.run(t)
}
