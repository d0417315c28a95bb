// SPDX-License-Identifier: Apache-2.0

package manifests

import (
	"context"
	"net/netip"
	"testing"

	"signalbox/internal/cluster"
)

// shared is the control plane that every test applies to; each leaves it as it
// found it.
var shared *cluster.Cluster

func TestMain(m *testing.M) {
	cluster.Share(m, cluster.Options{
		ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:10:96::/112")},
		Advertise:    netip.MustParseAddr("192.0.2.1"),
	}, func(_ context.Context, c *cluster.Cluster) error {
		shared = c
		return nil
	})
}
