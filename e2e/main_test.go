package e2e

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

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

// neverCached keeps `go test` from taking this run's result for the next one's:
// it does not see that the program under test, which it did not build, has
// changed. It trusts no file that looks newer than its own clock.
func neverCached() error {
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	mark := filepath.Join(dir, ".cache", "never-cached")
	if err := os.WriteFile(mark, nil, 0o644); err != nil {
		return err
	}
	future := time.Now().Add(24 * time.Hour)
	if err := os.Chtimes(mark, future, future); err != nil {
		return err
	}
	_, err = os.Stat(mark) // what a test looks at, its result depends on; TestMain is not a test
	return err
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
