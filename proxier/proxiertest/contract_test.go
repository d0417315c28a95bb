package proxiertest_test

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"signalbox/conntrack"
	"signalbox/nftables"
	"signalbox/proxier"
	"signalbox/proxier/proxiertest"
)

func TestReference(t *testing.T) {
	proxiertest.Run(t, proxiertest.Mode{
		Name:      "nftables-reference",
		New:       newReference,
		Supported: func(proxier.Family) error { return nil },
		Flows:     cleanFlows,
		Dump:      dumpNFT,
	})
}

func TestNFTables(t *testing.T) {
	proxiertest.Run(t, proxiertest.Mode{
		Name:      nftables.Mode,
		New:       func(o proxier.Options) (proxier.Proxier, error) { return nftables.New(o) },
		Supported: nftables.Supported,
		Flows:     cleanFlows,
		Dump:      dumpNFT,
	})
}

func cleanFlows(localAddrs func() ([]netip.Addr, error)) (proxiertest.Flows, error) {
	return conntrack.New(conntrack.Options{LocalAddrs: localAddrs})
}

// dumpNFT is read by people only; without nft on the machine they see why it
// is missing.
func dumpNFT(family proxier.Family) string {
	f := map[proxier.Family]string{proxier.IPv4: "ip", proxier.IPv6: "ip6"}[family]
	out, err := exec.Command("nft", strings.Fields("list ruleset "+f)...).CombinedOutput()
	if err != nil {
		return err.Error() + ": " + string(out)
	}
	return string(out)
}
