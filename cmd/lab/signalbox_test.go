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
