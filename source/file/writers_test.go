// SPDX-License-Identifier: Apache-2.0

package file

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// A command whose output is redirected to a file empties it long before it
// writes to it. Nothing may be deleted in between.
func TestFileThatIsBeingWritten(t *testing.T) {
	l := newLab(t, t.TempDir())
	l.want("synced")
	l.write("a.yaml", serviceManifest("one", "two"))
	l.want("apply Service one", "apply Service two")
	f, err := os.Create(filepath.Join(l.dir, "a.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, part := range []struct{ text, marker string }{
		{"", "after-emptying"}, {serviceManifest("one"), "after-half"}, {"---\n" + serviceManifest("three"), "after-all"},
	} {
		if _, err := f.WriteString(part.text); err != nil {
			t.Fatal(err)
		}
		l.write("marker.yaml", serviceManifest(part.marker))
		if part.marker == "after-emptying" {
			l.want("apply Service " + part.marker)
		} else {
			l.want("apply Service "+part.marker, "delete Service "+map[string]string{"after-half": "after-emptying", "after-all": "after-half"}[part.marker])
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	l.want("delete Service two", "apply Service three")
}

func TestFileThatIsWrittenAtTheStart(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "a.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.WriteFile(filepath.Join(dir, "b.yaml"), []byte(serviceManifest("two")), 0o600); err != nil {
		t.Fatal(err)
	}
	l := newLab(t, dir)
	l.want("apply Service two")
	if _, err := f.WriteString(serviceManifest("one")); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	l.want("apply Service one")
	l.want("synced")
}

func TestPipeIsNotWaitedFor(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(dir, "a.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "b.yaml"), []byte(serviceManifest("one")), 0o600); err != nil {
		t.Fatal(err)
	}
	l := newLab(t, dir)
	l.want("apply Service one")
	l.want("synced")
}
