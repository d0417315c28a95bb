// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"os"
	"testing"

	"signalbox/internal/cluster"
	"signalbox/internal/testbed"
)

// What every test shares. Tests run one after another, and each leaves the
// cluster as it found it.
var (
	binaries  cluster.Binaries
	signalbox string // path of the program under test
	shared    *cluster.Cluster
)

func TestMain(m *testing.M) {
	cluster.Share(m, testbed.ClusterOptions(), func(ctx context.Context, c *cluster.Cluster) (err error) {
		shared, binaries = c, c.Binaries()
		if signalbox = os.Getenv("SIGNALBOX"); signalbox == "" {
			signalbox, err = cluster.BuildSignalbox(ctx)
		}
		return err
	})
}
