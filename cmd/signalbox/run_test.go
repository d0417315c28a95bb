// SPDX-License-Identifier: Apache-2.0

package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"signalbox/config"
)

// TestSeveralActions asks for several things that end the process: kube-proxy's
// order says which is done, and the log which are not.
func TestSeveralActions(t *testing.T) {
	for _, test := range []struct {
		cfg  config.Config
		does bool
		left string
	}{
		{config.Config{}, false, ""},
		{config.Config{InitOnly: true}, true, ""},
		{config.Config{Cleanup: true, InitOnly: true}, true, "--init-only"},
		{config.Config{WriteTo: "f", InitOnly: true}, true, "--init-only"},
		{config.Config{WriteTo: "f", Cleanup: true, InitOnly: true}, true, "--cleanup --init-only"},
	} {
		do, left := chosenAction(&test.cfg, slog.Default())
		if (do != nil) != test.does || strings.Join(left, " ") != test.left {
			t.Errorf("%+v: something is done: %v, left %q", test.cfg, do != nil, left)
		}
	}

	file := filepath.Join(t.TempDir(), "config.conf")
	log := standardError(t, func() {
		root := rootCommand()
		root.SetArgs([]string{"--write-config-to=" + file, "--cleanup", "--init-only"})
		if err := root.Execute(); err != nil {
			t.Error(err)
		}
	})
	if _, err := os.Stat(file); err != nil || !strings.Contains(log, `left="--cleanup --init-only"`) {
		t.Errorf("writing the configuration: %v; the log says\n%s", err, log)
	}
}

// standardError returns what is written there while fn runs.
func standardError(t *testing.T, fn func()) string {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	before := os.Stderr
	os.Stderr = file
	fn()
	os.Stderr = before
	text, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
