// SPDX-License-Identifier: Apache-2.0

package health

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"signalbox/proxier/plan"
	"signalbox/proxier/service"
	"signalbox/proxier/syncer"
)

// rig is a Health whose clock and Loop are a test's.
type rig struct {
	*testing.T
	*Health
	now     time.Time
	pending map[plan.Family]time.Time
	counted map[string][]int
	told    []string
	subject Subject
}

func newRig(t *testing.T, change ...func(*Subject)) *rig {
	r := &rig{T: t, now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), pending: map[plan.Family]time.Time{plan.IPv4: {}, plan.IPv6: {}}, counted: map[string][]int{}}
	r.subject = Subject{
		Progress: func() syncer.Progress { return syncer.Progress{Pending: r.pending} }, SyncPeriod: 30 * time.Second, NodeName: "node1",
	}
	for _, c := range change {
		c(&r.subject)
	}
	r.Health = New(Options{
		Healthz: func(status int) { r.counted["healthz"] = append(r.counted["healthz"], status) },
		Livez:   func(status int) { r.counted["livez"] = append(r.counted["livez"], status) },
		Now:     func() time.Time { return r.now },
	})
	r.Follow(r.subject)
	return r
}

// Apply, Delete and Synced make the rig a Sink.
func (r *rig) Apply(runtime.Object)  { r.told = append(r.told, "apply") }
func (r *rig) Delete(runtime.Object) { r.told = append(r.told, "delete") }

// sink hides the method of Health that has the same name as a Sink's.
type sink struct{ *rig }

func (s sink) Synced() { s.told = append(s.told, "synced") }

func node(name string, taints ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, key := range taints {
		n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: key, Effect: corev1.TaintEffectPreferNoSchedule})
	}
	return n
}

func (r *rig) synced(families ...plan.Family) {
	for _, f := range families {
		r.Health.Synced(syncer.SyncReport{Family: f, Current: true})
	}
}

func (r *rig) ask(method, path string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	r.Handler().ServeHTTP(w, httptest.NewRequest(method, path, nil))
	return w
}

// want checks status and body, of which a test gives what it is about.
func (r *rig) want(path string, status int, body string) {
	r.Helper()
	w := r.ask(http.MethodGet, path)
	if w.Code != status {
		r.Errorf("%s: %d, want %d", path, w.Code, status)
	}
	if ct, no := w.Header().Get("Content-Type"), w.Header().Get("X-Content-Type-Options"); ct != "application/json" || no != "nosniff" {
		r.Errorf("%s: Content-Type %q, X-Content-Type-Options %q", path, ct, no)
	}
	var got, want any
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
		r.Fatalf("%s: %v in %s", path, err, w.Body)
	}
	if err := json.Unmarshal([]byte(body), &want); err != nil {
		r.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		r.Errorf("%s (-want +got)\n%s", path, diff)
	}
}

func TestAnswers(t *testing.T) {
	r := newRig(t)
	watch := r.Watch(sink{r})
	r.want("/livez", 200, `{"lastUpdated":"2026-03-01T12:00:00Z","currentTime":"2026-03-01T12:00:00Z","healthy":true,"status":{}}`)
	r.want("/healthz", 503, `{"lastUpdated":"0001-01-01T00:00:00Z","currentTime":"2026-03-01T12:00:00Z","nodeEligible":false,"healthy":true,"status":{}}`)

	watch.Apply(node("node1"))
	r.synced(plan.IPv4)
	r.now = r.now.Add(time.Second)
	r.synced(plan.IPv6)
	r.now = r.now.Add(time.Minute)
	r.want("/healthz", 200, `{"lastUpdated":"2026-03-01T12:01:01Z","currentTime":"2026-03-01T12:01:01Z","nodeEligible":true,"healthy":true,"status":{
		"IPv4":{"lastUpdated":"2026-03-01T12:00:00Z","healthy":true},"IPv6":{"lastUpdated":"2026-03-01T12:00:01Z","healthy":true}}}`)

	// One family that is late is one too many.
	r.pending[plan.IPv6] = r.now.Add(-59 * time.Second)
	r.want("/livez", 200, `{"lastUpdated":"2026-03-01T12:01:01Z","currentTime":"2026-03-01T12:01:01Z","healthy":true,"status":{
		"IPv4":{"lastUpdated":"2026-03-01T12:00:00Z","healthy":true},"IPv6":{"lastUpdated":"2026-03-01T12:00:01Z","healthy":true}}}`)
	r.now = r.now.Add(time.Second)
	late := `"healthy":false,"status":{"IPv4":{"lastUpdated":"2026-03-01T12:00:00Z","healthy":true},"IPv6":{"lastUpdated":"2026-03-01T12:00:01Z","healthy":false}}}`
	r.want("/livez", 503, `{"lastUpdated":"2026-03-01T12:00:01Z","currentTime":"2026-03-01T12:01:02Z",`+late)
	r.want("/healthz", 503, `{"lastUpdated":"2026-03-01T12:00:01Z","currentTime":"2026-03-01T12:01:02Z","nodeEligible":true,`+late)
	if r.Healthy() {
		t.Error("Healthy says that the dataplane is")
	}

	r.pending[plan.IPv6] = time.Time{}
	r.synced(plan.IPv6)
	r.want("/livez", 200, `{"lastUpdated":"2026-03-01T12:01:02Z","currentTime":"2026-03-01T12:01:02Z","healthy":true,"status":{
		"IPv4":{"lastUpdated":"2026-03-01T12:00:00Z","healthy":true},"IPv6":{"lastUpdated":"2026-03-01T12:01:02Z","healthy":true}}}`)
	if diff := cmp.Diff(map[string][]int{"healthz": {503, 200, 503}, "livez": {200, 200, 503, 200}}, r.counted); diff != "" {
		t.Errorf("counted (-want +got)\n%s", diff)
	}
}

