package health

import (
	"encoding/json"
	"net/http"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"signalbox/proxier"
)

// Options is what Health is made of.
type Options struct {
	// Healthz and Livez are told the HTTP status of each answer; may be nil.
	Healthz, Livez func(status int)
	// Now is time.Now when nil.
	Now func() time.Time
}

// Subject is what Health is asked about.
type Subject struct {
	// Progress is that of the Loop whose health is asked for.
	Progress func() proxier.Progress
	// Degraded names kernel settings that the dataplane needs and could not make;
	// may be nil. They are in the answers and do not make them another status:
	// what needs none of them is served.
	Degraded func() []string
	// Conditions says in a line each what else is wrong that changes no status;
	// may be nil.
	Conditions func() []string
	// SyncPeriod is half of what an update may wait before the dataplane counts
	// as unhealthy.
	SyncPeriod time.Duration
	// NodeName is the name of this node's Node object.
	NodeName string
	// NodeOptional makes a node eligible of which no Node object was ever seen.
	NodeOptional bool
}

// Health knows whether the dataplane follows what it is told, and whether the
// node may get traffic. It may be asked and told from any goroutine.
type Health struct {
	opts Options

	mu      sync.Mutex // guards what follows
	of      Subject
	updated map[proxier.Family]time.Time
	node    nodeState
	// rejected is why what the configuration file says is not in force.
	rejected string
}

// nodeState is what is known of the Node object.
type nodeState uint8

const (
	nodeUnknown nodeState = iota
	nodeEligible
	nodeLeaving // or gone
)

// New returns a Health that was told nothing: healthy, of an unknown node.
func New(opts Options) *Health {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	h := &Health{opts: opts, updated: map[proxier.Family]time.Time{}}
	h.Follow(Subject{Progress: func() proxier.Progress { return proxier.Progress{} }})
	return h
}

// Follow has Health be about another Loop than before. What it knows of the
// node stays, as long as it is the same: the new Loop's source, which is still
// to list it, is no reason to take traffic from it.
func (h *Health) Follow(s Subject) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.NodeName != h.of.NodeName {
		h.node = nodeUnknown
	}
	for _, f := range []*func() []string{&s.Degraded, &s.Conditions} {
		if *f == nil {
			*f = func() []string { return nil }
		}
	}
	h.of = s
}

// ConfigurationRejected has the answers say, nil: not any more, why what the
// configuration file says is not in force. What is in force works, and so it is
// no reason to call the node sick.
func (h *Health) ConfigurationRejected(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.rejected = ""
	if err != nil {
		h.rejected = err.Error()
	}
}

// Synced notes when the kernel was last what it should be. It has the form of
// proxier.LoopOptions.Synced.
func (h *Health) Synced(r proxier.SyncReport) {
	if !r.Current {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.updated[r.Family] = h.opts.Now()
}

// Watch returns a Sink that passes everything on to next and looks at the Node
// object of the present Subject on the way.
func (h *Health) Watch(next proxier.Sink) proxier.Sink {
	h.mu.Lock()
	defer h.mu.Unlock()
	return nodeWatch{next, h, h.of.NodeName}
}

type nodeWatch struct {
	proxier.Sink
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
	Healthy      bool                    `json:"healthy"`                // the dataplane alone
	Degraded     []string                `json:"degraded,omitempty"`     // kernel settings that are missing
	Status       map[string]familyStatus `json:"status"`
	// What follows is not kube-proxy's.
	Conditions            []string `json:"conditions,omitempty"`
	ConfigurationRejected string   `json:"configurationRejected,omitempty"`
}

// Healthy says whether the dataplane follows what it is told.
func (h *Health) Healthy() bool { return h.dataplane().Healthy }

// dataplane asks every family. One appears in the answer once it has synced, or
// is late with its first sync.
func (h *Health) dataplane() answer {
	h.mu.Lock()
	defer h.mu.Unlock()
	pending := h.of.Progress().Pending
	a := answer{
		CurrentTime: h.opts.Now(), Healthy: true, Degraded: h.of.Degraded(), Conditions: h.of.Conditions(),
		Status: map[string]familyStatus{}, ConfigurationRejected: h.rejected,
	}
	for _, family := range proxier.Families {
		since, served := pending[family]
		updated := h.updated[family]
		late := !since.IsZero() && a.CurrentTime.Sub(since) >= 2*h.of.SyncPeriod
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
	return h.node == nodeEligible || h.node == nodeUnknown && h.of.NodeOptional
}

// Handler answers /healthz and /livez.
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

// reply gives the time of the answer as that of the last update where all is
// well, as old releases of kube-proxy did, on which some load balancers rely.
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
	_, _ = w.Write(body) // who does not wait for the answer needs none
}

func setJSON(h http.Header) {
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
}
