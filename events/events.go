// Package events tells an operator through Kubernetes Events (events.k8s.io/v1)
// what concerns a Service or this node, in the words of kube-proxy where it has
// some, and with no right that kube-proxy has not.
package events

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/flowcontrol"

	"signalbox/proxier"
)

// controller is the reportingController that operators' tools look for.
const controller = "kube-proxy"

// The rate of Events of one node: a cluster has thousands, and a Service that
// nobody can serve is told of by each.
const (
	burst     = 30
	perSecond = 0.2
)

// What becomes of an Event, as Options.Counted is told.
const (
	Sent    = "sent"
	Dropped = "dropped" // to stay within the rate
	Failed  = "failed"  // the API server refused it or could not be reached
)

// Options is what a Recorder is made of.
type Options struct {
	Client   kubernetes.Interface
	NodeName string
	Log      *slog.Logger
	// Counted is told what became of each Event; may be nil.
	Counted func(result string)
}

// Recorder sends Events. Its methods return at once and may be called from any
// goroutine. A nil Recorder sends none: there is no API server to send them to.
type Recorder struct {
	opts  Options
	limit flowcontrol.RateLimiter
	queue chan event
	open  atomic.Int64 // Events of which it is not known what became of them

	mu   sync.Mutex // guards uids
	uids map[proxier.ServiceName]types.UID
}

// event is an Event that is to be sent.
type event struct {
	regarding                  corev1.ObjectReference
	kind, reason, action, note string
}

// New returns a Recorder that sends what it is given once Run is called.
func New(opts Options) *Recorder {
	if opts.Counted == nil {
		opts.Counted = func(string) {}
	}
	return &Recorder{opts: opts, limit: flowcontrol.NewTokenBucketRateLimiter(perSecond, burst), queue: make(chan event, burst), uids: map[proxier.ServiceName]types.UID{}}
}

// Watch returns a Sink that passes everything on to next and learns the UIDs of
// Services on the way. Without its UID kubectl describe does not show a
// Service's Events, and to ask for each would be a list of the API: the rights
// of a service proxy do not allow a get.
func (r *Recorder) Watch(next proxier.Sink) proxier.Sink {
	if r == nil {
		return next
	}
	return uidWatch{next, r}
}

type uidWatch struct {
	proxier.Sink
	recorder *Recorder
}

func (w uidWatch) Apply(obj runtime.Object) {
	if s, ok := obj.(*corev1.Service); ok {
		w.recorder.mu.Lock()
		w.recorder.uids[proxier.ServiceName{Namespace: s.Namespace, Name: s.Name}] = s.UID
		w.recorder.mu.Unlock()
	}
	w.Sink.Apply(obj)
}

func (w uidWatch) Delete(obj runtime.Object) {
	if s, ok := obj.(*corev1.Service); ok {
		w.recorder.mu.Lock()
		delete(w.recorder.uids, proxier.ServiceName{Namespace: s.Namespace, Name: s.Name})
		w.recorder.mu.Unlock()
	}
	w.Sink.Delete(obj)
}

// Started says that this node's Services are being taken care of.
func (r *Recorder) Started() { r.node(corev1.EventTypeNormal, "Starting", "") }

// ModeUnset says that the mode is a default (KEP-5343).
func (r *Recorder) ModeUnset(note string) {
	r.node(corev1.EventTypeWarning, "KubeProxyDefaultMode", note)
}

// HealthzFailed says that the health server cannot listen.
func (r *Recorder) HealthzFailed(err error) {
	r.node(corev1.EventTypeWarning, "FailedToStartProxierHealthcheck", err.Error())
}

// MetricsFailed says that the metrics server cannot listen.
func (r *Recorder) MetricsFailed(err error) {
	r.node(corev1.EventTypeWarning, "FailedToStartMetricServer", err.Error())
}

// ConfigurationRejected says that a changed configuration file is not in force.
func (r *Recorder) ConfigurationRejected(err error) {
	r.node(corev1.EventTypeWarning, "ConfigurationRejected", fmt.Sprintf("the changed configuration file is not in force, what it said before is: %v", err))
}

func (r *Recorder) node(kind, reason, note string) {
	if r == nil {
		return
	}
	// The UID is what the kubelet writes and kubectl describe asks for.
	r.send(event{
		regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: r.opts.NodeName, UID: types.UID(r.opts.NodeName)},
		kind:      kind, reason: reason, action: "StartKubeProxy", note: note,
	})
}

// HealthCheckFailed says that a Service's healthCheckNodePort cannot be
// listened on. It has the form of health.ServiceOptions.Failed.
func (r *Recorder) HealthCheckFailed(service proxier.ServiceName, port uint16, err error) {
	if r == nil {
		return
	}
	r.service(service, "FailedToStartServiceHealthcheck", "Listen",
		fmt.Sprintf("node %s cannot answer health checks on port %d, so load balancers take it for dead; it tries again: %v", r.opts.NodeName, port, err))
}

