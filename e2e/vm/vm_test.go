package vm

import (
	"flag"
	"testing"
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

// soak repeats in the machine what this machine's kernel proves as well.
var soak = flag.Bool("soak", false, "run every mode against the whole contract, not only what needs the machine's kernel")

// onlyHere are the scenarios that need the machine's kernel: all of the IPVS
// mode, SCTP in every mode, and for the modes that speak nf_tables one of each
// kind of rule and object, as older kernels lack some.
const onlyHere = `^TestIPVS$|^TestIPTables$/./^(sctp|ports-sctp)$|^(TestNFTables|TestUserspace)$/^(` +
	`sctp|ports-sctp|clusterip-basic|nodeport-basic|nodeport-addresses-cidr|externalip-basic|affinity-sticky|affinity-timeout|` +
	`source-ranges-overlap|no-endpoints-refused|hairpin|external-policy-local|unused-clusterip|change-ports|restart|restart-affinity|udp-stale-endpoint)$`

// TestContract runs the modes against the contract. What tests the contract
// itself needs no second kernel.
func TestContract(t *testing.T) {
	g := guestTest{
		dir: "../..", pkg: "./proxier/proxiertest", tools: append([]string{"nft"}, iptables...), skip: "^(TestReference|TestFaultsAreFound)$",
	}
	if !*soak {
		g.only = onlyHere
	}
	g.run(t)
}

// TestIPVS runs the tests of the IPVS mode alone, which most machines' kernels
// cannot. What the mode costs is measured only when asked for.
func TestIPVS(t *testing.T) {
	guestTest{dir: "../..", pkg: "./ipvs", tools: []string{"nft"}, skip: "^TestCost$"}.run(t)
}
