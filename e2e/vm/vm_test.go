package vm

import "testing"

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

// TestContract runs every mode against the contract. What tests the contract
// itself needs no second kernel.
func TestContract(t *testing.T) {
	guestTest{
		dir: "../..", pkg: "./proxier/proxiertest", tools: append([]string{"nft"}, iptables...), skip: "^(TestReference|TestFaultsAreFound)$",
	}.run(t)
}

// TestIPVS runs the tests of the IPVS mode alone, which most machines' kernels
// cannot. What the mode costs is measured only when asked for.
func TestIPVS(t *testing.T) {
	guestTest{dir: "../..", pkg: "./ipvs", tools: []string{"nft"}, skip: "^TestCost$"}.run(t)
}
