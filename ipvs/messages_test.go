// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"context"
	"fmt"
	"testing"
	"time"

	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// TestChangeCostsTheSameHoweverMuchThereIs counts the messages to IPVS, the requests that read
// it, and the new elements of the table, for changes in a small and in a large cluster.
func TestChangeCostsTheSameHoweverMuchThereIs(t *testing.T) {
	const endpoints = 10
	for _, services := range []int{10, 1000} {
		t.Run(fmt.Sprint(services), func(t *testing.T) {
			k := newFakeIPVS(t)
			p := k.proxier(t, time.Now)
			desired := conformance.Fleet(plan.IPv4, services, endpoints)
			syncAll(t, p, desired)
			if want := services * (1 + endpoints); len(k.ops) != want {
				t.Errorf("%d messages made everything, not %d", len(k.ops), want)
			}
			for _, change := range []struct {
				name               string
				service, firstPod  int
				messages, elements int
			}{
				{"one endpoint is replaced", 5, 5*endpoints + 1, 2, 0},
				{"all endpoints are replaced", 5, 1_000_001, 2 * endpoints, 0},
				// Its address, its frontend, and two traffic sources to masquerade.
				{"a Service comes", services, 1, 1 + endpoints, 4},
			} {
				k.ops, k.reads = nil, 0
				before := elementCount(p)
				syncOne(t, p, desired, conformance.FleetService(plan.IPv4, change.service, change.firstPod, endpoints))
				if len(k.ops) != change.messages || k.reads != 0 {
					t.Errorf("%s: %d messages, not %d, and %d questions", change.name, len(k.ops), change.messages, k.reads)
				}
				if n := elementCount(p) - before; n != change.elements {
					t.Errorf("%s: %d more elements, not %d", change.name, n, change.elements)
				}
			}
			k.ops, k.reads = nil, 0
			if err := p.Sync(context.Background(), desired, plan.Change{Node: true}); err != nil {
				t.Fatal(err)
			}
			if len(k.ops)+k.reads != 0 {
				t.Errorf("a change of the node: %d messages and %d questions", len(k.ops), k.reads)
			}
		})
	}
}

func elementCount(p *Proxier) int {
	for _, c := range p.Counts() {
		if c.Kind == "element" {
			return c.Count
		}
	}
	return 0
}
