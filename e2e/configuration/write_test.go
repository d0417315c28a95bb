package configuration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"signalbox/e2e/cluster"
)

// comparison is what both programs are given, and what must come of it. What
// they write is compared byte by byte, as people and programs do.
type comparison struct {
	args string // flags, separated by blanks
	file string // below the file's kind; the word "none" for no file

	refused bool // by both
	// otherwise are lines that signalbox has in the place of kube-proxy's, on
	// purpose.
	otherwise map[string]string
}

const none = "none"

// patience ends a test that hangs and decides nothing else.
const patience = 5 * time.Minute

var comparisons = []comparison{
	// Flags.
	{args: "--proxy-mode=", file: none},
	{args: "--proxy-mode=iptables", file: none},
	{args: "--proxy-mode=nftables", file: none},
	{args: "--proxy-mode=ipvs", file: none},
	{args: "", file: none, otherwise: map[string]string{"mode: iptables": "mode: auto"}},
	{args: "--proxy-mode=kernelspace", file: none, refused: true},
	{args: "--proxy-mode=nftables --masquerade-all --iptables-sync-period=20s --iptables-min-sync-period=2s", file: none},
	{args: "--proxy-mode=ipvs --masquerade-all --iptables-sync-period=20s --ipvs-sync-period=21s --ipvs-min-sync-period=2s", file: none},
	{args: "--proxy-mode=iptables --masquerade-all --iptables-sync-period=20s --iptables-min-sync-period=0 --ipvs-sync-period=21s", file: none},
	{args: "--proxy-mode=iptables --iptables-masquerade-bit=31 --iptables-localhost-nodeports=false", file: none},
	{args: "--proxy-mode=ipvs --iptables-masquerade-bit=3", file: none},
	{args: "--proxy-mode=nftables --iptables-masquerade-bit=3", file: none, otherwise: map[string]string{"  masqueradeBit: 14": "  masqueradeBit: 3"}},
	{args: "--proxy-mode=iptables --iptables-masquerade-bit=32", file: none, refused: true},
	{args: "--proxy-mode=iptables --iptables-masquerade-bit=-1", file: none, refused: true},
	{args: "--proxy-mode=iptables --iptables-sync-period=0", file: none, refused: true},
	{args: "--proxy-mode=iptables --iptables-min-sync-period=-1s", file: none, refused: true},
	{args: "--proxy-mode=iptables --iptables-min-sync-period=1m", file: none, refused: true},
	{args: "--proxy-mode=ipvs --ipvs-min-sync-period=1m", file: none, refused: true},
	{args: "--proxy-mode=iptables --ipvs-min-sync-period=1m", file: none},
	{args: "--proxy-mode=ipvs --ipvs-scheduler=sh --ipvs-strict-arp --ipvs-tcp-timeout=1m --ipvs-tcpfin-timeout=2m --ipvs-udp-timeout=1500ms --ipvs-exclude-cidrs=10.0.0.0/8", file: none},
	{args: "--proxy-mode=ipvs --ipvs-udp-timeout=-1s", file: none, refused: true},
	{args: "--proxy-mode=iptables --ipvs-udp-timeout=-1s", file: none},
	{args: "--proxy-mode=ipvs --ipvs-exclude-cidrs=10.0.0.0", file: none, refused: true},
	{args: "--proxy-mode=iptables --hostname-override=Node-1", file: none},
	{args: "--proxy-mode=iptables --bind-address=192.0.2.1", file: none},
	{args: "--proxy-mode=iptables --bind-address=::", file: none},
	{args: "--proxy-mode=iptables --bind-address=localhost", file: none, refused: true},
	{args: "--proxy-mode=iptables --healthz-bind-address=[::1]:1 --metrics-bind-address=0.0.0.0:2 --bind-address-hard-fail --profiling", file: none},
	{args: "--proxy-mode=iptables --healthz-bind-address=192.0.2.1", file: none, refused: true},
	{args: "--proxy-mode=iptables --metrics-bind-address=::1", file: none, refused: true},
	{args: "--proxy-mode=iptables --metrics-bind-address=localhost:1", file: none, refused: true},
	{args: "--proxy-mode=iptables --metrics-bind-address=127.0.0.1:0", file: none, refused: true},
	{args: "--proxy-mode=iptables --healthz-port=1 --metrics-port=2", file: none},
	{args: "--proxy-mode=iptables --metrics-port=0", file: none, otherwise: map[string]string{"metricsBindAddress: 127.0.0.1:10249": `metricsBindAddress: "0"`}},
	{args: "--proxy-mode=iptables --healthz-port=0", file: none, otherwise: map[string]string{"healthzBindAddress: 0.0.0.0:10256": `healthzBindAddress: "0"`}},
	{args: "--proxy-mode=iptables --metrics-bind-address=", file: none, otherwise: map[string]string{"metricsBindAddress: 127.0.0.1:10249": `metricsBindAddress: "0"`}},
	{args: "--proxy-mode=iptables --kubeconfig=/k --master=http://m --kube-api-qps=1.5 --kube-api-burst=7 --kube-api-content-type=application/json", file: none},
	{args: "--proxy-mode=iptables --kube-api-burst=-1", file: none, refused: true},
	{args: "--proxy-mode=iptables --cluster-cidr=10.0.0.0/8", file: none},
	{args: "--proxy-mode=iptables --cluster-cidr=10.0.0.0/8,fd00::/8", file: none},
	{args: "--proxy-mode=iptables --cluster-cidr=10.0.0.0", file: none, refused: true},
	{args: "--proxy-mode=iptables --cluster-cidr=10.0.0.0/8,11.0.0.0/8", file: none, refused: true},
	{args: "--proxy-mode=iptables --cluster-cidr=10.0.0.0/8,fd00::/8,fd01::/16", file: none, refused: true},
	{args: "--proxy-mode=iptables --detect-local-mode=NodeCIDR", file: none},
	{args: "--proxy-mode=iptables --detect-local-mode=BridgeInterface --pod-bridge-interface=cni0", file: none},
	{args: "--proxy-mode=iptables --detect-local-mode=InterfaceNamePrefix --pod-interface-name-prefix=veth", file: none},
	{args: "--proxy-mode=iptables --detect-local-mode=BridgeInterface", file: none, refused: true},
	{args: "--proxy-mode=iptables --detect-local-mode=InterfaceNamePrefix", file: none, refused: true},
	{args: "--proxy-mode=iptables --detect-local-mode=Magic", file: none, refused: true},
	{args: "--proxy-mode=iptables --nodeport-addresses=10.0.0.0/8,fd00::/8", file: none},
	{args: "--proxy-mode=iptables --nodeport-addresses=primary", file: none},
	{args: "--proxy-mode=nftables --nodeport-addresses=0.0.0.0/0", file: none},
	{args: "--proxy-mode=iptables --nodeport-addresses=primary,primary", file: none, refused: true},
	{args: "--proxy-mode=iptables --nodeport-addresses=10.0.0.1", file: none, refused: true},
	{args: "--proxy-mode=iptables --oom-score-adj=-1000", file: none},
	{args: "--proxy-mode=iptables --oom-score-adj=1001", file: none, refused: true},
	{args: "--proxy-mode=iptables --conntrack-max-per-core=0 --conntrack-min=0 --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=1s --conntrack-tcp-be-liberal --conntrack-udp-timeout=1s --conntrack-udp-timeout-stream=2s", file: none},
	{args: "--proxy-mode=iptables --conntrack-max-per-core=-1", file: none, refused: true},
	{args: "--proxy-mode=iptables --conntrack-tcp-timeout-established=-1s", file: none, refused: true},
	{args: "--proxy-mode=iptables --config-sync-period=1m", file: none},
	{args: "--proxy-mode=iptables --config-sync-period=0", file: none, refused: true},
	{args: "--proxy-mode=iptables --show-hidden-metrics-for-version=1.35", file: none},
	{args: "--proxy-mode=iptables --feature-gates=AllowServiceExternalIPs=false,NFTablesProxyMode=true,AllAlpha=true", file: none},
	{args: "--proxy-mode=iptables --feature-gates=NFTablesProxyMode=false", file: none, refused: true},
	{args: "--proxy-mode=iptables --feature-gates=NoSuchGate=true", file: none, refused: true},
	{args: "--proxy-mode=iptables -v=4 --vmodule=a=3,b=4 --log-flush-frequency=3s", file: none},
	{args: "--proxy-mode=iptables --logging-format=json", file: none},
	{args: "--proxy-mode=iptables --logging-format=xml", file: none, refused: true},
	{args: "--proxy-mode=iptables --logging-format=json --vmodule=a=3", file: none, refused: true},
	{args: "--proxy-mode=iptables --log-text-split-stream", file: none, refused: true},
	{args: "--proxy-mode=iptables --feature-gates=LoggingAlphaOptions=true --log-text-split-stream --log-text-info-buffer-size=1Ki", file: none},
	{args: "--proxy-mode=iptables --log-flush-frequency=0", file: none, refused: true},
	{args: "--proxy_mode=iptables --cluster_cidr=10.0.0.0/8", file: none},
	{args: "--no-such-flag", file: none, refused: true},
	{args: "--proxy-mode=iptables a-word", file: none, refused: true},

	// Files.
	{},
	{file: "mode: ipvs"},
	{file: "mode: ipvs\nipvs: {syncPeriod: 10s, minSyncPeriod: 2s, excludeCIDRs: [10.0.0.0/8]}\niptables: {masqueradeAll: true, syncPeriod: 11s}"},
	{file: "mode: nftables\nnftables: {masqueradeAll: true, syncPeriod: 10s, masqueradeBit: 3}\niptables: {syncPeriod: 11s, masqueradeBit: 4}"},
	{file: "mode: iptables\nnftables: {masqueradeAll: true, syncPeriod: 10s, masqueradeBit: 3}\niptables: {syncPeriod: 11s, masqueradeBit: 4}\nipvs: {syncPeriod: 3s, scheduler: rr, tcpTimeout: 3s}"},
	{file: "mode: userland", refused: true},
	{file: `{metricsBindAddress: "", healthzBindAddress: "", bindAddress: "::"}`, refused: true}, // not a map below the kind
	{file: "metricsBindAddress: \"\"\nhealthzBindAddress: \"\"\nbindAddress: \"::\""},
	{file: "metricsBindAddress: 192.0.2.1\nhealthzBindAddress: \"::1\""},
	{file: "metricsBindAddress: 192.0.2.1:x", refused: true},
	{file: "metricsBindAddress: localhost", refused: true},
	{file: "bindAddress: \"::ffff:192.0.2.1\""},
	{file: "bindAddress: everywhere", refused: true},
	{file: "unknown: field\nmode: ipvs\nMode: iptables"},
	{file: "mode: \"\"\nmode: ipvs"},
	{file: "iptables: {unknown: 1, masqueradeBit: 2}"},
	{file: "iptables: {masqueradeBit: two}", refused: true},
	{file: "iptables: {masqueradeBit: 40}", refused: true},
	{file: "nftables: {masqueradeBit: 40}"},
	{file: "mode: nftables\nnftables: {masqueradeBit: 40}", refused: true},
	{file: "iptables: {syncPeriod: 5s, minSyncPeriod: 10s}", refused: true},
	{file: "iptables: {syncPeriod: 5}", refused: true},
	{file: "iptables: {localhostNodePorts: false}"},
	{file: "ipvs: {syncPeriod: -5s}"},
	{file: "mode: ipvs\nipvs: {syncPeriod: -5s}", refused: true},
	{file: "mode: ipvs\nipvs: {tcpTimeout: -5s}", refused: true},
	{file: "featureGates: {AllowServiceExternalIPs: false}"},
	{file: "featureGates: {NoSuchGate: true}", refused: true},
	{file: "hostnameOverride: ' Node '"},
	{file: "hostnameOverride: theirs", args: "--hostname-override=Ours"},
	{file: "hostnameOverride: theirs", args: "--hostname-override="},
	{file: "mode: ipvs", args: "--proxy-mode=iptables --cluster-cidr=10.0.0.0/8 --feature-gates=NoSuchGate=true"},
	{file: "logging: {verbosity: 2, format: json, flushFrequency: 5000000000}"},
	{file: "logging: {verbosity: 2}", args: "-v=0"},
	{file: "logging: {verbosity: 2}", args: "-v=3 --logging-format=json --log-flush-frequency=3s"},
	{file: "logging: {vmodule: [{filePattern: a, verbosity: 3}]}"},
	{file: "logging: {vmodule: [{filePattern: a, verbosity: 3}]}", args: "--vmodule=b=4"},
	{file: "logging: {format: xml}", refused: true},
	{file: "logging: {flushFrequency: -1s}", refused: true},
	{file: "logging: {options: {json: {splitStream: true}}}"},
	{file: "clusterCIDR: \"10.0.0.0/8,fd00::/8\""},
	{file: "clusterCIDR: \"10.0.0.0/8, fd00::/8\"", refused: true},
	{file: "clusterCIDR: \"10.0.0.1/8\""},
	{file: "clusterCIDR: 10.0.0.0/8,", refused: true},
	{file: "detectLocalMode: NodeCIDR"},
	{file: "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}"},
	{file: "detectLocalMode: BridgeInterface", refused: true},
	{file: "detectLocal: {interfaceNamePrefix: cali}"},
	{file: "nodePortAddresses: []"},
	{file: "nodePortAddresses: [\"10.0.0.0/8\", \"fd00::/8\"]"},
	{file: "mode: nftables\nnodePortAddresses: []"},
	{file: "nodePortAddresses: [primary, primary]", refused: true},
	{file: "nodePortAddresses: [primary]\nwinkernel: {enableDSR: true}\nportRange: 1-2\nwindowsRunAsService: true"},
	{file: "oomScoreAdj: 0\nconntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, udpTimeout: 5s, tcpBeLiberal: true}"},
	{file: "conntrack: {min: -1}", refused: true},
	{file: "conntrack: {udpTimeout: -1s}", refused: true},
	{file: "oomScoreAdj: -1001", refused: true},
	{file: "clientConnection: {qps: 0, burst: 0, contentType: \"\", kubeconfig: a, acceptContentTypes: b}"},
	{file: "clientConnection: {qps: -1, burst: -1}", refused: true},
	{file: "configSyncPeriod: 0s"},
	{file: "configSyncPeriod: -1s", refused: true},
	{file: "showHiddenMetricsForVersion: \"1.35\"\nenableProfiling: true\nbindAddressHardFail: true"},
	{file: "a: b: c", refused: true},
	{file: "- a", refused: true},
	{file: "kind: Service", refused: true},
	{file: "apiVersion: kubeproxy.config.k8s.io/v1", refused: true},
}

