// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"signalbox/internal/netlab"
)

const manifest = `apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:96::10"]
  ports: [{name: http, port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.244.1.5]}]
`

// manifests returns a directory with manifest in it.
func manifests(t *testing.T) string {
	t.Helper()
	source := t.TempDir()
	if err := os.WriteFile(filepath.Join(source, "web.yaml"), []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	return source
}

// newLab returns a lab that ends with the test.
func newLab(t testing.TB) *netlab.Lab {
	t.Helper()
	lab, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lab.Close() })
	return lab
}

// Whatever mode a node is switched to, in the end the rules of that mode alone
// are there.
func TestModesLeaveNothingBehind(t *testing.T) {
	t.Parallel()
	binary, source := build(t), manifests(t)
	lab := newLab(t)
	node := lab.Host("node1")
	has := func(what string, command ...string) bool {
		var out []byte
		if err := node.Do(func() (err error) {
			out, err = exec.Command(command[0], command[1:]...).Output()
			return err
		}); err != nil {
			t.Fatalf("%q: %v", command, err)
		}
		return strings.Contains(string(out), what)
	}
	rules := map[string]func() bool{
		"nftables": func() bool { return has("table ip signalbox\n", "nft", "list", "tables") },
		"iptables": func() bool { return has("KUBE-S", "iptables-save") || has("KUBE-S", "ip6tables-save") },
		"userspace": func() bool {
			return has("signalbox-userspace", "nft", "list", "tables") || has("251.0.0.0/8", "ip", "route", "show", "table", "local")
		},
	}
	for _, mode := range []string{"nftables", "userspace", "iptables", "userspace", "nftables"} {
		cmd := exec.Command(binary, "run", "--source", source, "--mode", mode, "--hostname-override", "node1", "--cluster-cidr", "10.244.0.0/16")
		cmd.Stderr = t.Output()
		if err := node.Start(cmd); err != nil {
			t.Fatal(err)
		}
		for other, present := range rules {
			eventually(t, "in mode "+mode+", rules of mode "+other, func() bool { return present() == (other == mode) })
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("mode %s ended with %v", mode, err)
		}
		if !rules[mode]() {
			t.Errorf("mode %s took its rules away when it ended", mode)
		}
	}
}

// eventually waits for what another process does, for as long as a slow
// machine may take.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(hangTimeout)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: not as they should be", what)
		}
	}
}
