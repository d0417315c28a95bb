// SPDX-License-Identifier: Apache-2.0

package hack

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// stages is a Makefile whose second stage fails as `go test` does.
const stages = `
first third:
	@echo $@ ran
second:
	@printf -- '--- FAIL: TestSecond (0.00s)\nFAIL\tsignalbox/second\t0.010s\n'; exit 1
`

func TestEveryStageRuns(t *testing.T) {
	for _, c := range []struct {
		name   string
		stages []string
		want   string
		exit   int
	}{
		{"one fails", []string{"first", "second", "third"}, `(?s)first ran.*FAIL.*third ran.*== summary.*
first +ok +0 min \d\d s
second +FAILED +0 min \d\d s
    --- FAIL: TestSecond \(0.00s\)
    FAIL	signalbox/second	0.010s
    make: \*\*\* .*
third +ok +0 min \d\d s
$`, 1},
		{"none fails", []string{"first", "third"}, `(?s)== summary.*
first +ok +0 min \d\d s
third +ok +0 min \d\d s
$`, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			script, err := filepath.Abs("stages.sh")
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), script, c.stages...)
			cmd.Dir = t.TempDir()
			cmd.Env = append(os.Environ(), "MAKE=make", "MAKEFLAGS=", "MAKELEVEL=0")
			if err := os.WriteFile(filepath.Join(cmd.Dir, "Makefile"), []byte(stages), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := cmd.CombinedOutput()
			if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != c.exit {
				t.Errorf("it ended with %v, want exit code %d", err, c.exit)
			}
			if !regexp.MustCompile(c.want).Match(out) {
				t.Errorf("it printed\n%s\nwant %s", out, c.want)
			}
		})
	}
}
