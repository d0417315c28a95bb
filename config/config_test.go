// SPDX-License-Identifier: Apache-2.0

package config

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"signalbox/modes"
	"signalbox/proxier"
	"signalbox/proxier/service"
)

func parse(t *testing.T, args ...string) (*Config, error) {
	t.Helper()
	var f Flags
	fs := pflag.NewFlagSet("signalbox", pflag.ContinueOnError)
	f.Add(fs)
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	return f.Config()
}

func modeNamed(t *testing.T, name string) proxier.Mode {
	t.Helper()
	m, err := modes.Named(name)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestDefaults(t *testing.T) {
	c, err := parse(t, "--hostname-override", "  Node-1 ")
	if err != nil {
		t.Fatal(err)
	}
	if c.NodeName != "node-1" || c.Mode != "auto" || c.MasqueradeMark != 0x4000 || c.MinSyncPeriod != 0 ||
		c.QPS != 5 || c.Burst != 10 || c.Settings.DetectLocal != service.DetectLocalClusterCIDR || c.Settings.LocalhostNodePorts != service.LocalhostCovered {
		t.Errorf("defaults are %+v", c)
	}
	if len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "--cluster-cidr is not given") {
		t.Errorf("warnings are %q", c.Warnings)
	}
}

func TestIPVSFlags(t *testing.T) {
	flags := []string{"--hostname-override=n", "--cluster-cidr=10.244.0.0/16", "--ipvs-scheduler=lc", "--ipvs-strict-arp",
		"--ipvs-tcp-timeout=15m", "--ipvs-kube-proxy-policies", "--ipvs-tcpfin-timeout=30s", "--ipvs-udp-timeout=1m"}
	c, err := parse(t, append(flags, "--mode=ipvs")...)
	if err != nil {
		t.Fatal(err)
	}
	want := proxier.IPVSTuning{Scheduler: "lc", StrictARP: true, TCPTimeout: 15 * time.Minute, TCPFinTimeout: 30 * time.Second, UDPTimeout: time.Minute}
	if c.Mode != "ipvs" || c.IPVS != want || len(c.Warnings) != 0 || !c.ForMode(modeNamed(t, "ipvs")).KubeProxyIPVSPolicies || c.ForMode(modeNamed(t, "iptables")).KubeProxyIPVSPolicies {
		t.Errorf("got %s, %+v, warnings %q", c.Mode, c.IPVS, c.Warnings)
	}
	if c, err = parse(t, append(flags, "--mode=nftables")...); err != nil || len(c.Warnings) != 1 {
		t.Errorf("in another mode: warnings %q, %v", c.Warnings, err)
	}
}

func TestMaxCPU(t *testing.T) {
	for text, want := range map[string]float64{"0": 0, "10": 0.1, "2.5%": 0.025, "150": 1.5} {
		c, err := parse(t, "--hostname-override=n", "--max-cpu="+text)
		if err != nil || c.MaxProcessor != want {
			t.Errorf("--max-cpu=%s: %v (%v), want %v", text, c, err, want)
		}
	}
	for _, text := range []string{"", "x", "-1", "0.01", "NaN", "Inf"} {
		if _, err := parse(t, "--hostname-override=n", "--max-cpu="+text); err == nil || !strings.Contains(err.Error(), "at least 0.1") {
			t.Errorf("--max-cpu=%s: %v", text, err)
		}
	}
}

func TestExternalIPCIDRs(t *testing.T) {
	c, err := parse(t, "--hostname-override=n", "--external-ip-cidrs=203.0.113.7/24,2001:db8::/64", "--external-ip-cidrs=198.51.100.0/24")
	want := []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8::/64"), netip.MustParsePrefix("198.51.100.0/24")}
	if err != nil || !slices.Equal(c.Settings.ExternalIPCIDRs, want) {
		t.Errorf("got %v, %v", c, err)
	}
	for _, text := range []string{"", "203.0.113.7", "a/8", "203.0.113.0/24,"} {
		if _, err := parse(t, "--hostname-override=n", "--external-ip-cidrs="+text); err == nil || !strings.Contains(err.Error(), "is not a CIDR such as") {
			t.Errorf("--external-ip-cidrs=%s: %v", text, err)
		}
	}
}

func TestWhatFlagsSet(t *testing.T) {
	c, err := parse(t, "--hostname-override=n", "--proxy-mode=iptables", "--cluster-cidr=10.244.1.2/16,fd00:244::/56",
		"--nodeport-addresses=192.168.0.0/16,fd00::/8", "--masquerade-all", "--iptables-masquerade-bit=31", "--iptables-localhost-nodeports=false",
		"--kubeconfig=/k", "--master=https://m", "--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=cali")
	if err != nil {
		t.Fatal(err)
	}
	prefixes := func(texts ...string) (out []netip.Prefix) {
		for _, text := range texts {
			out = append(out, netip.MustParsePrefix(text))
		}
		return out
	}
	if want := prefixes("10.244.0.0/16", "fd00:244::/56"); !slices.Equal(c.Settings.ClusterCIDRs, want) {
		t.Errorf("cluster CIDRs are %v, want %v", c.Settings.ClusterCIDRs, want)
	}
	if want := prefixes("192.168.0.0/16", "fd00::/8"); !slices.Equal(c.Settings.NodePortAddresses.CIDRs, want) {
		t.Errorf("NodePort addresses are %v, want %v", c.Settings.NodePortAddresses.CIDRs, want)
	}
	if c.Mode != "iptables" || !c.Settings.MasqueradeAll || c.MasqueradeMark != 1<<31 || c.Settings.LocalhostNodePorts != service.NoLocalhost ||
		c.Kubeconfig != "/k" || c.Master != "https://m" || c.Settings.PodInterfaceNamePrefix != "cali" {
		t.Errorf("got %+v", c)
	}
}

