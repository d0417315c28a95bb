// SPDX-License-Identifier: Apache-2.0

package health

import (
	"encoding/json"
	"net/http"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"signalbox/proxier/plan"
	"signalbox/proxier/service"
	"signalbox/proxier/syncer"
)

// Options are the parameters of New.
type Options struct {
	// Healthz and Livez are called with the HTTP status of each answer; may be nil.
	Healthz, Livez func(status int)
	// Now is time.Now when nil.
	Now func() time.Time
}

// Subject is what Health reports about.
type Subject struct {
	// Progress returns the progress of the Loop.
	Progress func() syncer.Progress
	// Degraded returns the names of kernel settings that the dataplane needs and
	// could not set; may be nil. The answers list them. They do not change the
	// status, because most Services do not need them.
	Degraded func() []string
	// Conditions returns a line for each other problem that does not change the
	// status; may be nil.
	Conditions func() []string
	// SyncPeriod is half the time that an update may wait before the dataplane
	// counts as unhealthy.
	SyncPeriod time.Duration
	// NodeName is the name of this node's Node object.
	NodeName string
	// NodeOptional makes the node eligible as long as there was no Node object.
	NodeOptional bool
}

// Health knows whether the dataplane follows the API objects, and whether the node
// is eligible for traffic. Its methods may be called from any goroutine.
type Health struct {
	opts Options

	mu      sync.Mutex // guards what follows
	subject Subject
	updated map[plan.Family]time.Time
	node    nodeState
	// rejected is the reason why the changed configuration is not in force.
	rejected string
}

// nodeState is the state of the Node object.
type nodeState uint8

const (
	nodeUnknown nodeState = iota
	nodeEligible
	nodeLeaving // or gone
)

// New returns a Health with a healthy dataplane and an unknown node.
func New(opts Options) *Health {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	h := &Health{opts: opts, updated: map[plan.Family]time.Time{}}
	h.Follow(Subject{Progress: func() syncer.Progress { return syncer.Progress{} }})
	return h
}

// Follow replaces the subject. The state of the node stays if its name is the same:
// that the new source has not listed it yet must not divert traffic.
func (h *Health) Follow(s Subject) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.NodeName != h.subject.NodeName {
		h.node = nodeUnknown
	}
	for _, f := range []*func() []string{&s.Degraded, &s.Conditions} {
		if *f == nil {
			*f = func() []string { return nil }
		}
	}
	h.subject = s
}

// ConfigurationRejected sets the reason why the changed configuration is not in force;
// nil clears it. It does not change the status: the configuration in force works.
func (h *Health) ConfigurationRejected(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.rejected = ""
	if err != nil {
		h.rejected = err.Error()
	}
}

// Synced records when the kernel was last up to date. It has the form of
// syncer.LoopOptions.Synced.
func (h *Health) Synced(r syncer.SyncReport) {
	if !r.Current {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.updated[r.Family] = h.opts.Now()
}

// Watch returns a Sink that passes everything on to next and reads the subject's
// Node object.
func (h *Health) Watch(next service.Sink) service.Sink {
	h.mu.Lock()
	defer h.mu.Unlock()
	return nodeWatch{next, h, h.subject.NodeName}
}

type nodeWatch struct {
	service.Sink
	health *Health
	name   string
}

func (w nodeWatch) Apply(obj runtime.Object) {
	if n, ok := obj.(*corev1.Node); ok && n.Name == w.name {
		w.health.setNode(stateOf(n))
	}
	w.Sink.Apply(obj)
}

func (w nodeWatch) Delete(obj runtime.Object) {
	if n, ok := obj.(*corev1.Node); ok && n.Name == w.name {
		w.health.setNode(nodeLeaving)
	}
	w.Sink.Delete(obj)
}

func (h *Health) setNode(s nodeState) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.node = s
}

// toBeDeleted is the taint that the cluster autoscaler puts on a node before it
// drains and removes it, whatever its effect (KEP-3836).
const toBeDeleted = "ToBeDeletedByClusterAutoscaler"

func stateOf(n *corev1.Node) nodeState {
	if n.DeletionTimestamp != nil {
		return nodeLeaving
	}
	for i := range n.Spec.Taints {
		if n.Spec.Taints[i].Key == toBeDeleted {
			return nodeLeaving
		}
	}
	return nodeEligible
}

// familyStatus is a family's part of an answer.
type familyStatus struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

// answer is the body of /healthz and /livez.
type answer struct {
	LastUpdated  time.Time               `json:"lastUpdated"`
	CurrentTime  time.Time               `json:"currentTime"`
	NodeEligible *bool                   `json:"nodeEligible,omitempty"` // nil at /livez
	Healthy      bool                    `json:"healthy"`                // of the dataplane only
	Degraded     []string                `json:"degraded,omitempty"`     // see Subject
	Status       map[string]familyStatus `json:"status"`
	// kube-proxy does not have these.
	Conditions            []string `json:"conditions,omitempty"`
	ConfigurationRejected string   `json:"configurationRejected,omitempty"`
}

// Healthy reports whether the dataplane follows the API objects.
func (h *Health) Healthy() bool { return h.dataplane().Healthy }

// dataplane returns the answer about all families. A family is listed after its
// first sync, or when that is late.
func (h *Health) dataplane() answer {
	h.mu.Lock()
	defer h.mu.Unlock()
	pending := h.subject.Progress().Pending
	a := answer{
		CurrentTime: h.opts.Now(), Healthy: true, Degraded: h.subject.Degraded(), Conditions: h.subject.Conditions(),
		Status: map[string]familyStatus{}, ConfigurationRejected: h.rejected,
	}
	for _, family := range plan.Families {
		since, served := pending[family]
		updated := h.updated[family]
		late := !since.IsZero() && a.CurrentTime.Sub(since) >= 2*h.subject.SyncPeriod
		if !served || updated.IsZero() && !late {
			continue
		}
		a.Status[family.String()] = familyStatus{updated, !late}
		a.Healthy = a.Healthy && !late
		if updated.After(a.LastUpdated) {
			a.LastUpdated = updated
		}
	}
	return a
}

func (h *Health) eligible() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.node == nodeEligible || h.node == nodeUnknown && h.subject.NodeOptional
}

// Handler serves /healthz and /livez.
func (h *Health) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		a, eligible := h.dataplane(), h.eligible()
		a.NodeEligible = &eligible
		reply(w, a, a.Healthy && eligible, h.opts.Healthz)
	})
	mux.HandleFunc("/livez", func(w http.ResponseWriter, _ *http.Request) {
		a := h.dataplane()
		reply(w, a, a.Healthy, h.opts.Livez)
	})
	return mux
}

// reply sets lastUpdated to the present time if all is well, as old releases of
// kube-proxy did. Some load balancers rely on that.
func reply(w http.ResponseWriter, a answer, ok bool, count func(int)) {
	status := http.StatusServiceUnavailable
	if ok {
		status = http.StatusOK
		a.LastUpdated = a.CurrentTime
	}
	body, err := json.Marshal(a)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if count != nil {
		count(status)
	}
	setJSON(w.Header())
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

func setJSON(h http.Header) {
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
}
