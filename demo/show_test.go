package demo

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"signalbox/modes"
	"signalbox/proxier"
)

// buildBinary builds the signalbox that the test shows.
func buildBinary(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "signalbox")
	if out, err := exec.Command("go", "build", "-o", path, "signalbox/cmd/signalbox").CombinedOutput(); err != nil {
		t.Fatalf("building signalbox: %v\n%s", err, out)
	}
	return path
}

// TestEveryModeIsShown runs the demo as its users do, only smaller.
func TestEveryModeIsShown(t *testing.T) {
	cfg := Config{
		Binary: buildBinary(t), Families: proxier.Families,
		Services: 3, Connections: minConnections, Changes: 4, Connects: 100,
	}
	for _, m := range modes.All {
		cfg.Modes = append(cfg.Modes, Mode{m.Name, m.Supported})
	}
	ownTemporaryFiles(t)
	before := machine(t)
	var b strings.Builder
	if err := Run(t.Context(), cfg, &b); err != nil {
		t.Errorf("the demo failed: %v", err)
	}
	shown := b.String()
	t.Log(shown)
	for _, m := range modes.All {
		for _, f := range proxier.Families {
			if want := fmt.Sprintf("%s over %s: of %d connections", m.Name, f, minConnections); !strings.Contains(shown, want) {
				t.Errorf("no table %q", want)
			}
		}
	}
	if want := fmt.Sprintf("%d of %d rows", len(places), len(places)); strings.Count(shown, want) != len(modes.All)*len(proxier.Families) {
		t.Errorf("%q is not there once for each mode and family", want)
	}
	checkUnchanged(t, before, shown)
}