func TestMistakesAreNamed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args string // separated by spaces
		want []string
	}{
		{"--mode=fast", []string{"--mode=fast", "nftables", "iptables"}},
		{"--proxy-mode=kernelspace", []string{"kernelspace"}},
		{"--mode=nftables --proxy-mode=iptables", []string{"--mode=nftables", "--proxy-mode=iptables", "contradict"}},
		{"--hostname-override=\u00a0", []string{"--hostname-override"}},
		{"--source=/d --kubeconfig=/k", []string{"--source=/d", "--kubeconfig"}},
		{"--source=/d --master=http://m", []string{"--source=/d", "--master"}},
		{"--source=" + file, []string{file, "not a directory"}},
		{"--cluster-cidr=10.0.0.0", []string{"--cluster-cidr", `"10.0.0.0"`}},
		{"--cluster-cidr=10.0.0.0/8,10.1.0.0/16", []string{"--cluster-cidr", "at most one"}},
		{"--cluster-cidr=10.0.0.0/8,fd00::/8,fd01::/16", []string{"at most one"}},
		{"--mode=ipvs --ipvs-scheduler=-D", []string{"--ipvs-scheduler=-D", "scheduler"}},
		{"--mode=ipvs --ipvs-tcp-timeout=-1s", []string{"--ipvs-tcp-timeout=-1s"}},
		{"--detect-local-mode=Magic", []string{"--detect-local-mode=Magic", "NodeCIDR"}},
		{"--detect-local-mode=BridgeInterface", []string{"--pod-bridge-interface=", "BridgeInterface", "needs it"}},
		{"--detect-local-mode=InterfaceNamePrefix", []string{"--pod-interface-name-prefix=", "needs it"}},
		{"--detect-local-mode=BridgeInterface --pod-bridge-interface=a-name-far-too-long", []string{"15 characters"}},
		{"--nodeport-addresses=primary,primary", []string{"--nodeport-addresses=primary,primary", "given twice"}},
		{"--nodeport-addresses=10.0.0.0/8,loopback", []string{"--nodeport-addresses", `"loopback" is neither a CIDR`}},
		{"--nodeport-addresses=10.0.0.0/33", []string{"--nodeport-addresses", `"10.0.0.0/33"`}},
		{"--iptables-masquerade-bit=32", []string{"--iptables-masquerade-bit=32", "0 to 31"}},
		{"--kube-api-burst=-1", []string{"--kube-api-burst=-1"}},
		{"--iptables-min-sync-period=-1s", []string{"--iptables-min-sync-period=-1s"}},
		{"--mode=fast --cluster-cidr=x --iptables-masquerade-bit=99", []string{"--mode=fast", `"x"`, "=99"}},
		{"--no-such-flag", []string{"no-such-flag"}},
	} {
		_, err := parse(t, strings.Split(test.args, " ")...)
		if err == nil {
			t.Errorf("%s is accepted", test.args)
			continue
		}
		for _, want := range test.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: the error %q does not say %q", test.args, err, want)
			}
		}
	}
}

func TestSettingsWithoutEffectAreNamed(t *testing.T) {
	c, err := parse(t, "--cluster-cidr=10.0.0.0/8", "--pod-bridge-interface=cni0")
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "--pod-bridge-interface=cni0 has no effect") {
		t.Errorf("warnings are %q", c.Warnings)
	}
}

func TestNodePortAddressesByMode(t *testing.T) {
	for _, test := range []struct {
		mode, flag string
		primary    bool
	}{
		{"nftables", "", true},
		{"iptables", "", false},
		{"ipvs", "", false},
		{"iptables", "--nodeport-addresses=primary", true},
		{"nftables", "--nodeport-addresses=0.0.0.0/0", false},
		{"nftables", "--nodeport-addresses=all", false},
		{"nftables", "--nodeport-addresses=localhost", false},
		{"nftables", "--nodeport-addresses=localhost,primary,10.0.0.0/8", true},
	} {
		args := []string{"--cluster-cidr=10.0.0.0/8"}
		if test.flag != "" {
			args = append(args, test.flag)
		}
		c, err := parse(t, args...)
		if err != nil {
			t.Fatal(err)
		}
		s := c.ForMode(modeNamed(t, test.mode))
		if s.NodePortAddresses.Primary != test.primary || s.HasSchedulers != (test.mode == "ipvs") {
			t.Errorf("mode %s with %q: primary is %v, schedulers %v", test.mode, test.flag, s.NodePortAddresses.Primary, s.HasSchedulers)
		}
	}
}