func TestWrittenConfigurations(t *testing.T) {
	kubeProxy, err := cluster.Build(t.Context(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	signalbox, err := cluster.BuildSignalbox(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range comparisons {
		t.Run(c.name(), func(t *testing.T) {
			t.Parallel()
			theirs, refusal := c.write(t, kubeProxy.KubeProxy)
			ours, ourRefusal := c.write(t, signalbox)
			if (refusal != nil) != c.refused || (ourRefusal != nil) != c.refused {
				t.Fatalf("refused should be %v: kube-proxy: %v; signalbox: %v", c.refused, refusal, ourRefusal)
			}
			want := theirs
			for line, instead := range c.otherwise {
				i := strings.LastIndex(want, line+"\n")
				if i < 0 {
					t.Fatalf("kube-proxy does not write %q:\n%s", line, theirs)
				}
				want = want[:i] + instead + want[i+len(line):]
			}
			if diff := cmp.Diff(want, ours); diff != "" {
				t.Errorf("signalbox does not write what kube-proxy does (-want +got):\n%s", diff)
			}
		})
	}
}

func (c *comparison) name() string {
	return strings.ReplaceAll(strings.TrimSpace(c.args+" "+c.file), "\n", ";")
}

// head are the lines that every file begins with, unless it has its own.
func (c *comparison) head() string {
	var head string
	for _, line := range []string{"apiVersion: kubeproxy.config.k8s.io/v1alpha1\n", "kind: KubeProxyConfiguration\n"} {
		if key, _, _ := strings.Cut(line, " "); !strings.HasPrefix(c.file, key) {
			head += line
		}
	}
	return head
}

// write returns what a program writes, or what it says when it refuses.
func (c *comparison) write(t *testing.T, program string) (text string, refusal error) {
	t.Helper()
	dir := t.TempDir()
	out := filepath.Join(dir, "out.yaml")
	args := append(strings.Fields(c.args), "--write-config-to="+out)
	if c.file != none {
		in := filepath.Join(dir, "in.yaml")
		if err := os.WriteFile(in, []byte(c.head()+c.file+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config="+in)
	}
	// A program that takes the words for its daemon's would run for ever.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	said, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if ctx.Err() != nil {
		t.Fatalf("%s %q did not end:\n%s", program, args, said)
	}
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, said)
	}
	written, err := os.ReadFile(out)
	if err != nil {
		t.Fatalf("%s %q wrote nothing: %v\n%s", program, args, err, said)
	}
	return string(written), nil
}
