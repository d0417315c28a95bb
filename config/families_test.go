// SPDX-License-Identifier: Apache-2.0

package config

import (
	"strings"
	"testing"

	"k8s.io/kube-proxy/config/v1alpha1"

	"signalbox/proxier/plan"
)

func TestCheckFamilies(t *testing.T) {
	v4, v6, both := []plan.Family{plan.IPv4}, []plan.Family{plan.IPv6}, plan.Families
	for _, test := range []struct {
		served   []plan.Family
		args     []string
		warnings []string
		err      string
	}{
		{served: both, args: []string{"--cluster-cidr=10.0.0.0/8,fd00::/8"}},
		{served: v4, args: []string{"--cluster-cidr=10.0.0.0/8,fd00::/8"}},
		{served: v4},
		{served: both, args: []string{"--cluster-cidr=10.0.0.0/8"}, warnings: []string{"[10.0.0.0/8]: Pods cannot be told from other traffic in IPv6"}},
		{served: v6, args: []string{"--cluster-cidr=10.0.0.0/8"}, err: "the Pods' ranges (--cluster-cidr, or clusterCIDR in a file) are [10.0.0.0/8], and this node serves [IPv6] only"},
		{served: v6, args: []string{"--cluster-cidr=10.0.0.0/8", "--detect-local-mode=NodeCIDR", "--healthz-bind-address=[::]:1", "--metrics-bind-address=[::1]:2"}},
		{served: both, args: []string{"--nodeport-addresses=fd00::/8"}, warnings: []string{"[fd00::/8]: in IPv4 they are served at all addresses"}},
		{served: v6, warnings: []string{"health, 0.0.0.0:10256,", "metrics, 127.0.0.1:10249,"}},
	} {
		warnings, err := mustParse(t, append(test.args, "--mode=iptables")...).CheckFamilies(test.served, modeNamed(t, "iptables"))
		if test.err != "" {
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%v %q: error %v, want %q", test.served, test.args, err, test.err)
			}
			continue
		}
		if err != nil || len(warnings) != len(test.warnings) {
			t.Errorf("%v %q: warnings %q, %v", test.served, test.args, warnings, err)
		}
		for _, want := range test.warnings {
			if !strings.Contains(strings.Join(warnings, "\n"), want) {
				t.Errorf("%v %q: warnings %q do not say %q", test.served, test.args, warnings, want)
			}
		}
	}
}

// TestLocalhostNodePorts looks at both families in each mode.
func TestLocalhostNodePorts(t *testing.T) {
	for _, test := range []struct {
		mode     string
		args     []string
		gateOff  bool
		v4, v6   bool
		warnings []string
	}{
		{mode: "nftables"},
		{mode: "nftables", args: []string{"--nodeport-addresses=all"}},
		{mode: "nftables", args: []string{"--nodeport-addresses=primary,localhost"}, v4: true, v6: true},
		{mode: "nftables", args: []string{"--nodeport-addresses=localhost"}, gateOff: true,
			warnings: []string{"127.0.0.1: the feature gate KubeProxyNFTablesLocalhostNodePorts is off", "::1: the feature gate"}},
		{mode: "userspace", args: []string{"--nodeport-addresses=all,127.0.0.0/8,fd00::/8"}, v4: true},
		{mode: "userspace", args: []string{"--nodeport-addresses=::1/128,127.0.0.2/32"}, v6: true},
		{mode: "userspace", args: []string{"--nodeport-addresses=localhost"}, gateOff: true,
			warnings: []string{"127.0.0.1: the feature gate KubeProxyNFTablesLocalhostNodePorts is off", "::1: the feature gate"}},
		{mode: "userspace", args: []string{"--nodeport-addresses=localhost", "--iptables-localhost-nodeports=false"}, v4: true, v6: true},
		{mode: "userspace"},
		{mode: "iptables", v4: true},
		{mode: "iptables", args: []string{"--nodeport-addresses=primary"}},
		{mode: "iptables", args: []string{"--nodeport-addresses=primary,all"}, v4: true},
		{mode: "iptables", args: []string{"--nodeport-addresses=localhost"}, v4: true, warnings: []string{"::1: mode iptables can in IPv4 only"}},
		{mode: "iptables", args: []string{"--nodeport-addresses=127.0.0.0/8,fd00::/8", "--iptables-localhost-nodeports=false"},
			warnings: []string{"127.0.0.1: --iptables-localhost-nodeports, or iptables.localhostNodePorts in a file, is false"}},
		{mode: "ipvs"},
		{mode: "ipvs", args: []string{"--nodeport-addresses=localhost"}, warnings: []string{"127.0.0.1: mode ipvs cannot", "::1: mode ipvs cannot"}},
	} {
		c := mustParse(t, append(test.args, "--cluster-cidr=10.0.0.0/8,fd00::/8")...)
		c.LocalhostRelay = !test.gateOff
		s := c.ForMode(modeNamed(t, test.mode))
		if v4, v6 := s.ServesLocalhost(plan.IPv4), s.ServesLocalhost(plan.IPv6); v4 != test.v4 || v6 != test.v6 {
			t.Errorf("%s %q: IPv4 %v, IPv6 %v; want %v, %v", test.mode, test.args, v4, v6, test.v4, test.v6)
		}
		warnings, err := c.CheckFamilies(plan.Families, modeNamed(t, test.mode))
		text := strings.Join(warnings, "\n")
		if err != nil || strings.Count(text, "loopback") != len(test.warnings) {
			t.Errorf("%s %q: warnings %q, %v", test.mode, test.args, warnings, err)
		}
		for _, want := range test.warnings {
			if !strings.Contains(text, want) {
				t.Errorf("%s %q: warnings %q do not say %q", test.mode, test.args, warnings, want)
			}
		}
	}
}

func TestLocalhostGateIsOpenUnlessClosedByName(t *testing.T) {
	for want, gates := range map[bool][]map[string]bool{
		true:  {nil, {"AllAlpha": false}, {gateLocalhostNodePorts: true}},
		false: {{gateLocalhostNodePorts: false}},
	} {
		for _, g := range gates {
			if got := localhostRelay(&v1alpha1.KubeProxyConfiguration{FeatureGates: g}); got != want {
				t.Errorf("%v: %v", g, got)
			}
		}
	}
}
