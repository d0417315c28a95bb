// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"

	"signalbox/source/saved"
)

// savingNode is a process of a node whose state is in a directory.
type savingNode struct {
	dir    string
	client *fake.Clientset
	sink   *recorder
	stale  chan time.Time
	end    func()
}

// startSaving starts a process whose API server has the objects. It answers while up says so.
func startSaving(t *testing.T, dir string, up *atomic.Bool, objects ...runtime.Object) *savingNode {
	t.Helper()
	return startSavingWith(t, dir, up, func(*Source) {}, objects...)
}

func startSavingWith(t *testing.T, dir string, up *atomic.Bool, set func(*Source), objects ...runtime.Object) *savingNode {
	t.Helper()
	client := fake.NewClientset(objects...)
	refuse := func(clienttesting.Action) (bool, runtime.Object, error) {
		return !up.Load(), nil, errors.New("the API server is away")
	}
	client.PrependReactor("list", "*", refuse)
	n := &savingNode{dir: dir, sink: newRecorder(), stale: make(chan time.Time, 10)}
	s := New(client, "node-1", slog.New(slog.NewTextHandler(t.Output(), nil)))
	s.StateDir, s.OnStale = dir, func(since time.Time) { n.stale <- since }
	if !up.Load() {
		s.staleAfter = time.Millisecond
	}
	set(s)
	n.client = client
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, n.sink) }()
	n.end = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run returned %v", err)
		}
	}
	return n
}

func clusterState() []runtime.Object {
	return []runtime.Object{
		svc("web", "1"),
		&discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web-1"}},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}},
		&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}},
	}
}

var everything = []string{"apply EndpointSlice default/web-1", "apply Node /node-1", "apply Service default/web", "apply ServiceCIDR /kubernetes", "synced"}

// savedCluster is a directory in which a process has saved clusterState.
func savedCluster(t *testing.T) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "state")
	var up atomic.Bool
	up.Store(true)
	n := startSaving(t, dir, &up, clusterState()...)
	n.sink.take(t, len(everything))
	n.end()
	return dir
}

// After a reboot without the API server, the node serves what it knew. When the API server
// answers, only differences count.
func TestSavedStateIsServed(t *testing.T) {
	dir := savedCluster(t)
	var up atomic.Bool
	n := startSaving(t, dir, &up, append(clusterState(), svc("new", "2"))...)
	got := n.sink.take(t, len(everything))
	slices.Sort(got)
	if !slices.Equal(got, everything) {
		t.Errorf("the saved state told %q, want %q", got, everything)
	}
	if since := <-n.stale; time.Since(since) > time.Hour || since.IsZero() {
		t.Errorf("the saved state is of %v", since)
	}
	up.Store(true)
	if got := n.sink.take(t, 1); got[0] != "apply Service default/new" {
		t.Errorf("the API server's list told %q, want the new Service alone", got)
	}
	if since := <-n.stale; !since.IsZero() {
		t.Errorf("the saved state of %v is still in use", since)
	}
	n.end()

	objects, _, err := saved.Load(filepath.Join(dir, "services.state"))
	if err != nil || len(objects) != 2 {
		t.Errorf("the file has %d Services, %v", len(objects), err)
	}
}

// Services without their endpoints would be refused, so half a state is not served.
func TestHalfAStateIsNotServed(t *testing.T) {
	dir := savedCluster(t)
	if err := os.Remove(filepath.Join(dir, "endpointslices.state")); err != nil {
		t.Fatal(err)
	}
	var up atomic.Bool
	n := startSaving(t, dir, &up, clusterState()...)
	n.sink.take(t, 3) // not the EndpointSlice
	up.Store(true)
	got := n.sink.take(t, 2)
	if want := []string{"apply EndpointSlice default/web-1", "synced"}; !slices.Equal(got, want) {
		t.Errorf("then came %q, want %q", got, want)
	}
	n.end()
	if len(n.stale) > 0 {
		t.Error("half a state counts as served")
	}
}

// Without a directory that can be written, everything else works.
func TestStateCannotBeSaved(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var up atomic.Bool
	up.Store(true)
	n := startSaving(t, filepath.Join(file, "state"), &up, clusterState()...)
	n.sink.take(t, len(everything))
	n.end()
}

