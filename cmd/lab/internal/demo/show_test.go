// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"signalbox/ipvs"
	"signalbox/modes"

	"signalbox/proxier/plan"
)

// buildPrograms builds signalbox and lab and returns their directory.
func buildPrograms(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", dir, "signalbox/cmd/signalbox", "signalbox/cmd/lab").CombinedOutput(); err != nil {
		t.Fatalf("building signalbox and lab: %v\n%s", err, out)
	}
	return dir
}

// TestEveryModeIsShown runs the demo as its users do, only smaller.
func TestEveryModeIsShown(t *testing.T) {
	cfg := Config{
		Binary: filepath.Join(buildPrograms(t), "signalbox"), Families: plan.Families,
		Services: 3, Changes: 4,
	}
	for _, m := range modes.All {
		if m.Name() == ipvs.Mode && m.Supported(plan.IPv4) != nil {
			continue // many kernels come without IPVS
		}
		cfg.Modes = append(cfg.Modes, Mode{m.Name(), m.Supported})
	}
	ownTemporaryFiles(t)
	before := machine(t)
	var b strings.Builder
	if err := Run(t.Context(), cfg, &b); err != nil {
		t.Errorf("the demo failed: %v", err)
	}
	shown := b.String()
	t.Log(shown)
	for _, m := range cfg.Modes {
		for _, f := range plan.Families {
			if want := fmt.Sprintf("%s over %s: of %d connections", m.Name, f, connections); !strings.Contains(shown, want) {
				t.Errorf("no table %q", want)
			}
		}
	}
	if want := fmt.Sprintf("%d of %d rows", len(places), len(places)); strings.Count(shown, want) != len(cfg.Modes)*len(plan.Families) {
		t.Errorf("%q is not there once for each mode and family", want)
	}
	checkUnchanged(t, before, shown)
}

// TestProcessIsEnded ends the demo from outside while its daemon serves.
func TestProcessIsEnded(t *testing.T) {
	lab := filepath.Join(buildPrograms(t), "lab")
	for _, c := range []struct {
		name   string
		end    func(p *os.Process, out io.Closer) error
		killed bool // it cannot even remove its files
	}{
		{"Ctrl-C", func(p *os.Process, _ io.Closer) error { return p.Signal(syscall.SIGINT) }, false},
		{"SIGTERM", func(p *os.Process, _ io.Closer) error { return p.Signal(syscall.SIGTERM) }, false},
		{"closed terminal", func(p *os.Process, _ io.Closer) error { return p.Signal(syscall.SIGHUP) }, false},
		{"closed pipe", func(_ *os.Process, out io.Closer) error { return out.Close() }, false},
		{"SIGKILL", func(p *os.Process, _ io.Closer) error { return p.Kill() }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			ownTemporaryFiles(t)
			before := machine(t)
			cmd := exec.Command(lab, "demo", "--services=0")
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			shown := readUntil(t, out, "first answer")
			if err := c.end(cmd.Process, out); err != nil {
				t.Error(err)
			}
			if err := cmd.Wait(); err == nil {
				t.Error("the demo says that all was shown")
			}
			if c.killed {
				awaitEnd(t, shown)
				return
			}
			checkUnchanged(t, before, shown)
		})
	}
}

// readUntil returns what comes up to a line with the words.
func readUntil(t *testing.T, from io.Reader, words string) string {
	t.Helper()
	var b strings.Builder
	for lines := bufio.NewScanner(from); lines.Scan(); {
		fmt.Fprintln(&b, lines.Text())
		if strings.Contains(lines.Text(), words) {
			return b.String()
		}
	}
	t.Fatalf("%q never came:\n%s", words, b.String())
	return ""
}

// awaitEnd waits until the daemon has ended. Its parent being gone, it may stay
// in the process table until somebody asks for it.
func awaitEnd(t *testing.T, shown string) {
	t.Helper()
	pid := pidInOutput.FindStringSubmatch(shown)[1]
	for deadline := time.Now().Add(exitTimeout); ; {
		stat, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the daemon still runs: %s", stat)
		}
	}
}
