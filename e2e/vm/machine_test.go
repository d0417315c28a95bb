// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// misbehaving is a machine whose program ends as told, with only the modules
// that match.
func misbehaving(t *testing.T, how string, modules ...string) *Machine {
	t.Helper()
	dir := t.TempDir()
	m := &Machine{
		Kernel: fetchKernel(t), Guest: filepath.Join(dir, "guest"), Program: filepath.Join(dir, "program"),
		Args: []string{how}, Modules: modules, CPUs: 1, MiB: 1024, Accel: os.Getenv("SIGNALBOX_VM_ACCEL"),
	}
	goBuild(t, ".", "build", "-o", m.Guest, "./guest")
	goBuild(t, ".", "build", "-o", m.Program, "./testdata/misbehave")
	return m
}

// TestEndings shows that whatever goes wrong in a machine is reported as what
// it is, and that no machine stays behind.
func TestEndings(t *testing.T) {
	t.Parallel()
	t.Run("exit code", func(t *testing.T) {
		var output bytes.Buffer
		e, err := misbehaving(t, "exit").Run(t.Context(), func() {}, &output)
		if e.Exit != 7 || err != nil || output.String() != "about to exit\n" || e.CPU < time.Second {
			t.Errorf("%+v, error %v, output %q", e, err, &output)
		}
	})
	for how, c := range map[string]struct{ report, end string }{
		"panic": {"Kernel panic - not syncing: sysrq triggered crash", ""},
		"stall": {"rcu: INFO: rcu_sched self-detected stall on CPU", "qemu (signal: killed)"}, // by the runner
	} {
		t.Run("kernel "+how, func(t *testing.T) {
			_, err := misbehaving(t, how).Run(t.Context(), func() {}, &bytes.Buffer{})
			if !errors.Is(err, errFault) || !strings.Contains(err.Error(), c.report) || !strings.Contains(err.Error(), c.end) {
				t.Errorf("the error is %v", err)
			}
		})
	}
	t.Run("hang", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		late := errors.New("too late")
		_, err := misbehaving(t, "hang").Run(ctx, func() { cancel(late) }, &bytes.Buffer{})
		if !errors.Is(err, late) || !strings.Contains(err.Error(), "guest: starting /program") {
			t.Errorf("the error is %v", err)
		}
	})
	t.Run("not a program", func(t *testing.T) {
		m := misbehaving(t, "exit")
		m.Program = m.Kernel.Image
		if _, err := m.Run(t.Context(), func() {}, &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), "exec format error") {
			t.Errorf("the error is %v", err)
		}
	})
	t.Run("no kernel", func(t *testing.T) {
		m := misbehaving(t, "exit")
		k := *m.Kernel
		k.Image = filepath.Join(t.TempDir(), "none")
		m.Kernel = &k
		if _, err := m.Run(t.Context(), func() {}, &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), "could not open kernel file") {
			t.Errorf("the error is %v", err)
		}
	})
}

func TestModulesAreOrdered(t *testing.T) {
	modules, err := fetchKernel(t).modules(CommonModules)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, m := range modules {
		for _, n := range m.needs {
			if !seen[n] {
				t.Errorf("%s comes before %s, which it needs", m.name, n)
			}
		}
		if seen[m.name] {
			t.Errorf("%s comes twice", m.name)
		}
		seen[m.name] = true
	}
	for _, name := range []string{"ip_vs_mh", "dummy", "sctp", "br_netfilter", "xt_recent", "nft_numgen", "libcrc32c", "udp_tunnel"} {
		if !seen[name] {
			t.Errorf("%s is missing", name)
		}
	}
	if _, err := fetchKernel(t).modules([]string{"no_such_*"}); err == nil {
		t.Error("a pattern that matches nothing was accepted")
	}
}

func TestDependencies(t *testing.T) {
	info := "license=GPL\x00depends=nf-tables,libcrc32c\x00retpoline=Y\x00"
	if got := dependencies([]byte(info)); !slices.Equal(got, []string{"nf_tables", "libcrc32c"}) {
		t.Errorf("got %q", got)
	}
	if got := dependencies([]byte("depends=\x00")); len(got) != 0 {
		t.Errorf("a module that needs nothing needs %q", got)
	}
}

func TestReceive(t *testing.T) {
	for _, c := range []struct {
		name, text, output, err string
		exit                    int
	}{
		{"whole", `{"Ready":true}` + "\n" + `{"Output":"YWI="}{"Output":"Yw=="}{"Exit":3}`, "abc", "", 3},
		{"cut", `{"Ready":true}{"Output":"YWI="}`, "ab", errCut.Error(), 0},
		{"garbage", `{"Output":"YWI="}` + "\x00\xff", "ab", errCut.Error(), 0},
		{"error", `{"Error":"loading module x: bad","Exit":-1}`, "", "loading module x: bad", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			var output bytes.Buffer
			exit, err := receive(strings.NewReader(c.text), func() {}, &output)
			if exit != c.exit || output.String() != c.output || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("code %d, error %v, output %q", exit, err, &output)
			}
		})
	}
}

// TestCandidate resolves a metapackage, as apt knows it.
func TestCandidate(t *testing.T) {
	fetchKernel(t) // updates apt's lists where they lack
	k, err := candidate(t.Context(), DefaultKernel)
	if err != nil || !strings.HasSuffix(k.Package, "-cloud-amd64") || k.Package == DefaultKernel || k.Version == "" {
		t.Errorf("%+v, %v", k, err)
	}
	if _, err := candidate(t.Context(), "linux-image-no-such-kernel"); err == nil {
		t.Error("a package that does not exist was accepted")
	}
}