// startedSaver is a resource whose saver runs until end is called.
func startedSaver(t *testing.T, path string, create func(string) (*saved.File, error)) (r *resource, sink *recorder, end func()) {
	t.Helper()
	sink = newRecorder()
	r = newResource("services", &corev1.Service{}, sink, nil, slog.Default())
	r.saver = newSaver(path, func() bool { return true }, func(error) {})
	r.saver.create = create
	ctx, cancel := context.WithCancel(t.Context())
	go r.saver.run(ctx)
	return r, sink, func() {
		cancel()
		<-r.saver.ended
	}
}

// wantSaved waits until the file has these objects.
func wantSaved(t *testing.T, path string, names ...string) {
	t.Helper()
	await(t, fmt.Sprintf("%s with %q", path, names), func() bool {
		objects, _, err := saved.Load(path)
		return err == nil && slices.Equal(slices.Sorted(maps.Keys(objects)), names)
	})
}

// Changes reach the file while the process runs, and out-of-date records leave it.
func TestChangesAreSaved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "services.state")
	r, _, end := startedSaver(t, path, saved.Create)
	if err := r.Replace([]any{svc("a", "1"), svc("b", "1")}, "1"); err != nil {
		t.Fatal(err)
	}
	wantSaved(t, path, "default/a", "default/b")
	if err := r.Delete(svc("b", "3")); err != nil {
		t.Fatal(err)
	}
	wantSaved(t, path, "default/a")
	end()
}

// The saver writes the latest form of each object, whatever fails in between, and rewrites
// a file most of whose records are out of date.
func TestSaverWritesTheLatest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "services.state")
	s := newSaver(path, func() bool { return true }, nil)
	name := cache.ObjectName{Namespace: "default", Name: "a"}
	for i := range 3000 {
		s.put(name, []byte{byte(i >> 8), byte(i)}, i == 0)
		s.listed()
		if _, err := s.write(); err != nil {
			t.Fatal(err)
		}
	}
	s.close()
	objects, _, err := saved.Load(path)
	if err != nil || len(objects) != 1 || !bytes.Equal(objects["default/a"], []byte{2999 >> 8, 2999 & 255}) {
		t.Errorf("the file has %v, %v", objects, err)
	}
	if info, err := os.Stat(path); err != nil || info.Size() > 100_000 {
		t.Errorf("the file has %d bytes, %v", info.Size(), err)
	}
}

// createLimited creates a file of at most 10,000 bytes.
func createLimited(path string) (*saved.File, error) {
	f, err := saved.Create(path)
	if err == nil {
		f.Limit = 10_000
	}
	return f, err
}

// A file that is full of out-of-date records is written anew, also if all objects change at
// once.
func TestFullFileIsWrittenAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "services.state")
	s := newSaver(path, func() bool { return true }, nil)
	s.create = createLimited
	text := func(round int) []byte { return bytes.Repeat([]byte{byte(round)}, 1000) }
	for round := range 20 {
		for i := range 7 {
			s.put(cache.ObjectName{Namespace: "default", Name: fmt.Sprint(i)}, text(round), round == 0)
		}
		s.listed()
		if _, err := s.write(); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	s.put(cache.ObjectName{Namespace: "default", Name: "0"}, nil, false)
	if _, err := s.write(); err != nil {
		t.Fatal(err)
	}
	s.close()
	objects, _, err := saved.Load(path)
	if err != nil || len(objects) != 6 || !bytes.Equal(objects["default/1"], text(19)) {
		t.Errorf("the file has %d objects, %v", len(objects), err)
	}
}

// A state that does not fit is reported. It is saved when it fits again.
func TestStateIsTooLarge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "services.state")
	s := newSaver(path, func() bool { return true }, nil)
	s.create = createLimited
	name := func(i int) cache.ObjectName { return cache.ObjectName{Namespace: "default", Name: fmt.Sprint(i)} }
	for i := range 12 {
		s.put(name(i), make([]byte, 1000), true)
		s.listed()
		if _, err := s.write(); errors.Is(err, saved.ErrFull) != (i > 8) {
			t.Fatalf("with %d objects: %v", i+1, err)
		}
	}
	for i := range 4 {
		s.put(name(i), nil, false)
	}
	if _, err := s.write(); err != nil {
		t.Fatal(err)
	}
	s.close()
	if objects, _, err := saved.Load(path); err != nil || len(objects) != 8 {
		t.Errorf("the file has %d objects, %v", len(objects), err)
	}
}

