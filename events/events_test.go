// SPDX-License-Identifier: Apache-2.0

package events

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	goruntime "runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/rest"
	clienttesting "k8s.io/client-go/testing"

	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

// rig is a Recorder at work with a fake API server.
type rig struct {
	*testing.T
	*Recorder
	client *fake.Clientset

	mu      sync.Mutex
	counted map[string]int
	logged  map[string]string // the log when the last Event ended so
	log     strings.Builder

	stop context.CancelFunc // ends the Recorder
}

func newRig(t *testing.T) *rig {
	client := fake.NewClientset()
	r := newRigWith(t, client)
	r.client = client
	return r
}

func newRigWith(t *testing.T, client kubernetes.Interface) *rig {
	r := &rig{T: t, counted: map[string]int{}, logged: map[string]string{}}
	var ctx context.Context
	ctx, r.stop = context.WithCancel(context.Background())
	t.Cleanup(r.stop)
	r.Recorder = New(ctx, Options{
		Client: client, NodeName: "node1", Log: slog.New(slog.NewTextHandler(r, nil)),
		Counted: func(result string) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.counted[result]++
			r.logged[result] = r.log.String()
		},
	})
	return r
}

// hangingServer is an API server that answers no request before release is
// closed, and then confirms each.
func hangingServer(t *testing.T) (client kubernetes.Interface, requests chan *http.Request, release chan struct{}) {
	requests, release = make(chan *http.Request, 10*burst), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body)
		requests <- req
		select {
		case <-release:
		case <-req.Context().Done():
		}
		w.Header().Set("Content-Type", req.Header.Get("Content-Type"))
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write(body)
	}))
	t.Cleanup(server.Close)
	client, err := kubernetes.NewForConfig(&rest.Config{Host: server.URL, QPS: 1000, Burst: 1000})
	if err != nil {
		t.Fatal(err)
	}
	return client, requests, release
}

// Write takes the log.
func (r *rig) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.Write(b)
}

// await waits until so many Events ended so.
func (r *rig) await(result string, n int) {
	r.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.After(time.Minute); ; {
		r.mu.Lock()
		got := r.counted[result]
		r.mu.Unlock()
		if got == n {
			return
		}
		select {
		case <-tick.C:
		case <-end:
			r.Fatalf("%d Events %s, want %d", got, result, n)
		}
	}
}

func (r *rig) events(namespace string) []eventsv1.Event {
	r.Helper()
	list, err := r.client.EventsV1().Events(namespace).List(context.Background(), metav1.ListOptions{})
	if err != nil {
		r.Fatal(err)
	}
	return list.Items
}

var web = plan.ServiceName{Namespace: "shop", Name: "web"}

