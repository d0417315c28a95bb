// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"
	"testing"

	"signalbox/cmd/lab/internal/bench"
	"signalbox/internal/testbed"
)

func TestBenchSource(t *testing.T) {
	for _, c := range []struct {
		flags     benchFlags
		want, err string
	}{
		{benchFlags{source: "apiserver", kubeProxy: true}, testbed.FromAPIServer, ""},
		{benchFlags{source: "directory", against: []string{"other --source={source}"}}, testbed.FromDirectory, ""},
		{benchFlags{source: "directory", kubeProxy: true}, "", "leave out --kube-proxy"},
		{benchFlags{source: "directory", against: []string{"other --kubeconfig={kubeconfig}"}}, "", "{source} is the directory"},
		{benchFlags{source: "/some/path"}, "", "neither apiserver nor directory"},
	} {
		got, err := benchSource(&c.flags)
		if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%+v: got %q and error %v, want %q and %q", c.flags, got, err, c.want, c.err)
		}
	}
}

func TestBenchSizes(t *testing.T) {
	got, err := benchSizes([]string{"1000", "5000x50"}, 10)
	want := []bench.Size{{Services: 1000, Endpoints: 10}, {Services: 5000, Endpoints: 50}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v (%v), want %v", got, err, want)
	}
	for _, bad := range []string{"", "x", "0", "10x0", "-5", "1000x", "70000"} {
		if got, err := benchSizes([]string{bad}, 10); err == nil {
			t.Errorf("%q became %v", bad, got)
		}
	}
}
