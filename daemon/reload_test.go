// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"signalbox/internal/netlab"
)

const reloadManifest = `apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10]
  ports: [{name: http, port: 80, nodePort: 30080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [POD]}]
`

// off keeps a test from the ports and the settings of the machine.
const off = "healthzBindAddress: \"0\"\nmetricsBindAddress: \"0\"\nconntrack: {maxPerCore: 0}\n"

// serviceTo returns a directory with the manifests of a Service to one Pod.
func serviceTo(t *testing.T, pod *netlab.Host) string {
	t.Helper()
	source := t.TempDir()
	text := strings.Replace(reloadManifest, "POD", pod.Addr.V4.String(), 1)
	if err := os.WriteFile(filepath.Join(source, "web.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return source
}

// configMap is a directory as the kubelet mounts a ConfigMap: files are links
// through a link, which is switched to another directory.
type configMap struct {
	t    *testing.T
	dir  string
	made int
}

func mountConfiguration(t *testing.T) *configMap {
	t.Helper()
	c := &configMap{t: t, dir: t.TempDir()}
	if err := os.Symlink("..data/config.conf", c.path()); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *configMap) path() string { return filepath.Join(c.dir, "config.conf") }

func (c *configMap) write(text string) {
	c.t.Helper()
	c.made++
	version := "..version" + strings.Repeat("i", c.made)
	path := filepath.Join(c.dir, version)
	text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nhostnameOverride: node1\nclusterCIDR: 10.244.0.0/16\n" + text
	err := errors.Join(
		os.Mkdir(path, 0o700), os.WriteFile(filepath.Join(path, "config.conf"), []byte(text), 0o600),
		os.Symlink(version, filepath.Join(c.dir, "..data_tmp")), os.Rename(filepath.Join(c.dir, "..data_tmp"), filepath.Join(c.dir, "..data")))
	if err != nil {
		c.t.Fatal(err)
	}
}

// heard is what a process has logged so far.
type heard struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (h *heard) Write(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.text.Write(b)
}

func (h *heard) count(what string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.Count(h.text.String(), what)
}

// The configuration file changes in every way there is, and no connection is
// lost.
func TestConfigurationChanges(t *testing.T) {
	t.Parallel()
	binary := build(t)
	lab := newLab(t)
	node, client, outside := lab.Host("node1"), lab.Host("pod-x"), lab.Host("client1")
	mounted, source := mountConfiguration(t), serviceTo(t, lab.Host("pod-a"))
	mounted.write(off + "mode: nftables\nnodePortAddresses: [203.0.113.0/24]\n")

	log := start(t, node, binary, "--config", mounted.path(), "--source", source)
	web := netip.MustParseAddrPort("10.96.0.10:80")
	nodePort := netip.AddrPortFrom(node.Addr.V4, 30080)
	eventually(t, "the rules are there", func() bool { return log.count("msg=synced family=IPv4") == 1 })
	if answers(t, outside, nodePort, soon) {
		t.Fatal("the NodePort answers where it should not")
	}

	traffic := keepAsking(t, client, web)
	mounted.write(off + "mode: nftables\nnodePortAddresses: [0.0.0.0/0]\n")
	eventually(t, "the NodePort answers", func() bool { return answers(t, outside, nodePort, soon) })
	mounted.write(off + "mode: magic\n")
	eventually(t, "a wrong file is reported", func() bool { return log.count("mode: magic: not one of") > 0 })
	mounted.write(off + "mode: iptables\nnodePortAddresses: [0.0.0.0/0]\n")
	eventually(t, "the rules are iptables'", func() bool {
		var tables []byte
		err := node.Do(func() (err error) {
			tables, err = exec.Command("nft", "list", "tables").Output()
			return err
		})
		return err == nil && !strings.Contains(string(tables), "signalbox")
	})
	if !answers(t, client, web, hangTimeout) || !answers(t, outside, nodePort, hangTimeout) {
		t.Error("the Service does not answer any more")
	}
	asked, failed := traffic()
	if len(failed) > 0 || asked < 10 {
		t.Errorf("of %d connections %d failed, first: %v", asked, len(failed), failed[0])
	}
}

// Connections through the relay outlive a change that does not concern it.
func TestRelayOutlivesConfiguration(t *testing.T) {
	t.Parallel()
	lab := newLab(t)
	client := lab.Host("pod-x")
	mounted, source := mountConfiguration(t), serviceTo(t, lab.Host("pod-a"))
	mounted.write(off + "mode: userspace\n")
	log := start(t, lab.Host("node1"), build(t), "--config", mounted.path(), "--source", source)
	web := netip.MustParseAddrPort("10.96.0.10:80")
	eventually(t, "the rules are there", func() bool { return log.count("msg=synced family=IPv4") == 1 })
	traffic := keepAsking(t, client, web)
	mounted.write(off + "mode: userspace\niptables: {masqueradeAll: true}\n")
	eventually(t, "the change takes effect", func() bool { return log.count("msg=starting") == 2 && log.count("msg=synced family=IPv4") == 2 })
	if asked, failed := traffic(); len(failed) > 0 {
		t.Errorf("of %d connections %d failed, first: %v", asked, len(failed), failed[0])
	}
}

// A configuration that asks for another mode does not end what the relay of the
// one before has open; the relay's rules go with the last connection.
func TestRelayDrainsAfterConfiguration(t *testing.T) {
	t.Parallel()
	lab := newLab(t)
	client, node := lab.Host("pod-x"), lab.Host("node1")
	mounted, source := mountConfiguration(t), serviceTo(t, lab.Host("pod-a"))
	mounted.write(off + "mode: userspace\n")
	log := start(t, node, build(t), "--config", mounted.path(), "--source", source)
	web := netip.MustParseAddrPort("10.96.0.10:80")
	eventually(t, "the rules are there", func() bool { return log.count("msg=synced family=IPv4") == 1 })
	open, err := client.Open(t.Context(), "tcp", netip.AddrPort{}, web)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	tables := func() (list string) {
		if err := node.Do(func() error {
			out, err := exec.Command("nft", "list", "tables").Output()
			list = string(out)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return list
	}
	for i, mode := range []string{"nftables", "userspace", "nftables"} {
		mounted.write(off + "mode: " + mode + "\n")
		eventually(t, "mode "+mode+" serves", func() bool { return log.count("msg=synced family=IPv4") == i+2 })
		for range 20 {
			if !answers(t, client, web, hangTimeout) {
				t.Errorf("mode %s: a new connection is not answered", mode)
			}
		}
		if _, err := open.Ask(t.Context()); err != nil {
			t.Fatalf("mode %s: the open connection: %v", mode, err)
		}
	}
	if list := tables(); !strings.Contains(list, "signalbox-userspace") {
		t.Errorf("the rules of an open connection are gone: %s", list)
	}
	open.Close()
	eventually(t, "the relay's rules are gone", func() bool { return !strings.Contains(tables(), "signalbox-userspace") })
}

// A relay that another one replaces, for a change that does concern it, takes no
// more connections: it is not told of endpoints any more.
func TestRelayIsReplacedAtOnce(t *testing.T) {
	t.Parallel()
	lab := newLab(t)
	client, node := lab.Host("pod-x"), lab.Host("node1")
	mounted, source := mountConfiguration(t), serviceTo(t, lab.Host("pod-a"))
	mounted.write(off + "mode: userspace\n")
	log := start(t, node, build(t), "--config", mounted.path(), "--source", source)
	web := netip.MustParseAddrPort("10.96.0.10:80")
	// A SYN before that would leave an untranslated flow, which a later connection
	// from the same port meets for two minutes.
	eventually(t, "the rules are there", func() bool { return log.count("msg=synced family=IPv4") == 1 })
	traffic := keepAsking(t, client, web)
	for i, change := range []string{"ipvs: {scheduler: lc}\n", "iptables: {masqueradeBit: 15}\n"} {
		mounted.write(off + "mode: userspace\n" + change)
		eventually(t, "the change takes effect", func() bool { return log.count("msg=starting") == i+2 && log.count("msg=synced family=IPv4") == i+2 })
		eventually(t, "one relay listens", func() bool { return relaysAt(t, node) == 1 })
	}
	text := strings.Replace(reloadManifest, "POD", lab.Host("pod-b").Addr.V4.String(), 1)
	if err := os.WriteFile(filepath.Join(source, "web.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	asked := func() string {
		a, err := client.Ask(t.Context(), "tcp", netip.AddrPort{}, web)
		if err != nil {
			return err.Error()
		}
		return a.Server
	}
	eventually(t, "the new endpoint answers", func() bool { return asked() == "pod-b" })
	for range 40 {
		if got := asked(); got != "pod-b" {
			t.Fatalf("a new connection went to %s, which has left the Service", got)
		}
	}
	if asked, failed := traffic(); len(failed) > 0 {
		t.Errorf("of %d connections %d failed, first: %v", asked, len(failed), failed[0])
	}
}

// relaysAt counts the sockets that listen at the relay's first port.
func relaysAt(t *testing.T, node *netlab.Host) (n int) {
	t.Helper()
	if err := node.Do(func() error {
		table, err := os.ReadFile("/proc/thread-self/net/tcp")
		n = strings.Count(string(table), "00000000:2879 00000000:0000 0A")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

// answers says whether a connection is answered in time: soon where another try
// follows or no answer is due, else as late as a slow machine may.
func answers(t *testing.T, from *netlab.Host, at netip.AddrPort, within time.Duration) bool {
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	_, err := from.Ask(ctx, "tcp", netip.AddrPort{}, at)
	return err == nil
}

// start runs a program until the test ends, and hears what it logs.
func start(t *testing.T, on *netlab.Host, program string, args ...string) *heard {
	t.Helper()
	_, log := startProcess(t, on, program, args...)
	return log
}

// startProcess is start, and returns the process as well.
func startProcess(t *testing.T, on *netlab.Host, program string, args ...string) (*os.Process, *heard) {
	t.Helper()
	var log heard
	cmd := exec.Command(program, args...)
	cmd.Stderr = &log
	if err := on.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := cmd.Process.Signal(syscall.SIGTERM)
		if err := errors.Join(err, cmd.Wait()); err != nil {
			t.Errorf("it ended with %v", err)
		}
		if t.Failed() {
			t.Logf("it logged:\n%s", log.text.String())
		}
	})
	return cmd.Process, &log
}

const deadServer = `apiVersion: v1
kind: Config
clusters: [{name: dead, cluster: {server: "http://127.0.0.1:1"}}]
contexts: [{name: dead, context: {cluster: dead, user: nobody}}]
users: [{name: nobody, user: {}}]
current-context: dead
`

// A file that breaks no rule may still name what is not there. What was in
// force before is so again, and the next change counts.
func TestConfigurationThatDoesNotWork(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	lab := newLab(t)
	kubeconfig, mounted := filepath.Join(dir, "kubeconfig"), mountConfiguration(t)
	if err := os.WriteFile(kubeconfig, []byte(deadServer), 0o600); err != nil {
		t.Fatal(err)
	}
	const measured = "mode: nftables\nhealthzBindAddress: \"0\"\nconntrack: {maxPerCore: 0}\nclientConnection: {kubeconfig: "
	mounted.write(measured + kubeconfig + "}\n")
	node := lab.Host("node1")
	log := start(t, node, build(t), "--config", mounted.path())
	rejected := func(want string) {
		t.Helper()
		eventually(t, "signalbox_configuration_rejected is "+want, func() bool {
			return strings.Contains(page(node, "http://127.0.0.1:10249/metrics"), "\nsignalbox_configuration_rejected "+want+"\n")
		})
	}
	rejected("0")
	mounted.write(measured + filepath.Join(dir, "none") + "}\n")
	eventually(t, "it goes back", func() bool {
		return log.count("signalbox returned to the previous one") == 1 && log.count("msg=starting") == 2
	})
	rejected("1")
	mounted.write(measured + kubeconfig + "}\nnftables: {masqueradeAll: true}\n")
	eventually(t, "the next change counts", func() bool { return log.count("msg=starting") == 3 })
	rejected("0")
	mounted.write("mode: magic\n")
	rejected("1")
}

// page is what a server on a host's loopback address answers; empty for none.
func page(on *netlab.Host, url string) string {
	answer, err := on.Client().Get(url)
	if err != nil {
		return ""
	}
	defer answer.Body.Close()
	text, _ := io.ReadAll(answer.Body)
	return string(text)
}

// keepAsking opens one connection after the other, and asks on one that stays
// open. end stops it and says how often it asked and what failed. Nobody may
// have tried before the rules were there: connection tracking would remember
// the attempt, and a later connection from the same port would not be
// translated either.
func keepAsking(t *testing.T, from *netlab.Host, at netip.AddrPort) (end func() (asked int, failed []error)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	kept, err := from.Open(ctx, "tcp", netip.AddrPort{}, at)
	if err != nil {
		t.Fatal(err)
	}
	var asked int
	var failed []error
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			_, err1 := from.Ask(ctx, "tcp", netip.AddrPort{}, at)
			_, err2 := kept.Ask(ctx)
			if ctx.Err() != nil {
				return
			}
			asked++
			if err := errors.Join(err1, err2); err != nil {
				failed = append(failed, fmt.Errorf("at %s: %w", time.Now().UTC().Format(time.RFC3339Nano), err))
			}
		}
	}()
	return func() (int, []error) {
		cancel()
		<-done
		kept.Close()
		return asked, failed
	}
}