// A state that is too large is not written anew all the time.
func TestPauseWhileStateIsTooLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		s := newSaver(filepath.Join(t.TempDir(), "services.state"), func() bool { return true }, func(error) { tries++ })
		s.create = createLimited
		ctx, cancel := context.WithCancel(t.Context())
		go s.run(ctx)
		for i := range 3600 {
			s.put(cache.ObjectName{Namespace: "default", Name: fmt.Sprint(i % 20)}, make([]byte, 1000), i < 20)
			time.Sleep(time.Second)
		}
		cancel()
		<-s.ended
		if tries > 30 {
			t.Errorf("%d tries in an hour", tries)
		}
	})
}

// A new file does not help against an object that no file takes.
func TestTooLargeObject(t *testing.T) {
	s := newSaver(filepath.Join(t.TempDir(), "services.state"), func() bool { return true }, nil)
	defer s.close()
	s.put(cache.ObjectName{Namespace: "default", Name: "large"}, make([]byte, 9<<20), true)
	if _, err := s.write(); err == nil || errors.Is(err, saved.ErrFull) || !strings.Contains(err.Error(), "default/large") {
		t.Errorf("the write ended with %v", err)
	}
}

// What waits for the disk is at most one form of each object: objects that came and went
// meanwhile need nothing.
func TestChangesWaitForTheDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dir", "services.state")
	s := newSaver(path, func() bool { return true }, nil)
	name := func(i int) cache.ObjectName { return cache.ObjectName{Namespace: "default", Name: fmt.Sprint(i)} }
	s.put(name(0), []byte("old"), true)
	s.put(name(1), []byte("old"), true)
	s.listed()
	if _, err := s.write(); err != nil {
		t.Fatal(err)
	}
	disk := s.file
	if err := errors.Join(os.RemoveAll(filepath.Dir(path)), os.WriteFile(filepath.Dir(path), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	s.put(name(0), nil, false)
	s.put(name(1), []byte("new"), false)
	for i := range 1000 {
		s.put(name(2+i), []byte("x"), true)
		if i == 500 {
			if _, err := s.write(); err == nil || s.file != disk {
				t.Fatalf("a write without a directory: %v", err)
			}
		}
		s.put(name(2+i), nil, false)
	}
	if len(s.pending) > 1 {
		t.Errorf("%d changes wait for the disk", len(s.pending))
	}
	if err := os.Remove(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.write(); err != nil {
		t.Fatal(err)
	}
	s.close()
	objects, _, err := saved.Load(path)
	if err != nil || len(objects) != 1 || string(objects["default/1"]) != "new" {
		t.Errorf("the file has %v, %v", objects, err)
	}
}

// A disk that stalls holds nothing up: neither lists nor changes nor the end.
func TestStalledDisk(t *testing.T) {
	stalled := make(chan struct{})
	path := filepath.Join(t.TempDir(), "services.state")
	r, sink, end := startedSaver(t, path, func(path string) (*saved.File, error) {
		<-stalled
		return saved.Create(path)
	})
	if err := r.Replace([]any{svc("a", "1")}, "1"); err != nil {
		t.Fatal(err)
	}
	<-r.listed
	if err := r.Add(svc("b", "2")); err != nil {
		t.Fatal(err)
	}
	sink.take(t, 2)
	close(stalled)
	wantSaved(t, path, "default/a", "default/b")
	end()
}

// The start does not wait for a disk from which saved objects would come.
func TestStalledDiskAtTheStart(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(dir, "services.state"), 0o600); err != nil { // nobody writes: to open it takes for ever
		t.Fatal(err)
	}
	var up atomic.Bool
	n := startSaving(t, dir, &up, clusterState()...)
	up.Store(true)
	got := n.sink.take(t, len(everything))
	slices.Sort(got)
	if !slices.Equal(got, everything) {
		t.Errorf("told %q, want %q", got, everything)
	}
	n.end()
}

func TestStalledDiskAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stalled := make(chan struct{})
		s := New(nil, "node-1", slog.Default())
		s.StateDir = t.TempDir()
		reported := make(chan []string, 1)
		s.OnUnsaved = func(problems []string) { reported <- problems }
		r := newResource("services", &corev1.Service{}, newRecorder(), nil, slog.Default())
		ctx, cancel := context.WithCancel(t.Context())
		await := s.startSaving(ctx, []*resource{r})
		r.saver.create = func(path string) (*saved.File, error) {
			<-stalled
			return saved.Create(path)
		}
		if err := r.Add(svc("a", "1")); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if problems := <-reported; len(problems) != 1 || time.Since(begin) != stuckAfter {
			t.Errorf("after %v, %q is reported", time.Since(begin), problems)
		}
		cancel()
		begin = time.Now()
		await()
		if took := time.Since(begin); took != diskTimeout {
			t.Errorf("the end took %v", took)
		}
		close(stalled)
		<-r.saver.ended
	})
}

