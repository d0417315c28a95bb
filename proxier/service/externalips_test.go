// SPDX-License-Identifier: Apache-2.0

package service

import (
	"net/netip"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// An external IP outside of the ranges is left out and reported, and the others are served.
func TestExternalIPCIDRs(t *testing.T) {
	obj := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
		Spec: corev1.ServiceSpec{
			ClusterIP: "10.96.0.1", ClusterIPs: []string{"10.96.0.1"}, ExternalIPs: []string{"203.0.113.5", "192.0.2.1", "2001:db8::5"},
		},
	}
	addr := netip.MustParseAddr
	s, found := readService(obj, []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8::/64")})
	if want := []netip.Addr{addr("203.0.113.5"), addr("2001:db8::5")}; !slices.Equal(s.externalIPs, want) {
		t.Errorf("served are %v, want %v", s.externalIPs, want)
	}
	if len(found) != 1 || found[0].Field != "spec.externalIPs[1]" || found[0].Reason != "192.0.2.1 is in no range of --external-ip-cidrs; it is left out" {
		t.Errorf("the problems are %v", found)
	}
	if s, found := readService(obj, nil); len(s.externalIPs) != 3 || len(found) != 0 {
		t.Errorf("without ranges: %v, %v", s.externalIPs, found)
	}
}
