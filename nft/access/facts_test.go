// SPDX-License-Identifier: Apache-2.0

package access

import (
	"net/netip"
	"strings"
	"testing"

	"signalbox/nft"
	"signalbox/proxier/plan"
)

// TestRejectElement: the sets are those that the rules of RejectFrontends and
// RejectNodePorts look into.
func TestRejectElement(t *testing.T) {
	vip := &plan.Frontend{Addr: netip.MustParseAddr("10.96.0.1"), Port: 80}
	nodePort := &plan.Frontend{Port: 30000}
	r := Rules{IPFamily: nft.FamilyOf(plan.IPv4), Node: plan.Node{NodePortAddrs: plan.NodePortAddrs{All: true}}}
	frontends, nodePorts := r.RejectFrontends(), r.RejectNodePorts()
	for _, test := range []struct {
		fe   *plan.Frontend
		drop bool
		rule nft.Rule
		want string
	}{
		{vip, false, frontends[0], "ip daddr . meta l4proto . th dport @rejected reject"},
		{vip, true, frontends[1], "ip daddr . meta l4proto . th dport @dropped drop"},
		{nodePort, false, nodePorts[0], "meta l4proto . th dport @rejected-nodeports fib daddr type local ip daddr != 127.0.0.0/8 reject"},
		{nodePort, true, nodePorts[1], "meta l4proto . th dport @dropped-nodeports fib daddr type local ip daddr != 127.0.0.0/8 drop"},
	} {
		e := RejectElement(test.fe, plan.TCP, test.drop, "")
		chain := nft.NewChain("c", nil, test.rule).Text()
		if want := "\tchain c {\n\t\t" + test.want + "\n\t}\n\n"; chain != want {
			t.Errorf("got %q, want %q", chain, want)
		}
		if set := "@" + names[e.Set] + " "; !strings.Contains(test.want, set) {
			t.Errorf("the element is in %s, the rule is %q", set, test.want)
		}
	}
}
