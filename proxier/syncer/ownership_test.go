// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"signalbox/proxier/plan"
)

// TestManyRequesters lets ten thousand Services request one node port, each
// better than all before, which is the worst order. What it checks is the
// number of Services resolved: it must stay in proportion to the changes.
func TestManyRequesters(t *testing.T) {
	const n = 10_000
	resolved := 0
	b := newRig(t)
	counted := func() {
		t.Helper()
		before := b.resolved
		b.update()
		resolved += b.resolved - before
	}
	service := func(i int) *corev1.Service {
		return newService(fmt.Sprintf("s%05d", i), clusterIP(i), nodePort(30001), func(s *corev1.Service) {
			s.CreationTimestamp = metav1.NewTime(time.Unix(int64(2*n-i), 0))
		})
	}
	key := plan.FrontendKey{Port: 30001, Protocol: plan.TCP}
	owner := func() string { return b.families[0].planner.ownership.owners[key].by.Name }

	b.Synced()
	for i := range n {
		b.Apply(service(i))
	}
	counted()
	if got := owner(); got != "s09999" {
		t.Errorf("%s has the node port, want the oldest", got)
	}
	if resolved > 2*n {
		t.Errorf("%d Services resolved for %d new ones", resolved, n)
	}
	checkPlan(t, b.Plan(plan.IPv4))

	resolved = 0
	b.Apply(newSlice("s09999", "10.244.2.1")) // the holder's endpoints change
	b.Apply(newSlice("s00000", "10.244.2.1")) // the last in the queue's too
	counted()
	if resolved != 2 {
		t.Errorf("%d Services resolved for two changes of endpoints", resolved)
	}

	resolved = 0
	for i := n - 1; i > 0; i-- { // the holder goes each time
		b.Delete(service(i))
	}
	counted()
	if got := owner(); got != "s00000" {
		t.Errorf("%s has the node port, want the only one left", got)
	}
	if resolved > 2*n {
		t.Errorf("%d Services resolved for %d removed", resolved, n)
	}
	if len(b.families[0].planner.ownership.waiting) != 0 || len(b.families[0].planner.services) != 1 {
		t.Errorf("requests of removed Services are kept: %v", b.families[0].planner.ownership)
	}
	checkPlan(t, b.Plan(plan.IPv4))
}
