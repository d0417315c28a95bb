// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// TestUnsupportedModeIsNamed also shows that one family is enough.
func TestUnsupportedModeIsNamed(t *testing.T) {
	cfg := fakeConfig(t, "exit 0")
	cfg.Modes = []Mode{{"ipvs", func(f plan.Family) error {
		return &proxier.UnsupportedError{Mode: "ipvs", Family: f, Missing: "ip_vs", Remedy: "load the module"}
	}}}
	ownTemporaryFiles(t)
	before := machine(t)
	var b strings.Builder
	err := Run(t.Context(), cfg, &b)
	if err == nil || !strings.Contains(err.Error(), "no mode could be shown") {
		t.Errorf("got error %v, want that no mode could be shown", err)
	}
	for _, f := range plan.Families {
		if want := fmt.Sprintf("mode ipvs cannot serve %s: ip_vs is missing; load the module", f); strings.Count(b.String(), want) != 2 {
			t.Errorf("%q is not there where it happened and at the end:\n%s", want, b.String())
		}
	}
	checkUnchanged(t, before, b.String())
}

// TestPanicInsideTheNode would end the process without cleaning up, as it is on
// another goroutine. Such a mode is not taken for one that is not supported.
func TestPanicInsideTheNode(t *testing.T) {
	cfg := fakeConfig(t, untilKilled)
	cfg.Modes[0].Supported = func(plan.Family) error { panic("out of range") }
	ownTemporaryFiles(t)
	before := machine(t)
	err := Run(t.Context(), cfg, io.Discard)
	if want := "asking the kernel what it can: panic: out of range"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got error %v, want one with %q", err, want)
	}
	checkUnchanged(t, before, "")
}

// fakeConfig shows a shell script in place of signalbox, in a mode that is
// always there.
func fakeConfig(t *testing.T, script string) Config {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fake")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return Config{
		Binary: path, Modes: []Mode{{"fake", func(plan.Family) error { return nil }}}, Families: plan.Families, Changes: 1,
	}
}

// unprivileged is set in the environment of a test that runs itself as a user
// without privileges.
const unprivileged = "SIGNALBOX_DEMO_UNPRIVILEGED"

func TestWithoutPrivileges(t *testing.T) {
	if os.Getenv(unprivileged) != "" {
		err := Run(t.Context(), fakeConfig(t, untilKilled), io.Discard)
		if err == nil || !strings.Contains(err.Error(), "needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN)") {
			t.Errorf("got error %v, want one that asks for root", err)
		}
		return
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestWithoutPrivileges$", "-test.v")
	cmd.Env = append(os.Environ(), unprivileged+"=1")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestWithoutPrivileges") {
		t.Errorf("as nobody: %v\n%s", err, out)
	}
}

// TestConfigIsChecked before anything is made.
func TestConfigIsChecked(t *testing.T) {
	for want, change := range map[string]func(*Config){
		"no mode":            func(c *Config) { c.Modes = nil },
		"no IP family":       func(c *Config) { c.Families = nil },
		"-1 Services":        func(c *Config) { c.Services = -1 },
		"65001 Services":     func(c *Config) { c.Services = MaxServices + 1 },
		"nothing to measure": func(c *Config) { c.Changes = 0 },
	} {
		cfg := fakeConfig(t, untilKilled)
		change(&cfg)
		var b strings.Builder
		if err := Run(t.Context(), cfg, &b); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got error %v, want one with %q", err, want)
		}
		if b.Len() > 0 {
			t.Errorf("%s: the demo went on: %s", want, b.String())
		}
	}
}

// ownLock ends a script that would make iptables' lock file outside the demo's
// directory for temporary files. Other programs make /run/xtables.lock, too, so
// that its absence proves nothing.
const ownLock = `case $XTABLES_LOCKFILE in "$TMPDIR"/*) ;; *) exit 4 ;; esac; `

