// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"strings"
	"testing"
)

// Distributions pass addresses without a port. kube-proxy adds the port, and its
// flags for the port alone then count.
func TestListenAddresses(t *testing.T) {
	for _, test := range []struct {
		args, file       string // one of the two
		healthz, metrics string // "invalid AddrPort" for nowhere
		warning          string
	}{
		{args: "--healthz-bind-address=127.0.0.1", healthz: "127.0.0.1:10256", metrics: "127.0.0.1:10249"},
		{args: "--healthz-bind-address=::1", healthz: "[::1]:10256", metrics: "127.0.0.1:10249"},
		{args: "--metrics-bind-address=0.0.0.0", healthz: "0.0.0.0:10256", metrics: "0.0.0.0:10249"},
		{args: "--metrics-bind-address=::", healthz: "0.0.0.0:10256", metrics: "[::]:10249"},
		{args: "--healthz-bind-address=127.0.0.1 --healthz-port=1 --metrics-bind-address=:: --metrics-port=2", healthz: "127.0.0.1:1", metrics: "[::]:2"},
		{args: "--healthz-port=1", healthz: "0.0.0.0:10256", metrics: "127.0.0.1:10249", warning: "--healthz-port=1"},
		{args: "--metrics-bind-address=127.0.0.1:2 --metrics-port=3", healthz: "0.0.0.0:10256", metrics: "127.0.0.1:2", warning: "--metrics-port=3"},
		{args: "--healthz-port=0 --metrics-bind-address=0.0.0.0 --metrics-port=0", healthz: "invalid AddrPort", metrics: "invalid AddrPort"},
		{args: "--healthz-bind-address= --metrics-bind-address=0 --metrics-port=3", healthz: "invalid AddrPort", metrics: "invalid AddrPort", warning: "--metrics-port=3"},
		{args: "--healthz-bind-address=127.000.0.01:010256", healthz: "127.0.0.1:10256", metrics: "127.0.0.1:10249"},
		{file: "healthzBindAddress: 127.0.0.1\nmetricsBindAddress: \"::\"", healthz: "127.0.0.1:10256", metrics: "[::]:10249"},
		{file: "healthzBindAddress: \"[::1]:1\"", args: "--healthz-port=2", healthz: "[::1]:1", metrics: "127.0.0.1:10249", warning: "beside --config"},
	} {
		args := append(strings.Fields(test.args), "--hostname-override=n", "--cluster-cidr=10.0.0.0/8")
		if test.file != "" {
			args = append(args[:len(args)-1], "--config="+writeFile(t, "clusterCIDR: 10.0.0.0/8\n"+test.file))
		}
		c, err := parse(t, args...)
		if err != nil {
			t.Errorf("%q: %v", args, err)
			continue
		}
		if c.HealthzBindAddress.String() != test.healthz || c.MetricsBindAddress.String() != test.metrics {
			t.Errorf("%q: health at %v, metrics at %v", args, c.HealthzBindAddress, c.MetricsBindAddress)
		}
		if said := fmt.Sprint(c.Warnings); (test.warning == "") != (len(c.Warnings) == 0) || !strings.Contains(said, test.warning) {
			t.Errorf("%q: warnings are %q", args, c.Warnings)
		}
	}
	for _, wrong := range []string{"[::1]", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:70000", "127.0.0.1:http", ":10256", "localhost", "::1:10256:x", "256.0.0.1"} {
		for _, flag := range []string{"--healthz-bind-address=", "--metrics-bind-address="} {
			if c, err := parse(t, flag+wrong); err == nil || !strings.Contains(err.Error(), flag+wrong) {
				t.Errorf("%s%s: %v, %v", flag, wrong, c, err)
			}
		}
	}
}

// kube-proxy reads addresses with leading zeros, as Go once did.
func TestLeadingZeros(t *testing.T) {
	c, err := parse(t, "--hostname-override=n", "--bind-address=192.000.2.01", "--cluster-cidr=10.00.0.0/8", "--nodeport-addresses=010.0.0.0/8")
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(c.BindAddress, c.Settings.ClusterCIDRs, c.Settings.NodePortAddresses.CIDRs); got != "192.0.2.1 [10.0.0.0/8] [10.0.0.0/8]" {
		t.Error(got)
	}
}
