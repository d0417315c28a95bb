// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestExplain reads manifests, so that it asks no daemon. Each case has a golden file.
func TestExplain(t *testing.T) {
	for _, test := range []struct {
		golden, args string
		code         int
	}{
		{"service.txt", "shop/web", 0},
		{"service.json", "shop/web:http -o json", 0},
		{"pod.txt", "10.96.0.10:80 --from 10.244.1.12", 0},
		{"outside.txt", "203.0.113.5:80 --from 198.51.100.9", 0},
		{"nodeport.txt", "192.0.2.1:30080 --from 192.0.2.99 --mode iptables", 0},
		{"othernode.txt", "203.0.113.5:80 --from 198.51.100.9 --hostname-override node3", 3},
		{"portname.txt", "db.shop.svc.cluster.local:5432", 2},
		{"headless.txt", "shop/peers", 4},
		{"nobody.json", "10.96.0.10:443/udp -o json", 2},
	} {
		args := append([]string{"explain", "--source=testdata/explain/objects", "--hostname-override=node1", "--cluster-cidr=10.244.0.0/16"}, strings.Fields(test.args)...)
		got, err := execute(t, args...)
		var code exitStatus
		if errors.As(err, &code); int(code) != test.code || err != nil && code == 0 {
			t.Errorf("%s: %v, want exit code %d", test.args, err, test.code)
		}
		golden(t, filepath.Join("testdata/explain", test.golden), got)
	}
}

// What keeps diff from comparing ends it with code 2, as diff(1).
func TestDiffDoesNotCompare(t *testing.T) {
	for _, args := range [][]string{{"--bogus"}, {"default/web"}, {"--run-dir=" + t.TempDir()}, {"--run-dir="}} {
		_, err := execute(t, append([]string{"diff"}, args...)...)
		if code := exitStatus(0); !errors.As(err, &code) || code != 2 {
			t.Errorf("%q: %v", args, err)
		}
	}
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (- want, + got):\n%s", path, diff)
	}
}

// Without manifests and without a daemon, the error says what to do.
func TestNobodyToAsk(t *testing.T) {
	dir := "--run-dir=" + filepath.Join(t.TempDir(), "none")
	for args, want := range map[string]string{
		"explain shop/web " + dir:              "no --kubeconfig, --master or --source is given",
		"explain shop " + dir:                  "is neither HOST:PORT",
		"explain shop/web --source=x -o json":  "no such file",
		"explain shop/web --from=web-0 " + dir: "--from=web-0: give the IP address of a client",
		"status " + dir:                        "no signalbox of this network namespace answers",
		"status extra":                         "takes flags and no arguments",
		"explain shop/web -o yaml " + dir:      `invalid argument "yaml" for "-o, --output" flag: leave it out, or take json`,
		"diff -o yaml " + dir:                  "exit code 2",
		"trace shop/web -o yaml " + dir:        "leave it out, or take json",
		"version -o yaml":                      "leave it out, or take json",
	} {
		if out, err := execute(t, strings.Fields(args)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %q, %v; want %q", args, out, err, want)
		}
	}
}
