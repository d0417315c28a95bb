// SPDX-License-Identifier: Apache-2.0

package file

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/runtime"
)

// listener is a Sink that passes each call on as a line.
type listener struct{ lines chan string }

func (l listener) Apply(o runtime.Object)  { l.lines <- "apply " + name(o) }
func (l listener) Delete(o runtime.Object) { l.lines <- "delete " + name(o) }
func (l listener) Synced()                 { l.lines <- "synced" }

func name(o runtime.Object) string {
	m := o.(object)
	return strings.TrimPrefix(fmt.Sprintf("%T %s", o, m.GetName()), "*v1.")
}

// lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// lab is a directory and the source that watches it.
type lab struct {
	t        *testing.T
	dir      string
	log      *lockedBuffer
	lines    chan string
	problems chan []string
}

func newLab(t *testing.T, dir string) *lab {
	t.Helper()
	return newLabWith(t, dir, emptyGrace)
}

func newLabWith(t *testing.T, dir string, grace time.Duration) *lab {
	t.Helper()
	return newLabOf(t, dir, func(s *Source) { s.grace = grace })
}

// newLabOf makes a lab whose source setup changes.
func newLabOf(t *testing.T, dir string, setup func(*Source)) *lab {
	t.Helper()
	l := &lab{t, dir, &lockedBuffer{}, make(chan string, 1000), make(chan []string, 1000)}
	s, err := New(dir, slog.New(slog.NewTextHandler(l.log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	setup(s)
	s.OnProblems = func(problems []string) { l.problems <- problems }
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, listener{l.lines}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run returned %v", err)
		}
	})
	return l
}

func serviceManifest(names ...string) string {
	var docs []string
	for _, n := range names {
		docs = append(docs, strings.ReplaceAll(web, "web", n))
	}
	return strings.Join(docs, "---\n")
}

// write puts a file in place at once, as careful programs do.
func (l *lab) write(file, content string) {
	l.t.Helper()
	temp := filepath.Join(l.dir, "."+file+".new")
	if err := os.WriteFile(temp, []byte(content), 0o600); err != nil {
		l.t.Fatal(err)
	}
	if err := os.Rename(temp, filepath.Join(l.dir, file)); err != nil {
		l.t.Fatal(err)
	}
}

// want waits for the lines, in any order, and nothing else.
func (l *lab) want(lines ...string) {
	l.t.Helper()
	var got []string
	for range lines {
		select {
		case line := <-l.lines:
			got = append(got, line)
		case <-l.t.Context().Done():
			l.t.Fatalf("told %q, want %q", got, lines)
		}
	}
	slices.Sort(got)
	slices.Sort(lines)
	if !slices.Equal(got, lines) {
		l.t.Fatalf("told %q, want %q", got, lines)
	}
}

// TestNoInotifyInstance: while other programs have all inotify instances, the directory is read
// every second. Once there is one, events come.
func TestNoInotifyInstance(t *testing.T) {
	var free atomic.Bool
	l := newLabOf(t, t.TempDir(), func(s *Source) {
		s.newWatcher = func() (*fsnotify.Watcher, error) {
			if free.Load() {
				return fsnotify.NewWatcher()
			}
			return nil, unix.EMFILE
		}
	})
	l.want("synced")
	if problems := <-l.problems; len(problems) != 1 || !strings.Contains(problems[0], "too many open files") {
		t.Errorf("without an instance, the problems are %q", problems)
	}
	l.write("web.yaml", serviceManifest("web"))
	l.want("apply Service web")
	free.Store(true)
	if problems := <-l.problems; len(problems) > 0 {
		t.Errorf("with an instance, the problems are %q", problems)
	}
	l.want("synced")
	l.write("web.yaml", serviceManifest("other"))
	l.want("apply Service other", "delete Service web")
	if n := strings.Count(l.log.String(), "cannot be watched"); n != 1 {
		t.Errorf("the log says %d times that the directory cannot be watched:\n%s", n, l.log)
	}
}

