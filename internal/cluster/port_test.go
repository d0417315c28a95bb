// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"testing"
)

// Clusters that look for ports at the same time do not find the same.
func TestPortsAreNotShared(t *testing.T) {
	seen := map[int]bool{}
	clusters := []*Cluster{{}, {}}
	for range 200 {
		for _, c := range clusters {
			port, err := c.freePort()
			if err != nil {
				t.Fatal(err)
			}
			if seen[port] {
				t.Fatalf("port %d was found twice", port)
			}
			seen[port] = true
		}
	}
	for _, c := range clusters {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	}
}
