// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	apiversion "k8s.io/apimachinery/pkg/version"

	"signalbox/internal/buildinfo"
)

// execute runs a command line and returns what it prints.
func execute(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(&out)
	err := root.ExecuteContext(t.Context())
	return out.String(), err
}

func TestVersion(t *testing.T) {
	for args, want := range map[string]string{
		"--version":             "signalbox version devel ",
		"--version=true":        "signalbox version devel ",
		"run --version":         "signalbox version devel ",
		"--version=raw":         `version.Info{Major:"1", Minor:"` + strings.Split(buildinfo.Kubernetes, ".")[1] + `", `,
		"--version --mode=fast": "signalbox version devel ", // before anything is checked
		"version":               "signalbox devel ",
	} {
		if got, err := execute(t, strings.Fields(args)...); err != nil || !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q, %v, want %q", args, got, err, want)
		}
	}
	for _, wrong := range []string{"--version=latest", "--version=vv1", "version -o yaml"} {
		if got, err := execute(t, strings.Fields(wrong)...); err == nil {
			t.Errorf("%s: %q", wrong, got)
		}
	}
}

// kube-proxy's image is asked for its version by its own name.
func TestVersionAsKubeProxy(t *testing.T) {
	for path, want := range map[string]string{
		"/usr/local/bin/kube-proxy": "Kubernetes " + buildinfo.Kubernetes + "+signalbox.devel",
		"kube-proxy":                "Kubernetes " + buildinfo.Kubernetes + "+signalbox.devel",
		"bin/signalbox":             "signalbox version " + versionText(),
	} {
		if got := versionFor("true", calledAs(path)); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

func TestVersionInJSON(t *testing.T) {
	text, err := execute(t, "version", "-o", "json")
	var got struct {
		Version, Revision string
		Kubernetes        apiversion.Info
	}
	if err != nil || json.Unmarshal([]byte(text), &got) != nil {
		t.Fatalf("%q, %v", text, err)
	}
	if got.Version != "devel" || got.Kubernetes.Major != "1" || !strings.HasPrefix(got.Kubernetes.GitVersion, buildinfo.Kubernetes+"+signalbox.") {
		t.Errorf("%+v", got)
	}
}
