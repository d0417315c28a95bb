// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"signalbox/internal/netlab"
)

// hintFor gives each endpoint the zone hint of its Pod.
func hintFor(zones map[string]string, lab *netlab.Lab) func(*discoveryv1.Endpoint) {
	return func(e *discoveryv1.Endpoint) {
		for pod, zone := range zones {
			for _, v6 := range []bool{false, true} {
				if addrOf(lab.Host(pod), v6).String() == e.Addresses[0] {
					e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: zone}}}
				}
			}
		}
	}
}

func inZone(zone string) func(*corev1.Node) {
	return func(n *corev1.Node) { n.Labels[corev1.LabelTopologyZone] = zone }
}

// The node moves between zones, and out of all, while signalbox runs.
func TestZoneChanges(t *testing.T) {
	inEachMode(t, func(s *site) {
		hints := hintFor(map[string]string{"pod-a": "east", "pod-c": "west"}, s.lab)
		svc := s.createService("hinted", []string{"pod-a", "pod-c"})
		s.setEndpoints("hinted", []string{"pod-a", "pod-c"}, hints)
		s.start()
		s.reaches(svc, "pod-a", "pod-c") // a node without a zone uses all
		for _, step := range []struct {
			zone string
			want []string
		}{
			{"east", []string{"pod-a"}},
			{"west", []string{"pod-c"}},
			{"north", []string{"pod-a", "pod-c"}}, // nobody is hinted at it
		} {
			s.updateNode("node1", inZone(step.zone))
			s.reaches(svc, step.want...)
		}
		s.updateNode("node1", inZone("east"))
		s.reaches(svc, "pod-a")
		s.updateNode("node1", func(n *corev1.Node) { delete(n.Labels, corev1.LabelTopologyZone) })
		s.reaches(svc, "pod-a", "pod-c")
	})
}

// With --detect-local-mode=NodeCIDR the node's own Pod ranges say who is a
// Pod. The API never changes them on a Node that has some: they appear on one
// that has none yet, or the Node is replaced.
func TestPodCIDRChanges(t *testing.T) {
	inEachMode(t, func(s *site) {
		node := s.lab.Host("node1")
		svc := s.createService("web", []string{"pod-c"})
		s.deleteNode("node1")
		s.createNode("node1", node.Addr, netlab.PrefixPair{}, func(n *corev1.Node) { n.Spec = corev1.NodeSpec{} })
		s.start("--detect-local-mode", "NodeCIDR")

		own := netlab.NodePodNetwork("node1")
		s.updateNode("node1", func(n *corev1.Node) {
			n.Spec.PodCIDR, n.Spec.PodCIDRs = own.V4.String(), []string{own.V4.String(), own.V6.String()}
		})
		podIsSeenAs(s, svc, "pod-x")

		// Now node1's Pods are none of its own: they count as strangers, whose
		// traffic to cluster IPs is masqueraded.
		s.deleteNode("node1")
		s.createNode("node1", node.Addr, netlab.PrefixPair{
			V4: netip.MustParsePrefix("10.244.200.0/24"), V6: netip.MustParsePrefix("fd00:10:244:200::/64"),
		})
		podIsSeenAs(s, svc, "node1")

		s.deleteNode("node1")
		s.createNode("node1", node.Addr, own)
		podIsSeenAs(s, svc, "pod-x")
	})
}

// podIsSeenAs waits until pod-x's connections to the Service's cluster IPs
// arrive with the source address of the named host.
func podIsSeenAs(s *site, svc *corev1.Service, host string) {
	s.Helper()
	everyFamilyAndProtocol(func(v6 bool, network string) {
		s.sees("pod-x", network, netip.AddrPortFrom(clusterIP(svc, v6), 80), addrOf(s.lab.Host(host), v6))
	})
}
