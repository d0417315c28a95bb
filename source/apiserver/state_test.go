// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"signalbox/source/saved"
)

// savingNode is a process of a node whose state is in a directory.
type savingNode struct {
	dir   string
	sink  *recorder
	stale chan time.Time
	end   func()
}

// startSaving starts a process whose API server has the objects. It answers while up says so.
func startSaving(t *testing.T, dir string, up *atomic.Bool, objects ...runtime.Object) *savingNode {
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

// After a reboot without the API server, the node serves what it knew. When the API server
// answers, only differences count.
func TestSavedStateIsServed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	var up atomic.Bool
	up.Store(true)
	n := startSaving(t, dir, &up, clusterState()...)
	n.sink.take(t, len(everything))
	n.end()

	up.Store(false)
	n = startSaving(t, dir, &up, append(clusterState(), svc("new", "2"))...)
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
	dir := filepath.Join(t.TempDir(), "state")
	var up atomic.Bool
	up.Store(true)
	n := startSaving(t, dir, &up, clusterState()...)
	n.sink.take(t, len(everything))
	n.end()
	if err := os.Remove(filepath.Join(dir, "endpointslices.state")); err != nil {
		t.Fatal(err)
	}
	up.Store(false)
	n = startSaving(t, dir, &up, clusterState()...)
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

// ignore is a Sink that keeps nothing.
type ignore struct{}

func (ignore) Apply(runtime.Object)  {}
func (ignore) Delete(runtime.Object) {}
func (ignore) Synced()               {}

// Changes reach the file while the process runs, and out-of-date records leave it.
func TestChangesAreSaved(t *testing.T) {
	dir := t.TempDir()
	r := newResource("services", &corev1.Service{}, ignore{}, nil, slog.Default())
	r.openState(dir)
	if err := r.Replace([]any{svc("a", "1"), svc("b", "1")}, "1"); err != nil {
		t.Fatal(err)
	}
	for i := range 3000 {
		s := svc("a", "2")
		s.Spec.HealthCheckNodePort = int32(i)
		if err := r.Update(s); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Delete(svc("b", "3")); err != nil {
		t.Fatal(err)
	}
	r.save() // as its timer does
	path := filepath.Join(dir, "services.state")
	objects, _, err := saved.Load(path)
	if err != nil || len(objects) != 1 {
		t.Fatalf("the file has %d Services, %v", len(objects), err)
	}
	var a corev1.Service
	if err := a.Unmarshal(objects["default/a"]); err != nil || a.Spec.HealthCheckNodePort != 2999 {
		t.Errorf("Service a is %+v, %v", a.Spec, err)
	}
	if info, err := os.Stat(path); err != nil || info.Size() > 1000 {
		t.Errorf("the file has %d bytes, %v", info.Size(), err)
	}
	r.closeState()
}
