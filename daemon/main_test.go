// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"
)

// hangTimeout ends a test that hangs. It is longer than a slow machine needs.
const (
	hangTimeout = 2 * time.Minute
	soon        = time.Second
)

var programDir string // removed after the tests

func TestMain(m *testing.M) {
	var err error
	if programDir, err = os.MkdirTemp("", "signalbox-daemon-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(programDir)
	os.Exit(code)
}

var buildFlags []string

var buildOnce = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("SIGNALBOX"); path != "" { // in the virtual machine
		return path, nil
	}
	path := filepath.Join(programDir, "signalbox")
	args := slices.Concat([]string{"build"}, buildFlags, []string{"-o", path, "signalbox/cmd/signalbox"})
	out, err := exec.Command("go", args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// build returns the path of the program, which all tests share.
func build(t *testing.T) string {
	t.Helper()
	path, err := buildOnce()
	if err != nil {
		t.Fatal(err)
	}
	return path
}