// What is missing is said for as long as it is, and costs no status.
func TestDegraded(t *testing.T) {
	missing := []string{"net.ipv4.conf.all.route_localnet"}
	r := newRig(t, func(s *Subject) { s.Degraded = func() []string { return missing } })
	r.want("/livez", 200, `{"lastUpdated":"2026-03-01T12:00:00Z","currentTime":"2026-03-01T12:00:00Z","healthy":true,
		"degraded":["net.ipv4.conf.all.route_localnet"],"status":{}}`)
	missing = nil
	r.want("/livez", 200, `{"lastUpdated":"2026-03-01T12:00:00Z","currentTime":"2026-03-01T12:00:00Z","healthy":true,"status":{}}`)
}

func TestConditions(t *testing.T) {
	r := newRig(t, func(s *Subject) { s.Conditions = func() []string { return []string{"a.yaml: document 1: no"} } })
	r.want("/livez", 200, `{"lastUpdated":"2026-03-01T12:00:00Z","currentTime":"2026-03-01T12:00:00Z","healthy":true,"status":{},
		"conditions":["a.yaml: document 1: no"]}`)
}

// A family that never comes up is told of, once it is late.
func TestFirstSyncThatIsLate(t *testing.T) {
	r := newRig(t)
	r.pending[plan.IPv4] = r.now
	r.Health.Synced(syncer.SyncReport{Family: plan.IPv4}) // it failed
	if !r.Healthy() {
		t.Error("unhealthy at once")
	}
	r.now = r.now.Add(time.Minute)
	r.want("/livez", 503, `{"lastUpdated":"0001-01-01T00:00:00Z","currentTime":"2026-03-01T12:01:00Z","healthy":false,"status":{
		"IPv4":{"lastUpdated":"0001-01-01T00:00:00Z","healthy":false}}}`)
}

func TestEligibility(t *testing.T) {
	deleting := node("node1")
	deleting.DeletionTimestamp = &metav1.Time{Time: time.Now()}
	for _, test := range []struct {
		what string
		tell func(watch service.Sink)
		want int
	}{
		{"nothing known", func(service.Sink) {}, 503},
		{"another node", func(w service.Sink) { w.Apply(node("node2")) }, 503},
		{"this node", func(w service.Sink) { w.Apply(node("node1")) }, 200},
		{"a taint", func(w service.Sink) { w.Apply(node("node1", "a", toBeDeleted)) }, 503},
		{"other taints", func(w service.Sink) { w.Apply(node("node1", "node.kubernetes.io/unschedulable")) }, 200},
		{"a taint on another node", func(w service.Sink) { w.Apply(node("node1")); w.Apply(node("node2", toBeDeleted)) }, 200},
		{"a taint taken back", func(w service.Sink) { w.Apply(node("node1", toBeDeleted)); w.Apply(node("node1")) }, 200},
		{"being deleted", func(w service.Sink) { w.Apply(deleting) }, 503},
		{"deleted", func(w service.Sink) { w.Apply(node("node1")); w.Delete(node("node1")) }, 503},
		{"another deleted", func(w service.Sink) { w.Apply(node("node1")); w.Delete(node("node2")) }, 200},
		{"made again", func(w service.Sink) { w.Delete(node("node1")); w.Apply(node("node1")) }, 200},
	} {
		t.Run(test.what, func(t *testing.T) {
			r := newRig(t)
			test.tell(r.Watch(sink{r}))
			if w := r.ask(http.MethodGet, "/healthz"); w.Code != test.want {
				t.Errorf("%d, want %d: %s", w.Code, test.want, w.Body)
			}
			if w := r.ask(http.MethodGet, "/livez"); w.Code != 200 {
				t.Errorf("/livez: %d: %s", w.Code, w.Body)
			}
		})
	}
}