func TestFilesComeAndGo(t *testing.T) {
	dir := t.TempDir()
	l := newLab(t, dir)
	l.want("synced")
	l.write("a.yaml", serviceManifest("one", "two"))
	l.want("apply Service one", "apply Service two")
	l.write("a.yaml", serviceManifest("one", "three"))
	l.want("delete Service two", "apply Service three")
	l.write("ignored.txt", serviceManifest("four"))
	l.write("b.json", `{"apiVersion":"v1","kind":"Node","metadata":{"name":"n"}}`)
	l.want("apply Node n")
	if err := os.Rename(filepath.Join(dir, "a.yaml"), filepath.Join(dir, "c.yaml")); err != nil {
		t.Fatal(err)
	}
	l.write("d.yaml", serviceManifest("last"))
	l.want("apply Service last") // the same objects in another file are no change
	if err := os.Remove(filepath.Join(dir, "c.yaml")); err != nil {
		t.Fatal(err)
	}
	l.want("delete Service one", "delete Service three")
}

func TestExistingObjectsComeBeforeSynced(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.yaml"), []byte(serviceManifest("one")), 0o600); err != nil {
		t.Fatal(err)
	}
	l := newLab(t, dir)
	l.want("apply Service one")
	l.want("synced")
}

func TestDocumentWithFaultKeepsItsObjects(t *testing.T) {
	l := newLab(t, t.TempDir())
	l.want("synced")
	l.write("a.yaml", serviceManifest("one", "two"))
	l.want("apply Service one", "apply Service two")
	l.write("a.yaml", serviceManifest("one")+"  extra: true\n---\n"+serviceManifest("new"))
	l.want("apply Service new") // neither one nor two is deleted
	where := filepath.Join(l.dir, "a.yaml") + ": document 1"
	if !strings.Contains(l.log.String(), where) || !strings.Contains(l.log.String(), `unknown field \"spec.extra\"`) {
		t.Errorf("the log does not name %s and the field:\n%s", where, l.log)
	}
	l.write("a.yaml", serviceManifest("one"))
	l.want("delete Service two", "delete Service new") // one is unchanged
}

func TestFirstFileByNameWins(t *testing.T) {
	l := newLab(t, t.TempDir())
	l.want("synced")
	l.write("b.yaml", serviceManifest("one"))
	l.want("apply Service one")
	l.write("a.yaml", serviceManifest("one")+"  type: NodePort\n")
	l.want("apply Service one")
	if !strings.Contains(l.log.String(), "several files have the same object") {
		t.Errorf("not in the log:\n%s", l.log)
	}
	l.write("c.yaml", serviceManifest("one")+"  type: LoadBalancer\n---\n"+serviceManifest("marker"))
	l.want("apply Service marker") // c.yaml comes third
	if err := os.Remove(filepath.Join(l.dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	l.want("apply Service one")
}

func TestMountedConfigMapIsSwitched(t *testing.T) {
	dir := t.TempDir()
	publish := func(version, content string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, version, "a.yaml"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		link := filepath.Join(dir, "..data_tmp")
		if err := os.Symlink(version, link); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(link, filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	publish("..v1", serviceManifest("one"))
	if err := os.Symlink(filepath.Join("..data", "a.yaml"), filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	l := newLab(t, dir)
	l.want("apply Service one")
	l.want("synced")
	publish("..v2", serviceManifest("two"))
	l.want("delete Service one", "apply Service two")
}

func TestDirectoryThatGoesAndComesBack(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "manifests")
	l := newLab(t, dir) // it is not there yet
	make1 := func(content string) {
		t.Helper()
		if err := os.Mkdir(dir+".new", 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir+".new", "a.yaml"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(dir+".new", dir); err != nil {
			t.Fatal(err)
		}
	}
	make1(serviceManifest("one"))
	l.want("apply Service one")
	l.want("synced")
	if err := os.Rename(dir, dir+".old"); err != nil {
		t.Fatal(err)
	}
	make1(serviceManifest("two"))
	l.want("apply Service two", "delete Service one", "synced")
}

func TestLinkIsSwitchedToAnotherDirectory(t *testing.T) {
	base := t.TempDir()
	for _, version := range []string{"one", "two"} {
		if err := os.Mkdir(filepath.Join(base, version), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(base, version, "a.yaml"), []byte(serviceManifest(version)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	dir := filepath.Join(base, "manifests")
	if err := os.Symlink("one", dir); err != nil {
		t.Fatal(err)
	}
	l := newLab(t, dir)
	l.want("apply Service one")
	l.want("synced")
	if err := os.WriteFile(filepath.Join(base, "beside.yaml"), []byte(serviceManifest("beside")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("two", dir+".new"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir+".new", dir); err != nil {
		t.Fatal(err)
	}
	l.want("delete Service one", "apply Service two", "synced")
}

func TestNotADirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(file, slog.Default()); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("New on a file answers %v", err)
	}
}