// Problem says that a Service is not served, or not all of it. What is wrong
// with other objects is in the log alone.
func (r *Recorder) Problem(p proxier.Problem) {
	namespace, name, ok := strings.Cut(p.Object, "/")
	if r == nil || p.Kind != "Service" || !ok {
		return
	}
	r.service(proxier.ServiceName{Namespace: namespace, Name: name}, "NotFullyServed", "ProgramService",
		fmt.Sprintf("node %s: %s: %s", r.opts.NodeName, p.Field, p.Reason))
}

func (r *Recorder) service(name proxier.ServiceName, reason, action, note string) {
	r.mu.Lock()
	uid := r.uids[name]
	r.mu.Unlock()
	r.send(event{
		regarding: corev1.ObjectReference{APIVersion: "v1", Kind: "Service", Namespace: name.Namespace, Name: name.Name, UID: uid},
		kind:      corev1.EventTypeWarning, reason: reason, action: action, note: note,
	})
}

func (r *Recorder) send(e event) {
	if r.limit.TryAccept() {
		select {
		case r.queue <- e:
			r.open.Add(1)
			return
		default:
		}
	}
	r.opts.Counted(Dropped)
}

// Run sends Events until ctx ends. What is not sent then is lost.
func (r *Recorder) Run(ctx context.Context) error {
	if r == nil {
		return nil
	}
	broadcaster := events.NewBroadcaster(&sink{
		EventSink: &events.EventSinkImpl{Interface: r.opts.Client.EventsV1()}, counted: r.settled, log: r.opts.Log,
	})
	defer broadcaster.Shutdown()
	if err := broadcaster.StartRecordingToSinkWithContext(ctx); err != nil {
		r.opts.Log.Warn("no Kubernetes Events are sent", "error", err)
		return nil
	}
	recorder := broadcaster.NewRecorder(scheme.Scheme, controller)
	for {
		select {
		case <-ctx.Done():
			return nil
		case first := <-r.queue:
			for _, e := range r.gather(first) {
				recorder.Eventf(&e.regarding, nil, e.kind, e.reason, e.action, "%s", shorten(e.note))
			}
		}
	}
}

// moment is how long what comes to one Event is waited for.
const moment = 100 * time.Millisecond

// gather makes one Event of those of a moment that differ in their note alone:
// a Service often has several problems at once, and the API counts what looks
// the same instead of keeping every note.
func (r *Recorder) gather(first event) []event {
	all := []event{first}
	for end := time.After(moment); ; {
		select {
		case <-end:
			return all
		case e := <-r.queue:
			i := slices.IndexFunc(all, e.sameBut)
			if i < 0 {
				all = append(all, e)
				continue
			}
			r.open.Add(-1)
			if !strings.Contains(all[i].note, e.note) {
				all[i].note += "; " + e.note
			}
		}
	}
}

// sameBut says whether two Events differ in their note at most.
func (e event) sameBut(o event) bool {
	e.note = o.note
	return e == o
}

func (r *Recorder) settled(result string) {
	r.open.Add(-1)
	r.opts.Counted(result)
}

// Flush waits until it is known what became of each Event, while Run is at
// work, but not for longer than it may.
func (r *Recorder) Flush(atMost time.Duration) {
	if r == nil {
		return
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(atMost); r.open.Load() > 0; {
		select {
		case <-end:
			return
		case <-tick.C:
		}
	}
}

// maxNote is the API's limit of an Event's note, in bytes.
const maxNote = 1024

func shorten(note string) string {
	const dots = " …"
	if len(note) <= maxNote {
		return note
	}
	end := maxNote - len(dots)
	for end > 0 && note[end]&0xc0 == 0x80 { // inside a character
		end--
	}
	return note[:end] + dots
}

// sink counts what becomes of Events. Refusals for good are logged once: Events
// are a courtesy, nothing depends on them.
type sink struct {
	events.EventSink
	counted func(string)
	log     *slog.Logger
	refused sync.Once
}

// tryFor bounds one try to send an Event. The broadcaster tries it a dozen times
// and has a goroutine for each, which must not wait for ever for a server that
// hangs.
const tryFor = 10 * time.Second

// Create implements events.EventSink.
func (s *sink) Create(ctx context.Context, e *eventsv1.Event) (*eventsv1.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, tryFor)
	defer cancel()
	made, err := s.EventSink.Create(ctx, e)
	return s.note(e, made, err)
}

// Patch implements events.EventSink.
func (s *sink) Patch(ctx context.Context, e *eventsv1.Event, data []byte) (*eventsv1.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, tryFor)
	defer cancel()
	made, err := s.EventSink.Patch(ctx, e, data)
	return s.note(e, made, err)
}

func (s *sink) note(asked, made *eventsv1.Event, err error) (*eventsv1.Event, error) {
	if err == nil {
		s.counted(Sent)
		return made, nil
	}
	defer s.counted(Failed) // once the log says why
	if apierrors.IsForbidden(err) {
		s.refused.Do(func() {
			s.log.Warn("the API server takes no Events of this account; the ClusterRole system:node-proxier allows them", "error", err)
		})
		return asked, nil
	}
	return made, err
}