// Another Loop, as after a change of the configuration, begins with nothing; what
// was known of the node, and of the families that it serves, is still so.
func TestAnotherLoop(t *testing.T) {
	r := newRig(t)
	r.Watch(sink{r}).Apply(node("node1"))
	r.synced(plan.IPv4, plan.IPv6)
	r.subject.Progress = func() syncer.Progress {
		return syncer.Progress{Pending: map[plan.Family]time.Time{plan.IPv4: {}}}
	}
	r.Follow(r.subject)
	r.want("/healthz", 200, `{"lastUpdated":"2026-03-01T12:00:00Z","currentTime":"2026-03-01T12:00:00Z","nodeEligible":true,"healthy":true,"status":{
		"IPv4":{"lastUpdated":"2026-03-01T12:00:00Z","healthy":true}}}`)
	r.subject.NodeName = "node2"
	r.Follow(r.subject)
	watch := r.Watch(sink{r})
	for i, want := range []int{503, 200} {
		if w := r.ask(http.MethodGet, "/healthz"); w.Code != want {
			t.Errorf("another node, step %d: %d, want %d", i, w.Code, want)
		}
		watch.Apply(node("node1"))
		watch.Apply(node("node2"))
	}
}

// A configuration that is not in force is said, and makes nobody sick.
func TestConfigurationRejected(t *testing.T) {
	r := newRig(t, func(s *Subject) { s.NodeOptional = true })
	const times = `{"lastUpdated":"2026-03-01T12:00:00Z","currentTime":"2026-03-01T12:00:00Z",`
	r.ConfigurationRejected(errors.New("no such mode"))
	r.want("/healthz", 200, times+`"nodeEligible":true,"healthy":true,"status":{},"configurationRejected":"no such mode"}`)
	r.want("/livez", 200, times+`"healthy":true,"status":{},"configurationRejected":"no such mode"}`)
	r.ConfigurationRejected(nil)
	r.want("/livez", 200, times+`"healthy":true,"status":{}}`)
}

// Without an API server nobody need write a Node object.
func TestOptionalNode(t *testing.T) {
	r := newRig(t, func(s *Subject) { s.NodeOptional = true })
	watch := r.Watch(sink{r})
	for i, want := range []int{200, 503, 200} {
		if w := r.ask(http.MethodGet, "/healthz"); w.Code != want {
			t.Errorf("step %d: %d, want %d", i, w.Code, want)
		}
		if i == 0 {
			watch.Apply(node("node1", toBeDeleted))
		} else {
			watch.Apply(node("node1"))
		}
	}
}

func TestPaths(t *testing.T) {
	r := newRig(t, func(s *Subject) { s.NodeOptional = true })
	for _, test := range []struct {
		method, path string
		want         int
	}{
		{"HEAD", "/healthz", 200}, {"POST", "/livez", 200}, {"GET", "/healthz?verbose", 200},
		{"GET", "/", 404}, {"GET", "/healthz/", 404}, {"GET", "/readyz", 404}, {"GET", "/metrics", 404},
	} {
		if w := r.ask(test.method, test.path); w.Code != test.want {
			t.Errorf("%s %s: %d, want %d", test.method, test.path, w.Code, test.want)
		}
	}
}

func TestTheSinkHearsEverything(t *testing.T) {
	r := newRig(t)
	w := r.Watch(sink{r})
	w.Apply(node("node1"))
	w.Apply(&corev1.Service{})
	w.Delete(&corev1.Service{})
	w.Delete(node("node1"))
	w.Synced()
	if diff := cmp.Diff([]string{"apply", "apply", "delete", "delete", "synced"}, r.told); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}
