//go:build userspace

package proxiertest_test

import (
	"net/netip"
	"strings"
	"testing"

	"signalbox/conntrack"
	"signalbox/internal/netlab"
	"signalbox/proxier"
	"signalbox/proxier/proxiertest"
	"signalbox/userspace"
)

// The userspace mode passes the contract but is not offered yet: on a loaded
// machine its relay loses a UDP answer now and then. Until that is found it
// runs with -tags userspace only.
func TestUserspace(t *testing.T) {
	proxiertest.Run(t, proxiertest.Mode{
		Name:      userspace.Mode,
		New:       func(o proxier.Options) (proxier.Proxier, error) { return userspace.New(o) },
		Supported: userspace.Supported,
		Flows: func(localAddrs func() ([]netip.Addr, error)) (proxiertest.Flows, error) {
			return conntrack.New(conntrack.Options{LocalAddrs: localAddrs, Relays: userspace.RelayPrefixes()})
		},
		Dump: dumpNFT,
		// An answer between two Pods on a bridge, or from the node itself to
		// a Pod, cannot be taken in on its way to the client.
		NodeSource: func(link netlab.PodLink, client, server string) bool {
			return strings.HasPrefix(client, "pod-") && (server == "node1" || link == netlab.Bridged && strings.HasPrefix(server, "pod-"))
		},
	})
}
