// SPDX-License-Identifier: Apache-2.0

package config

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"signalbox/modes"
	"signalbox/node"
	"signalbox/proxier/service"
)

const fileHead = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

// writeFile writes a configuration file, without its head.
func writeFile(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.conf")
	if err := os.WriteFile(path, []byte(fileHead+text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// kubeadm is the ConfigMap that kubeadm makes, with what operators set in it.
const kubeadm = `
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection: {acceptContentTypes: "", burst: 0, contentType: "", kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack: {maxPerCore: 0, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null, udpStreamTimeout: 0s, udpTimeout: 0s}
detectLocal: {bridgeInterface: "", interfaceNamePrefix: ""}
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: "", strictARP: false, syncPeriod: 0s, tcpFinTimeout: 0s, tcpTimeout: 0s, udpTimeout: 0s}
logging: {flushFrequency: 0, options: {json: {infoBufferSize: "0"}, text: {infoBufferSize: "0"}}, verbosity: 0}
metricsBindAddress: ""
mode: ""
nftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel: {enableDSR: false, forwardHealthCheckVip: false, networkName: "", rootHnsEndpointName: "", sourceVip: ""}
`

func TestKubeadmFile(t *testing.T) {
	c, err := parse(t, "--config="+writeFile(t, kubeadm), "--hostname-override=Node-1")
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Warnings) != 0 {
		t.Errorf("warnings are %q", c.Warnings)
	}
	if *c.OOMScoreAdj != -999 || c.KubeProxy.HostnameOverride != "node-1" {
		t.Errorf("the score is %d, the name %s", *c.OOMScoreAdj, c.KubeProxy.HostnameOverride)
	}
	c.OOMScoreAdj, c.KubeProxy = nil, nil
	want := &Config{
		Mode: "iptables", ModeReason: "the file of --config names no mode, which means iptables as with kube-proxy", ModeUnset: true, NodeName: "node-1", RunDir: DefaultRunDir, Kubeconfig: "/var/lib/kube-proxy/kubeconfig.conf",
		ContentType: "application/vnd.kubernetes.protobuf", QPS: 5, Burst: 10, MasqueradeMark: 0x4000, LocalhostRelay: true,
		Settings: service.Settings{
			DetectLocal: service.DetectLocalClusterCIDR, ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}, LocalhostNodePorts: service.LocalhostCovered,
		},
		BindAddress: netip.IPv4Unspecified(), HealthzBindAddress: netip.MustParseAddrPort("0.0.0.0:10256"), MetricsBindAddress: netip.MustParseAddrPort("127.0.0.1:10249"),
		SyncPeriod: 30 * time.Second,
		Conntrack:  node.Conntrack{Min: 131072, TCPEstablishedTimeout: 24 * time.Hour, TCPCloseWaitTimeout: time.Hour},
		Logging:    Logging{Format: "text"},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestWhatFilesSet(t *testing.T) {
	for _, test := range []struct {
		file string
		args []string
		ok   func(*Config) bool
	}{
		{file: "mode: nftables\nnftables: {masqueradeBit: 3, masqueradeAll: true}\niptables: {masqueradeBit: 4}", ok: func(c *Config) bool {
			return c.MasqueradeMark == 8 && c.Settings.MasqueradeAll && c.Settings.NodePortAddresses.Primary
		}},
		{file: "mode: ipvs\nnftables: {masqueradeBit: 3}\niptables: {masqueradeBit: 4}\nipvs: {udpTimeout: 1500ms, minSyncPeriod: 5s}", ok: func(c *Config) bool {
			return c.MasqueradeMark == 16 && c.IPVS.UDPTimeout == 2*time.Second && c.MinSyncPeriod == 5*time.Second
		}},
		{file: "mode: ipvs", args: []string{"--mode=nftables"}, ok: func(c *Config) bool { return c.Mode == "nftables" && c.KubeProxy.Mode == "nftables" }},
		{file: "mode: ipvs", args: []string{"--mode=auto"}, ok: func(c *Config) bool { return c.Mode == "auto" }},
		{file: "metricsBindAddress: \"0\"\nhealthzBindAddress: \"0\"", ok: func(c *Config) bool {
			return !c.MetricsBindAddress.IsValid() && !c.HealthzBindAddress.IsValid()
		}},
		{file: "bindAddress: \"::\"", ok: func(c *Config) bool {
			return c.MetricsBindAddress == netip.MustParseAddrPort("[::1]:10249") && c.HealthzBindAddress == netip.MustParseAddrPort("[::]:10256") && !c.Settings.NodeAddress.IsValid()
		}},
		{file: "bindAddress: 192.0.2.1", ok: func(c *Config) bool { return c.Settings.NodeAddress == netip.MustParseAddr("192.0.2.1") }},
		{file: "iptables: {minSyncPeriod: 0s}", ok: func(c *Config) bool {
			return c.MinSyncPeriod == 0 && c.KubeProxy.IPTables.MinSyncPeriod.Duration == time.Second
		}},
		{file: "iptables: {minSyncPeriod: 1s}", ok: func(c *Config) bool { return c.MinSyncPeriod == time.Second }},
		{file: "mode: ipvs\nfeatureGates: {KubeProxyIPVS: true}", ok: func(c *Config) bool {
			return c.Mode == "ipvs" && !slices.ContainsFunc(c.Warnings, about("KubeProxyIPVS"))
		}},
		{file: "featureGates: {KubeProxyIPVS: false}", args: []string{"--mode=ipvs"}, ok: func(c *Config) bool { return c.Mode == "ipvs" }},
		{file: "featureGates: {AllBeta: false, Magic: true}", ok: func(c *Config) bool {
			return !gateOn(c.KubeProxy, "NFTablesNetlink") && gateOn(c.KubeProxy, "KubeProxyIPVS") && c.KubeProxy.FeatureGates["Magic"]
		}},
		{file: "featureGates: {AllowServiceExternalIPs: false}", ok: func(c *Config) bool { return c.Settings.IgnoreExternalIPs }},
		{file: "clientConnection: {contentType: application/json, acceptContentTypes: application/json}", ok: func(c *Config) bool {
			return c.ContentType == "application/json" && c.AcceptContentTypes == "application/json"
		}},
		{file: "logging: {verbosity: 2, format: json}", args: []string{"-v=4"}, ok: func(c *Config) bool {
			return c.Logging == Logging{Format: "json", Verbosity: 4}
		}},
		{file: "oomScoreAdj: 0", ok: func(c *Config) bool { return *c.OOMScoreAdj == 0 }},
	} {
		c, err := parse(t, append(test.args, "--config="+writeFile(t, test.file), "--hostname-override=n")...)
		if err != nil {
			t.Errorf("%q: %v", test.file, err)
		} else if !test.ok(c) {
			t.Errorf("%q %q: got %+v", test.file, test.args, c)
		}
	}
}

func about(word string) func(string) bool {
	return func(warning string) bool { return strings.Contains(warning, word) }
}

// Each is accepted, and the log says that it does nothing.
func TestFilesWithoutEffect(t *testing.T) {
	for file, want := range map[string]string{
		"unknown: 1":                                                 `unknown field "unknown"`,
		"mode: ipvs\nmode: iptables":                                 `"mode" already set`,
		"configSyncPeriod: 1m":                                       "--config-sync-period",
		"winkernel: {enableDSR: true}":                               "winkernel",
		"ipvs: {excludeCIDRs: [10.0.0.0/8]}":                         "--ipvs-exclude-cidrs",
		"ipvs: {strictARP: true}":                                    "--ipvs",
		"featureGates: {WatchList: false}":                           "feature gate WatchList",
		"featureGates: {Magic: true, AllowServiceExternalIPs: true}": "feature gate Magic=true: kube-proxy 1.36 to 1.38 do not know it",
		"featureGates: {NFTablesProxyMode: false}":                   "feature gate NFTablesProxyMode=false: it is locked to true",
		"featureGates: {NFTablesNetlink: false}":                     "feature gate NFTablesNetlink",
		"featureGates: {ManagedFieldsOptOut: true}":                  "feature gate ManagedFieldsOptOut",
		"featureGates: {SidecarContainers: false}":                   "feature gate SidecarContainers=false: it is locked",
		"logging: {flushFrequency: 1s}":                              "--log-flush-frequency",
		`showHiddenMetricsForVersion: "1.35"`:                        "--show-hidden-metrics-for-version",
		"logging: {vmodule: [{filePattern: proxier, verbosity: 3}]}": "--vmodule",
	} {
		c, err := parse(t, "--config="+writeFile(t, "clusterCIDR: 10.0.0.0/8\n"+file), "--hostname-override=n")
		if err != nil {
			t.Errorf("%s: %v", file, err)
		} else if len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], want) {
			t.Errorf("%s: warnings are %q, want one that says %q", file, c.Warnings, want)
		}
	}
	c, err := parse(t, "--config="+writeFile(t, kubeadm), "--hostname-override=n", "--cluster-cidr=10.0.0.0/8", "--proxy-mode=ipvs")
	if err != nil || len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "--cluster-cidr, --proxy-mode") {
		t.Errorf("flags beside a file: warnings %q, %v", c.Warnings, err)
	}
}

