// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestFindSignalbox has no signalbox beside the program that runs, the test.
func TestFindSignalbox(t *testing.T) {
	inPath := filepath.Join(t.TempDir(), "signalbox")
	if err := os.WriteFile(inPath, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", filepath.Dir(inPath))
	for named, want := range map[string]string{"": inPath, "signalbox": inPath, other: other} {
		if got, err := findSignalbox(named); got != want || err != nil {
			t.Errorf("--signalbox=%s: got %q and error %v, want %q", named, got, err, want)
		}
	}
	if _, err := findSignalbox("/nowhere"); err == nil || !strings.Contains(err.Error(), "--signalbox=/nowhere") {
		t.Errorf("got error %v, want one that names the flag and its value", err)
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := findSignalbox(""); err == nil || !strings.Contains(err.Error(), "name it with --signalbox") {
		t.Errorf("got error %v, want one with a remedy", err)
	}
}

func TestCheckModes(t *testing.T) {
	for _, c := range []struct {
		signalbox, kubeProxy []string
		want                 string
	}{
		{[]string{"nftables", "userspace"}, []string{"ipvs"}, ""},
		{[]string{"iptables"}, nil, "--mode=iptables: not one of nftables, iptables-nft, iptables-legacy, ipvs, userspace"},
		{nil, []string{"userspace"}, "--kube-proxy-mode=userspace: not one of nftables, iptables-nft, iptables-legacy, ipvs"},
	} {
		got := ""
		if err := checkModes(c.signalbox, c.kubeProxy); err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%v and %v: got %q, want %q", c.signalbox, c.kubeProxy, got, c.want)
		}
	}
}
