package file

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

// A file that appeared just now is read at once; if it does not parse, it may
// only be half written, and nobody is told.
func TestHalfWrittenFileIsNoNews(t *testing.T) {
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
		if concerned, ok := s.readOne(t.Context(), "a.yaml", true, map[string]map[key]manifest{}); ok || len(concerned) > 0 || log.Len() > 0 {
			t.Errorf("a hasty reading of %q gives %v, %v and logs %q", half, concerned, ok, log.String())
		}
	}
	if _, ok := s.readOne(t.Context(), "a.yaml", false, map[string]map[key]manifest{}); !ok || log.Len() == 0 {
		t.Error("a file that stays broken is not reported")
	}
}