// The messages name the file, the field and what to do.
func TestMistakesInFilesAreNamed(t *testing.T) {
	for file, want := range map[string][]string{
		"mode: fast":                                       {"mode: fast: not one of auto, nftables, iptables, ipvs"},
		"iptables: {masqueradeBit: 32}":                    {"iptables.masqueradeBit: 32: the packet mark has the bits 0 to 31"},
		"metricsBindAddress: localhost":                    {"metricsBindAddress: localhost: not an IP address, with or without a port, such as 127.0.0.1:10249 or ::1, nor 0 for nowhere"},
		"nodePortAddresses: [localhost, localhost]":        {`nodePortAddresses: localhost,localhost: "localhost" is given twice`},
		"healthzBindAddress: 0.0.0.0:0":                    {"healthzBindAddress: 0.0.0.0:0: the port must be from 1 to 65535; 0 alone is for nowhere"},
		"detectLocalMode: BridgeInterface":                 {"detectLocal.bridgeInterface: the mode BridgeInterface of telling Pods from other traffic needs it"},
		"clusterCIDR: ten":                                 {`clusterCIDR: ten: "ten" is not a CIDR such as 10.0.0.0/8 or fd00::/48`},
		"mode: ipvs\nfeatureGates: {KubeProxyIPVS: false}": {"mode: ipvs: the feature gate KubeProxyIPVS is set to false"},
		"mode: ipvs\nipvs: {tcpTimeout: -1s}":              {"ipvs.tcpTimeout: -1s: must not be negative"},
		"mode: nftables\nnftables: {minSyncPeriod: 1m}":    {"nftables.minSyncPeriod: 1m0s: must not be longer than the sync period, which is 30s"},
		"oomScoreAdj: 2000\nconntrack: {min: -1}":          {"oomScoreAdj: 2000: must be from -1000 to 1000", "conntrack.min: -1: must not be negative"},
		"logging: {format: xml}":                           {"logging.format: xml: Unsupported log format"},
		"iptables: {syncPeriod: soon}":                     {`invalid duration "soon"`},
		"hostnameOverride: ' '":                            {"hostnameOverride=", "Node object"},
		"a: b: c":                                          {"not YAML"},
	} {
		path := writeFile(t, file)
		_, err := parse(t, "--config="+path)
		if err == nil {
			t.Errorf("%s is accepted", file)
			continue
		}
		for _, want := range want {
			if !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
				t.Errorf("%s: the error %q does not say %q and the file", file, err, want)
			}
		}
	}
}

