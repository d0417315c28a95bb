package events

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"signalbox/proxier"
)

// rig is a Recorder at work with a fake API server.
type rig struct {
	*testing.T
	*Recorder
	client *fake.Clientset

	mu      sync.Mutex
	counted map[string]int
	log     strings.Builder
}

func newRig(t *testing.T, objects ...runtime.Object) *rig {
	r := &rig{T: t, client: fake.NewClientset(objects...), counted: map[string]int{}}
	r.Recorder = New(Options{
		Client: r.client, NodeName: "node1", Log: slog.New(slog.NewTextHandler(r, nil)),
		Counted: func(result string) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.counted[result]++
		},
	})
	return r
}

// Write takes the log.
func (r *rig) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.Write(b)
}

func (r *rig) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- r.Recorder.Run(ctx) }()
	r.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			r.Errorf("Run: %v", err)
		}
	})
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

var web = proxier.ServiceName{Namespace: "shop", Name: "web"}

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
			Note:      "the changed configuration file is not in force, what it said before is: no",
			Regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: "node1", UID: "node1"},
		}},
		{"a health check", func(r *Recorder) { r.HealthCheckFailed(web, 31000, errors.New("in use")) }, "shop", eventsv1.Event{
			Type: "Warning", Reason: "FailedToStartServiceHealthcheck", Action: "Listen",
			Note:      "node node1 cannot answer health checks on port 31000, so load balancers take it for dead; it tries again: in use",
			Regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Service", Namespace: "shop", Name: "web", UID: "1234"},
		}},
		{"a problem", func(r *Recorder) {
			r.Problem(proxier.Problem{Kind: "Service", Object: "shop/web", Field: "spec.ports[0]", Reason: "is bad"})
		}, "shop", eventsv1.Event{
			Type: "Warning", Reason: "NotFullyServed", Action: "ProgramService", Note: "node node1: spec.ports[0]: is bad",
			Regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Service", Namespace: "shop", Name: "web", UID: "1234"},
		}},
		{"a problem of a Service that is gone", func(r *Recorder) {
			r.Problem(proxier.Problem{Kind: "Service", Object: "shop/other", Field: "f", Reason: strings.Repeat("é", 2000)})
		}, "shop", eventsv1.Event{
			Type: "Warning", Reason: "NotFullyServed", Action: "ProgramService", Note: "node node1: f: " + strings.Repeat("é", 502) + " …",
			Regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Service", Namespace: "shop", Name: "other"},
		}},
	} {
		t.Run(test.what, func(t *testing.T) {
			r := newRig(t, service)
			r.run()
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
		r.Problem(proxier.Problem{Kind: kind, Object: "shop/web"})
	}
	if n := len(r.queue); n > 0 {
		t.Errorf("%d Events", n)
	}
}

// What identifies a Service costs the API server no look into its database.
func TestServiceIsFoundInTheServersMemory(t *testing.T) {
	r := newRig(t)
	r.run()
	r.HealthCheckFailed(web, 1, errors.New("no"))
	r.await(Sent, 1)
	lists := 0
	for _, a := range r.client.Actions() {
		if list, ok := a.(clienttesting.ListActionImpl); ok {
			lists++
			if list.ListOptions.ResourceVersion != "0" || list.ListOptions.FieldSelector != "metadata.name=web" {
				t.Errorf("asked for %+v", list.ListOptions)
			}
		}
	}
	if lists != 1 {
		t.Errorf("%d lists", lists)
	}
}

// Ten thousand bad Services are not ten thousand Events.
func TestRate(t *testing.T) {
	r := newRig(t)
	for range 1000 {
		r.HealthCheckFailed(web, 1, errors.New("no"))
	}
	r.await(Dropped, 1000-burst)
	r.run()
	r.await(Sent, 1) // of one moment
}

// Problems of one Service that are found together are one Event.
func TestProblemsOfOneMoment(t *testing.T) {
	r := newRig(t)
	for _, reason := range []string{"a", "b", "a"} {
		r.Problem(proxier.Problem{Kind: "Service", Object: "shop/web", Field: "f", Reason: reason})
	}
	r.Problem(proxier.Problem{Kind: "Service", Object: "shop/other", Field: "f", Reason: "c"})
	r.run()
	r.await(Sent, 2)
	r.Flush(time.Minute)
	for _, e := range r.events("shop") {
		want := map[string]string{"web": "node node1: f: a; node node1: f: b", "other": "node node1: f: c"}[e.Regarding.Name]
		if e.Note != want {
			t.Errorf("%s: %q, want %q", e.Regarding.Name, e.Note, want)
		}
	}
}

// An API server that refuses harms nothing and is complained about once.
func TestRefused(t *testing.T) {
	r := newRig(t)
	r.client.PrependReactor("create", "events", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Group: "events.k8s.io", Resource: "events"}, "", errors.New("no"))
	})
	r.run()
	r.Started()
	r.HealthzFailed(errors.New("a"))
	r.MetricsFailed(errors.New("b"))
	r.await(Failed, 3)
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := strings.Count(r.log.String(), "system:node-proxier"); n != 1 {
		t.Errorf("complained %d times: %s", n, r.log.String())
	}
}

func TestFlush(t *testing.T) {
	r := newRig(t)
	r.run()
	r.Started()
	r.Flush(time.Minute)
	if n := len(r.events("default")); n != 1 {
		t.Errorf("%d Events after Flush", n)
	}
	// What never ends does not keep the process.
	r.open.Add(1)
	r.Flush(time.Millisecond)
}

func TestNobodyToTell(t *testing.T) {
	var r *Recorder
	r.Started()
	r.HealthzFailed(errors.New("no"))
	r.MetricsFailed(errors.New("no"))
	r.HealthCheckFailed(web, 1, errors.New("no"))
	r.Problem(proxier.Problem{Kind: "Service", Object: "shop/web"})
	r.Flush(time.Hour)
	if err := r.Run(t.Context()); err != nil {
		t.Error(err)
	}
}
