package config

import (
	"strings"
	"testing"

	"signalbox/proxier"
)

func TestCheckFamilies(t *testing.T) {
	v4, v6, both := []proxier.Family{proxier.IPv4}, []proxier.Family{proxier.IPv6}, proxier.Families
	for _, test := range []struct {
		served   []proxier.Family
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
		warnings, err := mustParse(t, append(test.args, "--mode=iptables")...).CheckFamilies(test.served, ModeIPTables)
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