// A new process of an upgrade that is aborted leaves its state in place. The old one puts
// its own there again, once it serves again.
func TestStateAfterAbortedUpgrade(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	path := filepath.Join(dir, "services.state")
	var up, serves atomic.Bool
	up.Store(true)
	serves.Store(true)
	old := startSavingWith(t, dir, &up, func(s *Source) { s.OwnsState = serves.Load }, clusterState()...)
	wantSaved(t, path, "default/web")
	serves.Store(false)
	next := startSaving(t, dir, &up, append(clusterState(), svc("next", "1"))...)
	wantSaved(t, path, "default/next", "default/web")
	next.end()
	if _, err := old.client.CoreV1().Services("default").Create(t.Context(), svc("later", "3"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	old.sink.take(t, len(everything)+1)
	time.Sleep(2 * savePeriod)
	wantSaved(t, path, "default/next", "default/web") // the other process counts
	serves.Store(true)
	wantSaved(t, path, "default/later", "default/web")
	old.end()
}

// Saving goes on when a disk works again. Until then, the problem is reported.
func TestDiskWorksAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var up atomic.Bool
	up.Store(true)
	problems := make(chan []string, 100)
	n := startSavingWith(t, dir, &up, func(s *Source) { s.OnUnsaved = func(p []string) { problems <- p } }, clusterState()...)
	n.sink.take(t, len(everything))
	if p := <-problems; len(p) == 0 || !strings.Contains(p[0], dir) {
		t.Errorf("reported %q", p)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	wantSaved(t, filepath.Join(dir, "services.state"), "default/web")
	for p := range problems {
		if len(p) == 0 {
			break
		}
	}
	n.end()
}

// An API server that comes back empty meets a node that has just started. The saved state
// is served, and stays until lists have lacked it for the grace period.
func TestEmptyListAfterStart(t *testing.T) {
	dir := savedCluster(t)
	var up atomic.Bool
	up.Store(true)
	synctest.Test(t, func(t *testing.T) {
		n := startSaving(t, dir, &up, svc("kubernetes", "1"))
		begin := time.Now()
		got := n.sink.take(t, len(everything))
		if took := time.Since(begin); took < staleAfter || took > 2*staleAfter {
			t.Errorf("served after %v", took)
		}
		slices.Sort(got)
		if !slices.Equal(got, everything) {
			t.Errorf("the saved state told %q, want %q", got, everything)
		}
		<-n.stale
		wantSaved(t, filepath.Join(dir, "services.state"), "default/web")
		got = n.sink.take(t, 1)
		if took := time.Since(begin); took < emptyGrace {
			t.Errorf("the empty lists count after %v: %q", took, got)
		}
		n.end()
	})
}

// The same after a changed configuration, without saved objects: nothing is told.
func TestEmptyListAfterReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		known := map[string]int{}
		var up atomic.Bool
		up.Store(true)
		remember := func(s *Source) { s.Known = known }
		n := startSavingWith(t, "", &up, remember, clusterState()...)
		n.sink.take(t, len(everything))
		n.end()
		for range 2 { // the second one has not listed anything when it ends
			n = startSavingWith(t, "", &up, remember)
			time.Sleep(emptyGrace - time.Second)
			if len(n.sink.told) > 0 {
				t.Errorf("the empty server told %q", n.sink.take(t, len(n.sink.told)))
			}
			n.end()
		}
		n = startSavingWith(t, "", &up, remember)
		if got := n.sink.take(t, 1); got[0] != "synced" {
			t.Errorf("told %q", got)
		}
		n.end()
	})
}