func TestEvents(t *testing.T) {
	service := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "1234"}}
	for _, test := range []struct {
		what      string
		tell      func(*Recorder)
		namespace string
		want      eventsv1.Event
	}{
		{"the start", (*Recorder).Started, "default", eventsv1.Event{
			Type: "Normal", Reason: "Starting", Action: "StartKubeProxy",
			Regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: "node1", UID: "node1"},
		}},
		{"the default mode", func(r *Recorder) { r.ModeUnset("iptables") }, "default", eventsv1.Event{
			Type: "Warning", Reason: "KubeProxyDefaultMode", Action: "StartKubeProxy", Note: "iptables",
			Regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: "node1", UID: "node1"},
		}},
		{"healthz", func(r *Recorder) { r.HealthzFailed(errors.New("no")) }, "default", eventsv1.Event{
			Type: "Warning", Reason: "FailedToStartProxierHealthcheck", Action: "StartKubeProxy", Note: "no",
			Regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: "node1", UID: "node1"},
		}},
		{"metrics", func(r *Recorder) { r.MetricsFailed(errors.New("100% no")) }, "default", eventsv1.Event{
			Type: "Warning", Reason: "FailedToStartMetricServer", Action: "StartKubeProxy", Note: "100% no",
			Regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: "node1", UID: "node1"},
		}},
		{"the configuration", func(r *Recorder) { r.ConfigurationRejected(errors.New("no")) }, "default", eventsv1.Event{
			Type: "Warning", Reason: "ConfigurationRejected", Action: "StartKubeProxy",
			Note:      "the changed configuration is not in force, the one before is: no",
			Regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: "node1", UID: "node1"},
		}},
		{"a health check", func(r *Recorder) { r.HealthCheckFailed(web, 31000, errors.New("in use")) }, "shop", eventsv1.Event{
			Type: "Warning", Reason: "FailedToStartServiceHealthcheck", Action: "Listen",
			Note:      "node node1 cannot answer health checks on port 31000, so load balancers take it for dead; it tries again: in use",
			Regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Service", Namespace: "shop", Name: "web", UID: "1234"},
		}},
		{"a problem", func(r *Recorder) {
			r.Problem(plan.Problem{Kind: "Service", Object: "shop/web", Field: "spec.ports[0]", Reason: "is bad"})
		}, "shop", eventsv1.Event{
			Type: "Warning", Reason: "NotFullyServed", Action: "ProgramService", Note: "node node1: spec.ports[0]: is bad",
			Regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Service", Namespace: "shop", Name: "web", UID: "1234", FieldPath: "spec.ports[0]"},
		}},
		{"a problem of a Service that is gone", func(r *Recorder) {
			r.Problem(plan.Problem{Kind: "Service", Object: "shop/other", Field: "f", Reason: strings.Repeat("é", 2000)})
		}, "shop", eventsv1.Event{
			Type: "Warning", Reason: "NotFullyServed", Action: "ProgramService", Note: "node node1: f: " + strings.Repeat("é", 502) + " …",
			Regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Service", Namespace: "shop", Name: "other", FieldPath: "f"},
		}},
	} {
		t.Run(test.what, func(t *testing.T) {
			r := newRig(t)
			watch := r.Watch(told{})
			watch.Apply(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "of one before"}})
			watch.Apply(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "other", UID: "5678"}})
			watch.Delete(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "other"}})
			watch.Apply(service)
			test.tell(r.Recorder)
			r.await(Sent, 1)
			list := r.events(test.namespace)
			if len(list) != 1 {
				t.Fatalf("%d Events", len(list))
			}
			got := list[0]
			if got.ReportingController != "kube-proxy" || got.ReportingInstance == "" || got.EventTime.IsZero() {
				t.Errorf("reported by %q, %q, at %v", got.ReportingController, got.ReportingInstance, got.EventTime)
			}
			if got.Regarding != test.want.Regarding || got.Type != test.want.Type || got.Reason != test.want.Reason || got.Action != test.want.Action || got.Note != test.want.Note {
				t.Errorf("got %+v\nwant %+v", got, test.want)
			}
			if len(got.Note) > maxNote {
				t.Errorf("a note of %d bytes", len(got.Note))
			}
		})
	}
}

func TestOnlyProblemsOfServices(t *testing.T) {
	r := newRig(t)
	for _, kind := range []string{"EndpointSlice", "Node", "ServiceCIDR"} {
		r.Problem(plan.Problem{Kind: kind, Object: "shop/web"})
	}
	r.Flush(time.Minute)
	if n := len(r.client.Actions()); n > 0 {
		t.Errorf("%d Events", n)
	}
}

// told is a Sink that keeps nothing.
type told struct{ service.Sink }

func (told) Apply(runtime.Object)  {}
func (told) Delete(runtime.Object) {}

// An Event costs the API server its writing and no question.
func TestNothingIsAsked(t *testing.T) {
	r := newRig(t)
	r.HealthCheckFailed(web, 1, errors.New("no"))
	r.await(Sent, 1)
	for _, a := range r.client.Actions() {
		if a.GetVerb() != "create" {
			t.Errorf("it asked to %s %s", a.GetVerb(), a.GetResource().Resource)
		}
	}
}

// What is watched is passed on.
func TestTheSinkHearsEverything(t *testing.T) {
	var heard []string
	next := hearing{told{}, &heard}
	for _, r := range []*Recorder{newRig(t).Recorder, nil} {
		heard = nil
		watch := r.Watch(next)
		watch.Apply(&corev1.Service{})
		watch.Apply(&corev1.Node{})
		watch.Delete(&corev1.Service{})
		watch.Delete(&corev1.Node{})
		if got := strings.Join(heard, " "); got != "apply apply delete delete" {
			t.Errorf("heard %q", got)
		}
	}
}

type hearing struct {
	told
	heard *[]string
}

func (h hearing) Apply(runtime.Object)  { *h.heard = append(*h.heard, "apply") }
func (h hearing) Delete(runtime.Object) { *h.heard = append(*h.heard, "delete") }

