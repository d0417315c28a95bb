// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestBadInput gives what cannot be used, and demands that the error names the
// flag or the field, what it was given, and what to do.
func TestBadInput(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	none, nobody := filepath.Join(dir, "none.yaml"), filepath.Join(dir, "no", "file")
	const head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
	spaces, word := write("spaces.conf", head+"hostnameOverride: ' '\n"), write("mode.conf", head+"mode: magic\n")
	other, noYAML := write("other.yaml", "apiVersion: v1\nkind: ConfigMap\n"), write("noyaml", "a: b: c")
	for _, test := range []struct {
		args                   string // separated by commas
		setting, value, remedy string
	}{
		{"--config=" + none, "--config=", none + ": no such file", "name a file that is there"},
		{"--config=" + dir, "--config=", dir + ": is a directory", "name the file inside it"},
		{"--config=" + noYAML, "--config=", noYAML, "not YAML"},
		{"--config=" + other, "--config=", `"ConfigMap" of "v1"`, "give kube-proxy's configuration file"},
		{"--config=" + spaces, "hostnameOverride=", `" "`, "give the name of this node's Node object"},
		{"--config=" + word, "mode: ", "magic", "not one of auto, nftables"},
		{"--hostname-override= ", "--hostname-override=", `" "`, "give the name of this node's Node object"},
		{"--source=" + word, "--source=", word, "name the one that the manifests are in"},
		{"--source=/a,--kubeconfig=/b", "--source=", "/a", "not from both"},
		{"--write-config-to=" + nobody, "--write-config-to", nobody, "name a file in a directory that is there"},
		{"--kubeconfig=" + none, "--kubeconfig=", none + " (clientConnection.kubeconfig in a file): no such file", "name a file that is there"},
		{"--kubeconfig=" + noYAML, "--kubeconfig=", noYAML, "give one such as"},
		{"--kubeconfig=" + dir, "--kubeconfig=", dir, "name the file inside it"},
		{"--mode=fast", "--mode=", "fast", "not one of auto, nftables"},
		{"--mode=nftables,--proxy-mode=ipvs", "--mode=nftables", "--proxy-mode=ipvs", "give one of them"},
		{"--metrics-bind-address=localhost:1", "--metrics-bind-address=", "localhost:1", "such as 127.0.0.1:10249"},
		{"--oom-score-adj=-2000", "--oom-score-adj=", "-2000", "from -1000 to 1000"},
		{"run,extra", "signalbox run takes flags and no arguments", `"extra"`, "leave it out"},
		{"cleanup,kube-proxy", "signalbox cleanup takes flags", `"kube-proxy"`, "signalbox cleanup --help"},
		{"clean", "no command", `"clean"`, "signalbox --help"},
	} {
		root := rootCommand()
		root.SetArgs(strings.Split(test.args, ","))
		// What should be refused and is not has no time to serve.
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		err := root.ExecuteContext(ctx)
		if err == nil {
			t.Errorf("%s is accepted", test.args)
			continue
		}
		for what, want := range map[string]string{"the setting": test.setting, "the value": test.value, "a remedy": test.remedy} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: the error does not name %s, %q:\n%v", test.args, what, want, err)
			}
		}
	}
}
