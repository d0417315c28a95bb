// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"signalbox/internal/netlab"
)

const balancedManifest = `apiVersion: v1
kind: Service
metadata: {name: balanced}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.20
  clusterIPs: [10.96.0.20]
  externalTrafficPolicy: Local
  healthCheckNodePort: 31900
  ports: [{name: http, port: 80, nodePort: 30080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: balanced-1, labels: {kubernetes.io/service-name: balanced}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.244.1.5], nodeName: node1}, {addresses: [10.244.2.5], nodeName: node2}]
`

// daemon is the program at work on a lab's node1.
type daemon struct {
	node
	cmd *exec.Cmd
	log *strings.Builder
}

func startDaemon(t *testing.T, host *netlab.Host, binary, source string, flags ...string) *daemon {
	t.Helper()
	return startDaemonOn(t, os.Getenv("PATH"), host, binary, source, flags...)
}

// startDaemonOn is startDaemon with a PATH.
func startDaemonOn(t *testing.T, path string, host *netlab.Host, binary, source string, flags ...string) *daemon {
	t.Helper()
	d := &daemon{node: node{t, host}, log: &strings.Builder{}}
	d.cmd = exec.Command(binary, append([]string{
		"run", "--source", source, "--mode", "nftables", "--hostname-override", "node1", "--cluster-cidr", "10.244.0.0/16",
		"--conntrack-max-per-core=0", "--conntrack-min=0", "--oom-score-adj=0",
	}, flags...)...)
	d.cmd.Env = append(os.Environ(), "PATH="+path)
	d.cmd.Stderr = d.log
	if err := host.Start(d.cmd); err != nil {
		t.Fatal(err)
	}
	return d
}

// stop ends the program as a supervisor does.
func (d *daemon) stop() {
	d.Helper()
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		d.Fatal(err)
	}
	if err := d.cmd.Wait(); err != nil {
		d.Errorf("it ended with %v\n%s", err, d.log)
	}
}