// An API server that hangs blocks nobody and lets nothing pile up. What was
// accepted is written when it answers again.
func TestOutage(t *testing.T) {
	client, _, release := hangingServer(t)
	r := newRigWith(t, client)
	const problems = 20_000
	before := goruntime.NumGoroutine()
	for i := range problems {
		r.Problem(plan.Problem{Kind: "Service", Object: fmt.Sprintf("shop/web-%d", i), Field: "f", Reason: "r"})
	}
	r.mu.Lock()
	dropped := r.counted[Dropped]
	r.mu.Unlock()
	if dropped < problems-2*burst { // the rate allows some meanwhile
		t.Errorf("%d of %d are dropped", dropped, problems)
	}
	// Each Event has its goroutine, and a request two more on either side.
	if n := goruntime.NumGoroutine() - before; n > 10*burst {
		t.Errorf("%d goroutines", n)
	}
	close(release)
	r.await(Sent, problems-dropped)
}

// Repetitions within the rate are one Event, which counts them.
func TestRepetitions(t *testing.T) {
	r := newRig(t)
	for range 1000 {
		r.HealthCheckFailed(web, 1, errors.New("no"))
	}
	r.await(Dropped, 1000-burst)
	r.await(Sent, 2) // the Event, and that it is a series
	list := r.events("shop")
	if len(list) != 1 || list[0].Series == nil {
		t.Fatalf("%d Events: %+v", len(list), list)
	}
	for _, a := range r.client.Actions() {
		if verb := a.GetVerb(); verb != "create" && verb != "patch" && verb != "list" {
			t.Errorf("it asked to %s %s", verb, a.GetResource().Resource)
		}
	}
}

// No problem of a Service hides another one.
func TestProblemsOfOneService(t *testing.T) {
	r := newRig(t)
	for _, field := range []string{"a", "b", "a"} {
		r.Problem(plan.Problem{Kind: "Service", Object: "shop/web", Field: field, Reason: "is bad"})
	}
	r.await(Sent, 3)
	notes := map[string]bool{}
	for _, e := range r.events("shop") {
		notes[e.Note] = true
	}
	if len(notes) != 2 || !notes["node node1: a: is bad"] || !notes["node node1: b: is bad"] {
		t.Errorf("the Events say %v", notes)
	}
}

// An API server that refuses Events harms nothing. The log says so once until
// it accepts one.
func TestRefused(t *testing.T) {
	r := newRig(t)
	var accepts atomic.Bool
	r.client.PrependReactor("create", "events", func(clienttesting.Action) (bool, runtime.Object, error) {
		return !accepts.Load(), nil, apierrors.NewForbidden(schema.GroupResource{Group: "events.k8s.io", Resource: "events"}, "", errors.New("no"))
	})
	refused := func(all, logged int) {
		t.Helper()
		r.await(Failed, all)
		r.mu.Lock()
		defer r.mu.Unlock()
		if n := strings.Count(r.logged[Failed], "system:node-proxier"); n != logged {
			t.Errorf("logged %d times, want %d: %s", n, logged, r.logged[Failed])
		}
	}
	r.Started()
	r.HealthzFailed(errors.New("a"))
	r.MetricsFailed(errors.New("b"))
	refused(3, 1)
	accepts.Store(true)
	r.ModeUnset("c")
	r.await(Sent, 1)
	accepts.Store(false)
	r.ConfigurationRejected(errors.New("d"))
	refused(4, 2)
}

func TestFlush(t *testing.T) {
	r := newRig(t)
	r.Started()
	r.Flush(time.Minute)
	if n := len(r.events("default")); n != 1 {
		t.Errorf("%d Events after Flush", n)
	}
}

// An API server that hangs does not keep the process.
func TestEnd(t *testing.T) {
	client, requests, _ := hangingServer(t)
	r := newRigWith(t, client)
	r.Started()
	request := <-requests
	r.Flush(time.Millisecond)
	r.stop()
	<-request.Context().Done()
	r.HealthzFailed(errors.New("after the end"))
}

func TestNobodyToTell(t *testing.T) {
	var r *Recorder
	r.Started()
	r.HealthzFailed(errors.New("no"))
	r.MetricsFailed(errors.New("no"))
	r.HealthCheckFailed(web, 1, errors.New("no"))
	r.Problem(plan.Problem{Kind: "Service", Object: "shop/web"})
	r.Flush(time.Hour)
}
