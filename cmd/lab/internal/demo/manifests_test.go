// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"signalbox/internal/netlab"
	"signalbox/internal/testbed"

	"signalbox/proxier/plan"
)

func testLayout(families ...plan.Family) layout {
	l := layout{families: families, nodes: map[string]netlab.Pair{}, pods: map[string]pod{}}
	for i, name := range []string{"node1", "node2"} {
		l.nodes[name] = netlab.Pair{V4: netlab.Nth(netlab.NodeNetwork.Of(plan.IPv4), 11+i), V6: netlab.Nth(netlab.NodeNetwork.Of(plan.IPv6), 11+i)}
	}
	for i, name := range allPods {
		node := "node1"
		if i > 1 {
			node = "node2"
		}
		l.pods[name] = pod{node, netlab.Pair{V4: netlab.Nth(netlab.PodNetwork.Of(plan.IPv4), i+1), V6: netlab.Nth(netlab.PodNetwork.Of(plan.IPv6), i+1)}}
	}
	return l
}

// TestManifestsAsText holds what a reader of --source finds; each family alone
// must not mention the other.
func TestManifestsAsText(t *testing.T) {
	for name, families := range map[string][]plan.Family{
		"manifests.yaml": plan.Families, "manifests-ipv6.yaml": {plan.IPv6},
	} {
		t.Run(name, func(t *testing.T) {
			var b strings.Builder
			for _, m := range manifests(testLayout(families...), 1) {
				text, err := testbed.YAML(m.objects...)
				if err != nil {
					t.Fatal(err)
				}
				b.WriteString("# " + m.name + "\n")
				b.Write(text)
			}
			if len(families) == 1 && strings.Contains(b.String(), "10.96.") {
				t.Error("the other family is in it")
			}
			checkGolden(t, name, b.String())
		})
	}
}

// TestAddressesAreUnique at the largest size: a duplicate would be refused by
// the daemon and make the demo measure something else.
func TestAddressesAreUnique(t *testing.T) {
	seen := map[string]string{}
	count := 0
	for _, m := range manifests(testLayout(plan.Families...), MaxServices) {
		for _, o := range m.objects {
			s, ok := o.(*corev1.Service)
			if !ok {
				continue
			}
			count++
			for i, ip := range s.Spec.ClusterIPs {
				a, err := netip.ParseAddr(ip)
				if err != nil {
					t.Fatal(err)
				}
				f := plan.Families[i]
				if !netlab.ServiceNetwork.Of(f).Contains(a) && !netlab.ServiceNetwork2.Of(f).Contains(a) {
					t.Fatalf("%s: %s is not routed to the node", s.Name, a)
				}
				if other, taken := seen[ip]; taken {
					t.Fatalf("%s has %s, and so has %s", s.Name, ip, other)
				}
				seen[ip] = s.Name
			}
		}
	}
	if count != MaxServices+len(services) {
		t.Errorf("got %d Services, want %d", count, MaxServices+len(services))
	}
}