// untilKilled is a script that does not end by itself.
const untilKilled = "exec sleep 100000"

var errPipe = errors.New("the reader is gone")

// TestMachineIsLeftAsItWas ends the demo in every way that it can be ended from
// inside, while its daemon runs.
func TestMachineIsLeftAsItWas(t *testing.T) {
	const running = "signalbox --source" // is printed once the daemon runs
	for _, c := range []struct {
		name, script, want string
		when               func(text string, cancel func()) error
	}{
		{"interrupted", untilKilled, "interrupted", func(text string, cancel func()) error {
			if strings.Contains(text, running) {
				cancel()
			}
			return nil
		}},
		{"the output's reader is gone", untilKilled, errPipe.Error(), func(text string, _ func()) error {
			if strings.Contains(text, running) {
				return errPipe
			}
			return nil
		}},
		{"a panic", untilKilled, "panic: on purpose", func(text string, _ func()) error {
			if strings.Contains(text, running) {
				panic("on purpose")
			}
			return nil
		}},
		{"the daemon fails", ownLock + "echo its last words >&2; exit 3", "exit status 3; its log ends with\nits last words", nil},
		{"the daemon ends by itself", "exit 0", "ended: exit status 0", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := fakeConfig(t, c.script)
			ownTemporaryFiles(t)
			before := machine(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var b strings.Builder
			out := writerFunc(func(text []byte) (int, error) {
				b.Write(text)
				if c.when != nil {
					if err := c.when(string(text), cancel); err != nil {
						return 0, err
					}
				}
				return len(text), nil
			})
			err := recovered(func() error { return Run(ctx, cfg, out) })
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got error %v, want one with %q", err, c.want)
			}
			if !strings.Contains(b.String(), running) {
				t.Errorf("the daemon was never started:\n%s", b.String())
			}
			checkUnchanged(t, before, b.String())
		})
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

var _ io.Writer = writerFunc(nil)

// state is what a demo could leave behind on a machine.
type state struct {
	Temporary  []string // files in the directory for temporary files
	Links      []string // network interfaces
	Tables     []string // nftables, which holds iptables-nft's rules too
	Namespaces []string // network namespaces that this process holds open
}

// ownTemporaryFiles keeps other programs' files out of the comparison.
func ownTemporaryFiles(t *testing.T) { t.Setenv("TMPDIR", t.TempDir()) }

func machine(t *testing.T) state {
	t.Helper()
	var s state
	for _, collect := range []func(*state) error{
		(*state).files, (*state).interfaces, (*state).rules, (*state).namespaces,
	} {
		if err := collect(&s); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (s *state) files() error {
	entries, err := os.ReadDir(os.TempDir())
	for _, e := range entries {
		s.Temporary = append(s.Temporary, e.Name())
	}
	return err
}

func (s *state) interfaces() error {
	links, err := netlink.LinkList()
	for _, l := range links {
		s.Links = append(s.Links, l.Attrs().Name)
	}
	return err
}

func (s *state) rules() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	tables, err := c.ListTables()
	for _, table := range tables {
		s.Tables = append(s.Tables, fmt.Sprintf("%d %s", table.Family, table.Name))
	}
	return err
}

func (s *state) namespaces() error {
	entries, err := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(to, "net:[") {
			s.Namespaces = append(s.Namespaces, to)
		}
	}
	slices.Sort(s.Namespaces)
	return err
}

var pidInOutput = regexp.MustCompile(`pid (\d+)`)

// checkUnchanged looks for what a demo that printed shown left behind.
func checkUnchanged(t *testing.T, before state, shown string) {
	t.Helper()
	if diff := cmp.Diff(before, machine(t)); diff != "" {
		t.Errorf("the machine is not as it was (-before +after):\n%s", diff)
	}
	for _, m := range pidInOutput.FindAllStringSubmatch(shown, -1) {
		pid, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("process %d is still there: %v", pid, err)
		}
	}
}
