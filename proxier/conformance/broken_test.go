// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// brokenVariable is set where this test binary was built with BreakSourceRanges.
const brokenVariable = "SIGNALBOX_BROKEN_SOURCE_RANGES"

// TestSourceRangesStandOnce breaks the shared rule about source ranges: the contract
// must fail in each mode that uses it.
func TestSourceRangesStandOnce(t *testing.T) {
	overlay, err := conformance.BreakSourceRanges("../..", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "test", "-overlay", overlay, "-count", "1", "-v", "-run", "^TestBrokenSourceRanges$", ".")
	cmd.Env = append(os.Environ(), brokenVariable+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, mode := range []string{nftablesMode.Name, userspaceMode.Name} {
		if !strings.Contains(string(out), "--- PASS: TestBrokenSourceRanges/"+mode) {
			t.Errorf("mode %s was not tried:\n%s", mode, out)
		}
	}
}

// TestBrokenSourceRanges runs in the binary with the broken rule. The virtual machine
// runs it for the ipvs mode, see e2e/vm.
func TestBrokenSourceRanges(t *testing.T) {
	if os.Getenv(brokenVariable) == "" {
		t.Skip("only for a binary that TestSourceRangesStandOnce builds")
	}
	s := scenario(t, "source-ranges")
	for _, mode := range []conformance.Mode{nftablesMode, userspaceMode, ipvsMode} {
		t.Run(mode.Name, func(t *testing.T) {
			if err := mode.Supported(plan.IPv4); err != nil {
				t.Skip(err)
			}
			if err := s.Try(t.Context(), mode); err == nil {
				t.Error("the contract does not find that every client passes")
			} else {
				t.Log(err)
			}
		})
	}
}