// get returns status and body, or an error.
func (d *daemon) get(url string) (int, string, error) {
	client := d.host.Client()
	defer client.CloseIdleConnections()
	resp, err := client.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

// answers waits until a URL is answered with the status and all of the parts.
func (d *daemon) answers(url string, status int, parts ...string) {
	d.Helper()
	eventually(d.T, fmt.Sprintf("%s: %d, %q", url, status, parts), func() bool {
		got, body, err := d.get(url)
		if err != nil || got != status {
			return false
		}
		for _, part := range parts {
			if !strings.Contains(body, part) {
				return false
			}
		}
		return true
	})
}

func newNode(t *testing.T) *netlab.Host {
	t.Helper()
	lab := newLab(t)
	return lab.Host("node1")
}

// Without an API server health, metrics and the answers to load balancers are
// what they are with one, but that nobody need write a Node object.
func TestObservedWithoutAPIServer(t *testing.T) {
	t.Parallel()
	binary, source, host := build(t), manifests(t), newNode(t)
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(source, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("balanced.yaml", balancedManifest)
	for range 2 { // the ports are free at once when the program has ended
		d := startDaemon(t, host, binary, source, "--nodeport-addresses=0.0.0.0/0", "--profiling", "--bind-address-hard-fail", "--status-page")
		d.answers("http://127.0.0.1:31900/", 200, `"localEndpoints": 1`, `"name": "balanced"`)
		d.answers("http://127.0.0.1:10256/healthz", 200, `"nodeEligible":true`, `"IPv4":{"lastUpdated"`, `"IPv6":{"lastUpdated"`)
		d.answers("http://[::1]:10256/livez", 200)
		d.answers("http://127.0.0.1:10249/proxyMode", 200, "nftables")
		d.answers("http://127.0.0.1:10249/services", 200, "default/balanced", "<code>10.96.0.20:80/tcp</code>")
		d.answers("http://127.0.0.1:10249/services/default/balanced", 200, "10.244.2.5:8080")
		d.answers("http://127.0.0.1:10249/statusz", 200, " /services")
		d.answers("http://127.0.0.1:10249/flagz", 200, "source="+source, "profiling=true")
		d.answers("http://127.0.0.1:10249/configz", 200, `"kubeproxy.config.k8s.io":{"kind":"KubeProxyConfiguration"`, `"enableProfiling":true`)
		d.answers("http://127.0.0.1:10249/debug/pprof/goroutine?debug=1", 200, "health.(*Services).Run")
		d.answers("http://127.0.0.1:10249/metrics", 200,
			"signalbox_objects{kind=\"Service\"} 2\n", "signalbox_service_health_checks{ip_family=\"IPv4\"} 1\n", "signalbox_service_ports{ip_family=\"IPv4\"} 2\n",
			"signalbox_kernel_objects{ip_family=\"IPv4\",kind=\"element\",table=\"signalbox\"}", "signalbox_mode_info{mode=\"nftables\"} 1\n",
			"kubeproxy_proxy_healthz_total{code=\"200\"}", "kubernetes_feature_enabled{name=\"AllowServiceExternalIPs\",stage=\"\"} 1\n")
		d.stop()
	}
	d := startDaemon(t, host, binary, source, "--nodeport-addresses=0.0.0.0/0", "--metrics-port=0")
	d.answers("http://127.0.0.1:31900/", 200)
	if _, _, err := d.get("http://127.0.0.1:10249/healthz"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("metrics that are switched off: %v", err)
	}
	// The last local endpoint goes; then the node is being drained.
	write("balanced.yaml", strings.Replace(balancedManifest, "nodeName: node1", "nodeName: node2", 1))
	d.answers("http://127.0.0.1:31900/", 503, `"localEndpoints": 0`, `"serviceProxyHealthy": true`)
	write("node.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: node1}\nspec: {taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]}\n")
	d.answers("http://127.0.0.1:10256/healthz", 503, `"nodeEligible":false,"healthy":true`)
	d.answers("http://127.0.0.1:10256/livez", 200)
	d.stop()
}

// brokenTools returns a PATH on which iptables-restore fails for as long as the
// file exists whose name is returned too.
func brokenTools(t *testing.T) (path, broken string) {
	t.Helper()
	dir := t.TempDir()
	broken = filepath.Join(dir, "broken")
	for _, tool := range []string{"iptables", "ip6tables"} {
		for _, variant := range []string{"", "-nft", "-legacy"} {
			name := tool + variant + "-restore"
			path, err := exec.LookPath(name)
			if err != nil {
				t.Fatal(err)
			}
			script := fmt.Sprintf("#!/bin/sh\n[ -e %s ] && echo broken >&2 && exit 1\nexec %s \"$@\"\n", broken, path)
			if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir + ":" + os.Getenv("PATH"), broken
}

// A kernel that takes nothing any more makes the node unhealthy, for the one
// who asks about the node and for the one who asks about a Service, until it
// does again.
func TestUnhealthyDataplane(t *testing.T) {
	t.Parallel()
	binary, source, host := build(t), manifests(t), newNode(t)
	balanced := filepath.Join(source, "balanced.yaml")
	if err := os.WriteFile(balanced, []byte(balancedManifest), 0o600); err != nil {
		t.Fatal(err)
	}
	// The legacy variant needs the tools for every change.
	for _, restore := range []string{"iptables-legacy-restore", "ip6tables-legacy-restore"} {
		node{t, host}.must("*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n", restore)
	}
	path, broken := brokenTools(t)
	d := startDaemonOn(t, path, host, binary, source, "--mode=iptables", "--iptables-sync-period=1s", "--iptables-min-sync-period=1s")
	const check, livez, healthz = "http://127.0.0.1:31900/", "http://127.0.0.1:10256/livez", "http://127.0.0.1:10256/healthz"
	d.answers(check, 200, `"localEndpoints": 1`)
	d.answers(healthz, 200)

	if err := os.WriteFile(broken, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	more := strings.Replace(balancedManifest, "10.244.2.5], nodeName: node2", "10.244.1.6], nodeName: node1", 1)
	if err := os.WriteFile(balanced, []byte(more), 0o600); err != nil {
		t.Fatal(err)
	}
	d.answers(livez, 503, `"healthy":false,"status":{"IPv4":{"lastUpdated":`)
	d.answers(healthz, 503, `"nodeEligible":true`)
	d.answers(check, 503, `"localEndpoints": 1`, `"serviceProxyHealthy": false`)
	d.answers("http://127.0.0.1:10249/metrics", 200, `kubeproxy_proxy_livez_total{code="503"}`)

	if err := os.Remove(broken); err != nil {
		t.Fatal(err)
	}
	d.answers(livez, 200)
	d.answers(check, 200, `"localEndpoints": 2`, `"serviceProxyHealthy": true`)
	d.stop()
}

// A port that somebody else has costs what is asked there, and is told of
// elsewhere.
func TestTakenPorts(t *testing.T) {
	t.Parallel()
	binary, source, host := build(t), manifests(t), newNode(t)
	if err := os.WriteFile(filepath.Join(source, "balanced.yaml"), []byte(balancedManifest), 0o600); err != nil {
		t.Fatal(err)
	}
	take := func(addr string) net.Listener {
		l, err := host.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	health, service := take(":10256"), take(":31900")
	defer service.Close()
	d := startDaemon(t, host, binary, source, "--nodeport-addresses=0.0.0.0/0")
	d.answers("http://127.0.0.1:10249/metrics", 200,
		"signalbox_listen_failing{server=\"healthz\"} 1\n", "signalbox_listen_failing{server=\"service-health\"} 1\n", "signalbox_listen_failing{server=\"metrics\"} 0\n",
		"signalbox_service_ports{ip_family=\"IPv4\"} 2\n")
	// The first failure may be a predecessor's port; the third is surely reported.
	d.answers("http://127.0.0.1:10249/metrics", 200, "signalbox_listen_failures_total{server=\"service-health\"} 3\n")
	service.Close()
	d.answers("http://127.0.0.1:31900/", 200, `"localEndpoints": 1`)
	d.stop()
	for _, words := range []string{`msg=starting mode=nftables reason="--mode=nftables"`, "server=healthz", "address=0.0.0.0:31900", "health checks cannot be answered", "service=default/balanced", "health checks are answered now"} {
		if !strings.Contains(d.log.String(), words) {
			t.Errorf("the log does not say %q:\n%s", words, d.log)
		}
	}

	d = startDaemon(t, host, binary, source, "--bind-address-hard-fail")
	if err := d.cmd.Wait(); err == nil || !strings.Contains(d.log.String(), "healthz server at 0.0.0.0:10256") {
		t.Errorf("with --bind-address-hard-fail: %v\n%s", err, d.log)
	}
	health.Close()
}

// In an update with a surge the new process gets the ports of the old one,
// and the old one has them again should the new one end.
func TestPortsChangeHands(t *testing.T) {
	t.Parallel()
	binary, source, host := build(t), manifests(t), newNode(t)
	if err := os.WriteFile(filepath.Join(source, "balanced.yaml"), []byte(balancedManifest), 0o600); err != nil {
		t.Fatal(err)
	}
	// Not even with this option does it matter that the old one has them yet.
	const hard = "--bind-address-hard-fail"
	const flagz, check, livez = "http://127.0.0.1:10249/flagz", "http://127.0.0.1:31900/", "http://127.0.0.1:10256/livez"
	old := startDaemon(t, host, binary, source, "--nodeport-addresses=0.0.0.0/0", "--v=1", hard)
	old.answers(flagz, 200, "\nv=1\n")
	old.answers(check, 200)
	next := startDaemon(t, host, binary, source, "--nodeport-addresses=0.0.0.0/0", "--v=2", hard)
	next.answers(flagz, 200, "\nv=2\n")
	next.answers(check, 200)
	next.answers(livez, 200)
	next.stop()
	old.answers(flagz, 200, "\nv=1\n")
	old.answers(check, 200)
	old.answers(livez, 200)
	old.stop()
	for _, log := range []*strings.Builder{old.log, next.log} {
		if strings.Contains(log.String(), "cannot be answered") {
			t.Errorf("a port that changes hands is an error in the log:\n%s", log)
		}
	}
}

// What the node serves without is in the answers of health, in the metrics and
// in what `signalbox ready` prints, from the start on, and costs no status.
func TestServesOnWithoutWhatIsBroken(t *testing.T) {
	binary, source, host := build(t), manifests(t), newNode(t)
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(source, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("balanced.yaml", balancedManifest)
	write("broken.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: broken}\nspec: {extra: true}\n")
	write("node.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n")
	d := startDaemon(t, host, binary, source, "--hostname-override=N1.Example.COM")
	const healthz, metrics = "http://127.0.0.1:10256/healthz", "http://127.0.0.1:10249/metrics"
	d.answers(healthz, 200, `"conditions":["no Node object is named \"n1.example.com\", but there are [\"n1\"]"`, `broken.yaml: document 1: Service default/broken: unknown field \"spec.extra\"`)
	d.answers(metrics, 200, "signalbox_node_missing 1\n", "signalbox_manifest_problems 1\n")
	ready := func() string {
		cmd := exec.Command(binary, "ready")
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := host.Start(cmd); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			return err.Error()
		}
		return out.String()
	}
	eventually(t, "signalbox ready names the Node and the manifest", func() bool {
		out := ready()
		return strings.Contains(out, `ready, but no Node object is named "n1.example.com"`) && strings.Contains(out, "broken.yaml: document 1")
	})
	write("broken.yaml", "")
	write("node.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: n1.example.com}\n")
	d.answers(metrics, 200, "signalbox_node_missing 0\n", "signalbox_manifest_problems 0\n")
	if _, body, err := d.get(healthz); err != nil || strings.Contains(body, "conditions") {
		t.Errorf("healthz answers %s, %v", body, err)
	}
	eventually(t, "signalbox ready names nothing", func() bool { return ready() == "" })
	d.stop()
}
