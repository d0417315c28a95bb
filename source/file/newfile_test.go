// SPDX-License-Identifier: Apache-2.0

package file

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

// A new file is read at once. If it has faults, it may be half written, and
// nothing is logged.
func TestNewFileMayBeHalfWritten(t *testing.T) {
	var log bytes.Buffer
	s, err := New(t.TempDir(), slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.dir, "a.yaml")
	for _, half := range []string{"", web[:20], web + "---\nkind: {"} {
		if err := os.WriteFile(path, []byte(half), 0o600); err != nil {
			t.Fatal(err)
		}
		if changed, ok := s.readOne(t.Context(), "a.yaml", true, map[string]map[key]manifest{}); ok || len(changed) > 0 || log.Len() > 0 {
			t.Errorf("reading the new file %q gives %v, %v and logs %q", half, changed, ok, log.String())
		}
	}
	if _, ok := s.readOne(t.Context(), "a.yaml", false, map[string]map[key]manifest{}); !ok || log.Len() == 0 {
		t.Error("a file that stays broken is not reported")
	}
}
