package e2e

import (
	"context"
	"net/netip"
	"os"
	"testing"

	"signalbox/internal/cluster"
	"signalbox/internal/netlab"
)

// What every test shares. Tests run one after another, and each leaves the
// cluster as it found it.
var (
	binaries  cluster.Binaries
	signalbox string // path of the program under test
	shared    *cluster.Cluster
)

func TestMain(m *testing.M) {
	cluster.Share(m, clusterOptions(), func(ctx context.Context, c *cluster.Cluster) (err error) {
		shared, binaries = c, c.Binaries()
		if signalbox = os.Getenv("SIGNALBOX"); signalbox == "" {
			signalbox, err = cluster.BuildSignalbox(ctx)
		}
		return err
	})
}

// clusterOptions make a dual-stack cluster whose cluster IPs the lab's router
// sends to node1, and whose API server is behind that router.
func clusterOptions() cluster.Options {
	return cluster.Options{
		ServiceCIDRs: []netip.Prefix{netlab.ServiceNetwork.V4, netlab.ServiceNetwork.V6},
		Advertise:    routerAddr,
	}
}

// routerAddr is where the nodes of a lab reach the API server.
var routerAddr = netlab.NodeNetwork.V4.Addr().Next()
