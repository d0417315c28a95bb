// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"signalbox/explain"
	"signalbox/internal/netlab"
)

// TestExplainAsksTheDaemon asks the program that serves a node, as root does there. On
// a node without it, it reads the manifests by itself.
func TestExplainAsksTheDaemon(t *testing.T) {
	binary, lab, source, dir := build(t), newLab(t), t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(source, "balanced.yaml"), []byte(balancedManifest), 0o600); err != nil {
		t.Fatal(err)
	}
	host := lab.Host("node1")
	d := startDaemon(t, host, binary, source, "--run-dir="+dir)
	defer d.stop()
	run := func(host *netlab.Host, args ...string) (string, int) {
		t.Helper()
		cmd := exec.Command(binary, args...)
		var out, errors strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &errors
		if err := host.Start(cmd); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // the exit code says it
		return out.String() + errors.String(), cmd.ProcessState.ExitCode()
	}
	var answer explain.Answer
	eventually(t, "the daemon explains its Service", func() bool {
		out, _ := run(host, "explain", "default/balanced", "-o", "json", "--run-dir="+dir)
		return json.Unmarshal([]byte(out), &answer) == nil && len(answer.Ports) == 1 && answer.Ports[0].Kernel.Written != nil
	})
	if answer.Mode != "nftables" || answer.Origin != "manifests of "+source || !answer.Ports[0].Kernel.Current || answer.Compared[0].HoldsCount == 0 || answer.Compared[0].DifferencesCount > 0 {
		t.Errorf("the answer is %+v", answer)
	}
	if out, code := run(host, "explain", "10.96.0.20:80", "--from", "10.244.1.9", "--run-dir="+dir); code != 0 || !strings.Contains(out, "\nA new TCP connection from Pod 10.244.1.9 goes to one of 2 endpoints.\n") {
		t.Errorf("explain ends with %d\n%s", code, out)
	}
	if out, code := run(host, "status", "--run-dir="+dir); code != 0 || !strings.Contains(out, "Service ports: 1, endpoints: 2") {
		t.Errorf("status ends with %d\n%s", code, out)
	}
	if out, code := run(host, "diff", "--run-dir="+dir); code != 0 || out != "" {
		t.Errorf("diff ends with %d\n%s", code, out)
	}
	if out, code := run(lab.Host("node2"), "diff", "--run-dir="+dir); code != 2 || !strings.Contains(out, "no signalbox of this network namespace") {
		t.Errorf("on a node without a daemon, diff ends with %d\n%s", code, out)
	}
	if out, code := run(lab.Host("node2"), "status", "--run-dir="+dir); code != 1 || !strings.Contains(out, "no signalbox of this network namespace") {
		t.Errorf("on a node without a daemon, status ends with %d\n%s", code, out)
	}
	if out, code := run(lab.Host("node2"), "explain", "10.96.0.20:80", "--run-dir="+dir, "--source="+filepath.Clean(source)); code != 0 || !strings.Contains(out, "(manifests of ") {
		t.Errorf("on a node without a daemon, explain ends with %d\n%s", code, out)
	}
}
