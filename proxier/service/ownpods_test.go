// SPDX-License-Identifier: Apache-2.0

package service

import (
	"net/netip"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"signalbox/proxier/plan"
)

// spec.podCIDRs says where this node's Pods are only if the network plugin follows
// it, and is needed only where the cluster CIDR tells Pods from others.
func TestOwnPods(t *testing.T) {
	cluster := []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/48")}
	for _, test := range []struct {
		what   string
		family plan.Family
		detect DetectLocal
		local  string
		want   string
	}{
		{"a bridge has the second address", plan.IPv4, "", "10.244.1.1", "10.244.1.0/24"},
		{"a tunnel has the first", plan.IPv4, DetectLocalClusterCIDR, "10.244.1.0", "10.244.1.0/24"},
		{"IPv6", plan.IPv6, "", "fd00:244:0:1::1", "fd00:244:0:1::/64"},
		{"an address further inside", plan.IPv4, "", "10.244.1.64", ""},
		{"no address inside", plan.IPv4, "", "10.244.7.1", ""},
		{"the other family's", plan.IPv6, "", "10.244.1.1", ""},
		{"Pods are known by the node's range", plan.IPv4, DetectLocalNodeCIDR, "10.244.1.1", ""},
	} {
		tracker := NewTracker("node1", &Settings{})
		tracker.Apply(&corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: "node1"},
			Spec:       corev1.NodeSpec{PodCIDRs: []string{"10.244.1.0/24", "fd00:244:0:1::/64"}},
		})
		settings := Settings{DetectLocal: test.detect, ClusterCIDRs: cluster}
		n := tracker.Node(&settings, test.family, []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr(test.local)}, nil)
		var want []netip.Prefix
		if test.want != "" {
			want = []netip.Prefix{netip.MustParsePrefix(test.want)}
		}
		if !slices.Equal(n.OwnPods, want) {
			t.Errorf("%s: %v, want %v", test.what, n.OwnPods, want)
		}
	}
}
