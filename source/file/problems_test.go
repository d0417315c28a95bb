// SPDX-License-Identifier: Apache-2.0

package file

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"signalbox/internal/nstest"
)

// wantProblems waits for the next change of the problems, and wants one for each
// text, which contains it.
func (l *lab) wantProblems(texts ...string) {
	l.t.Helper()
	problems := <-l.problems
	if len(problems) != len(texts) {
		l.t.Fatalf("the problems are %q, want %q", problems, texts)
	}
	for i, text := range texts {
		if !strings.Contains(problems[i], text) {
			l.t.Fatalf("the problems are %q, want %q", problems, texts)
		}
	}
}

// A fault at the start is reported as long as it lasts: nobody may have seen the
// log.
func TestFaultsAreReported(t *testing.T) {
	dir := t.TempDir()
	broken := serviceManifest("one") + "  extra: true\n"
	if err := os.WriteFile(filepath.Join(dir, "a.yaml"), []byte(broken), 0o600); err != nil {
		t.Fatal(err)
	}
	l := newLab(t, dir)
	l.want("synced")
	l.wantProblems(`a.yaml: document 1: Service default/one: unknown field "spec.extra"`)
	l.write("b.yaml", "kind: {")
	l.wantProblems("a.yaml: document 1: Service default/one: unknown field", "b.yaml: document 1: ")
	l.write("a.yaml", serviceManifest("one"))
	l.want("apply Service one")
	l.wantProblems("b.yaml: document 1: ")
	if err := os.Remove(filepath.Join(dir, "b.yaml")); err != nil {
		t.Fatal(err)
	}
	l.wantProblems()
}

// A dump has many Endpoints objects. The fault after them counts.
func TestFaultAfterEndpointsIsReported(t *testing.T) {
	l := newLab(t, t.TempDir())
	l.want("synced")
	endpoints := "apiVersion: v1\nkind: Endpoints\nmetadata: {name: one}\n---\n"
	l.write("a.yaml", strings.Repeat(endpoints, maxFaults+1)+"kind: {")
	l.wantProblems("a.yaml: document 22: ")
}

func TestUnreadableFileIsReported(t *testing.T) {
	l := newLab(t, t.TempDir())
	l.want("synced")
	path := filepath.Join(l.dir, "a.yaml")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	l.wantProblems("a.yaml: not a regular file")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	l.wantProblems()
}

func TestEndpointsAreIgnored(t *testing.T) {
	l := newLab(t, t.TempDir())
	l.want("synced")
	l.write("a.yaml", serviceManifest("one")+"---\napiVersion: v1\nkind: Endpoints\nmetadata: {name: one}\n")
	l.want("apply Service one")
	for _, text := range []string{"Endpoints default/one is ignored", "a.yaml: document 2"} {
		if !strings.Contains(l.log.String(), text) {
			t.Errorf("the log has no %q:\n%s", text, l.log)
		}
	}
	l.write("a.yaml", serviceManifest("two")+"---\napiVersion: v1\nkind: Endpoints\nmetadata: {name: one}\n")
	l.want("delete Service one", "apply Service two") // the file counts as whole
}

// replace puts a new directory in the place of the watched one.
func (l *lab) replace() {
	l.t.Helper()
	if err := os.Rename(l.dir, l.dir+".old"); err != nil {
		l.t.Fatal(err)
	}
	if err := os.Mkdir(l.dir, 0o700); err != nil {
		l.t.Fatal(err)
	}
}

// A file system that is not mounted any more leaves an empty directory.
func TestEmptyDirectoryKeepsObjects(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "manifests")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l := newLab(t, dir)
	l.want("synced")
	l.write("a.yaml", serviceManifest("one", "two"))
	l.want("apply Service one", "apply Service two")
	l.replace()
	for problems := range l.problems {
		if len(problems) == 1 && strings.Contains(problems[0], "has no manifest any more") {
			break
		}
	}
	l.want("synced")
	l.write("b.yaml", serviceManifest("three"))
	l.want("apply Service three") // and nothing is deleted in the grace period
}

func TestEmptyDirectoryCountsAfterGrace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "manifests")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l := newLabWith(t, dir, time.Millisecond)
	l.want("synced")
	l.write("a.yaml", serviceManifest("one", "two"))
	l.want("apply Service one", "apply Service two")
	l.replace()
	l.want("synced", "delete Service one", "delete Service two")
	if !strings.Contains(l.log.String(), "has had no manifest for the grace period") {
		t.Errorf("not in the log:\n%s", l.log)
	}
}

// The path can lead to another directory without an event in the watched one or
// in its parent.
func TestParentIsReplaced(t *testing.T) {
	parent := filepath.Join(t.TempDir(), "parent")
	dir := filepath.Join(parent, "manifests")
	for _, p := range []string{parent, parent + ".new"} {
		if err := os.MkdirAll(filepath.Join(p, "manifests"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(p, "manifests", "a.yaml"), []byte(serviceManifest(filepath.Ext(p)+"x")), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l := newLab(t, dir)
	l.want("apply Service x")
	l.want("synced")
	if err := os.Rename(parent, parent+".old"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(parent+".new", parent); err != nil {
		t.Fatal(err)
	}
	l.want("delete Service x", "apply Service .newx", "synced")
}

// A manifest that comes while the process has no descriptor left is read later, without
// another event.
func TestFileIsReadAgainAfterDescriptorsRanOut(t *testing.T) {
	l := newLab(t, t.TempDir())
	l.want("synced")
	temp, path := filepath.Join(l.dir, ".new"), filepath.Join(l.dir, "a.yaml")
	if err := os.WriteFile(temp, []byte(web), 0o600); err != nil {
		t.Fatal(err)
	}
	restore := nstest.NoDescriptors(t)
	if err := os.Rename(temp, path); err != nil {
		t.Fatal(err)
	}
	l.wantProblems("a.yaml: too many open files")
	restore()
	l.want("apply Service web")
	l.wantProblems()
}
