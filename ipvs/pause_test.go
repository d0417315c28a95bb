// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"context"
	"testing"
	"time"

	"signalbox/ipvs/internal/kernel"

	"signalbox/proxier/plan"
)

// TestPauseEndsNothing checks that a paused process removes nothing that its successor uses,
// and that it finds the marks of its successor when it serves again.
func TestPauseEndsNothing(t *testing.T) {
	k, w := newFakeIPVS(t), world{plan.IPv4}
	old, next := k.proxier(t, time.Now), k.proxier(t, time.Now)
	key := kernel.ServerKey{Addr: w.vip(1), Port: 80, Protocol: plan.TCP}
	dest := w.pods(1).Endpoints[0].AddrPort
	set := w.pods(2)
	web := func(pods ...int) *plan.ServicePort {
		set := w.pods(pods...)
		return w.service("web", plan.TCP, set, clusterIP(w.vip(1), 80, set))
	}
	node := func(port uint16) *plan.ServicePort {
		return w.service("node", plan.TCP, set, plan.Frontend{Kind: plan.NodePort, Port: port, Internal: set, External: set})
	}
	other := w.service("other", plan.TCP, set, clusterIP(w.vip(2), 80, set))
	k.connections[dest] = 1
	syncAll(t, old, w.plan(web(1, 2), other, node(30001)))
	syncAll(t, old, w.plan(web(2), node(30001))) // one endpoint, one address and one server drain
	old.Pause()
	syncAll(t, next, w.plan(web(1, 2), other))
	delete(k.connections, dest)
	syncAll(t, next, w.plan(web(1, 2), other, w.service("first", plan.TCP, w.pods(3),
		plan.Frontend{Kind: plan.NodePort, Port: 30009, Internal: w.pods(3), External: w.pods(3)}), node(30001)))
	sent := len(k.ops)
	if old.drainOnce(time.Now().Add(2 * drainBound)) {
		t.Error("the paused process waits for something to drain")
	}
	held, _, err := old.device.Addresses()
	if err != nil || !held[w.vip(2)] || !k.has(key, dest) || len(k.ops) != sent {
		t.Errorf("it has sent %v; the addresses are %v (%v)", k.ops[sent:], held, err)
	}
	marks := next.state.records[node(0).Name].marks
	change := plan.Change{Services: []plan.ServicePortName{other.Name}}
	plan := w.plan(web(1, 2), other, node(30001))
	if err := old.Sync(context.Background(), plan, change); err != nil {
		t.Fatal(err)
	}
	for mk, mark := range old.state.records[node(0).Name].marks {
		if marks[mk] != mark {
			t.Errorf("the mark of %v was %#x and is %#x", mk, marks[mk], mark)
		}
	}
	if len(marks) == 0 {
		t.Error("a NodePort has no mark")
	}
}