func TestFilesThatAreNone(t *testing.T) {
	dir := t.TempDir()
	if _, err := parse(t, "--config="+filepath.Join(dir, "none")); err == nil || !strings.Contains(err.Error(), "--config="+filepath.Join(dir, "none")+": no such file or directory; name a file") {
		t.Errorf("a file that is not there: %v", err)
	}
	if _, err := parse(t, "--config="+dir); err == nil || !strings.Contains(err.Error(), "is a directory") {
		t.Errorf("a directory: %v", err)
	}
	for text, want := range map[string]string{
		"":                                `it should begin with "apiVersion: kubeproxy.config.k8s.io/v1alpha1"`,
		"apiVersion: v1\nkind: ConfigMap": `it is a "ConfigMap" of "v1"`,
		"- a":                             "not YAML",
	} {
		path := filepath.Join(dir, "config.conf")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := parse(t, "--config="+path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// What is written is read as the same configuration.
func TestWrittenFileIsReadBack(t *testing.T) {
	for _, args := range [][]string{
		{"--proxy-mode=nftables", "--iptables-masquerade-bit=3", "--metrics-port=0"},
		{"--proxy-mode=ipvs", "--ipvs-scheduler=sh", "--nodeport-addresses=10.0.0.0/8"},
		{"--mode=auto", "--healthz-bind-address="},
		{"--config=" + writeFile(t, kubeadm)},
	} {
		c, err := parse(t, append(args, "--hostname-override=n")...)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "written.yaml")
		if err := Write(path, c.KubeProxy); err != nil {
			t.Fatal(err)
		}
		again, err := parse(t, "--config="+path)
		if err != nil {
			t.Fatal(err)
		}
		c.MinSyncPeriod = again.MinSyncPeriod // written with its default, it counts as given
		c.Warnings, again.Warnings = nil, nil
		c.ModeReason, again.ModeReason = "", ""
		c.ModeUnset, again.ModeUnset = false, false
		if !reflect.DeepEqual(c, again) {
			t.Errorf("%q: wrote %+v\nread %+v", args, c, again)
		}
	}
	if err := Write(filepath.Join(t.TempDir(), "no", "directory"), mustParse(t).KubeProxy); err == nil || !strings.Contains(err.Error(), "--write-config-to") {
		t.Errorf("a file that cannot be written: %v", err)
	}
}

func mustParse(t *testing.T, args ...string) *Config {
	t.Helper()
	c, err := parse(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestWhichModeAndWhy(t *testing.T) {
	for _, test := range []struct {
		args         []string
		want, reason string
	}{
		{nil, "auto", "nothing names a mode, which means auto; kube-proxy would take iptables, and --proxy-mode=iptables does so"},
		{[]string{"--proxy-mode="}, "iptables", "--proxy-mode is given and empty, which means iptables as with kube-proxy"},
		{[]string{"--proxy-mode=ipvs"}, "ipvs", "--proxy-mode: ipvs"},
		{[]string{"--proxy-mode=ipvs", "--mode=ipvs"}, "ipvs", "--mode=ipvs"},
		{[]string{"--config=" + writeFile(t, "")}, "iptables", "the file of --config names no mode, which means iptables as with kube-proxy"},
		{[]string{"--config=" + writeFile(t, "mode: nftables")}, "nftables", "the file's mode: nftables"},
		{[]string{"--config=" + writeFile(t, ""), "--mode=auto"}, "auto", "--mode=auto"},
	} {
		unset := strings.Contains(test.reason, "which means")
		if c := mustParse(t, test.args...); c.Mode != test.want || c.ModeReason != test.reason || c.ModeUnset != unset {
			t.Errorf("%q: mode %s because of %q, want %s and %q", test.args, c.Mode, c.ModeReason, test.want, test.reason)
		}
	}
}

// Whatever stands in a file, it is a configuration or an error.
func FuzzFile(f *testing.F) {
	f.Add("")
	f.Add(kubeadm)
	f.Add("mode: ipvs\nipvs: {tcpTimeout: -1s}\nclusterCIDR: \"10.0.0.0/8,fd00::/8\"")
	f.Add("conntrack: {maxPerCore: null, tcpCloseWaitTimeout: 1s}\nlogging: {flushFrequency: 1s, vmodule: [{filePattern: a}]}")
	f.Add("featureGates: {AllAlpha: true}\nnodePortAddresses: [primary]\nbindAddress: \"::%a\"")
	f.Fuzz(func(t *testing.T, text string) {
		k, ignored, err := decode([]byte(fileHead + text))
		if err != nil {
			return
		}
		var flags Flags
		flags.Add(pflag.NewFlagSet("", pflag.ContinueOnError))
		r, err := flags.mergeFile(k, ignored, nil)
		if err != nil {
			t.Fatal(err)
		}
		complete(k)
		if r.validate() != nil {
			return
		}
		c, err := flags.build(r)
		if err != nil {
			return // the host name that a file may give
		}
		if !slices.Contains(modes.Names(), c.Mode) || c.MasqueradeMark == 0 || c.SyncPeriod <= 0 {
			t.Errorf("%+v follows from a configuration that breaks no rule", c)
		}
	})
}
