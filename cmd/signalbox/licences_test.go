// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// The binary has the licence of Go, of itself, and of every module that it links.
func TestLicences(t *testing.T) {
	text, err := execute(t, "licences")
	if err != nil {
		t.Fatal(err)
	}
	list, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	modules := slices.Compact(slices.Sorted(strings.FieldsSeq(string(list))))
	if len(modules) < 50 {
		t.Fatalf("signalbox links %q only", modules)
	}
	for _, module := range append(modules, "go.dev") {
		if !strings.Contains(text, "\n"+module+"/") {
			t.Errorf("the licence of %s is missing: make licence-texts", module)
		}
	}
}
