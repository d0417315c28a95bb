// SPDX-License-Identifier: Apache-2.0

// Package events writes Kubernetes Events (events.k8s.io/v1) about Services and
// this node. It uses kube-proxy's reasons where kube-proxy has some, and needs no
// right that kube-proxy does not have.
package events

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/klog/v2"

	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

// controller is the reportingController that operators' tools look for.
const controller = "kube-proxy"

// The rate of Events of one node. A cluster has thousands of nodes, and each of
// them reports a Service that cannot be served.
const (
	burst     = 30
	perSecond = 0.2
)

// Results of an Event, for Options.Counted.
const (
	Sent    = "sent"
	Dropped = "dropped" // to stay within the rate
	Failed  = "failed"  // the API server refused it or could not be reached
)

// Options are the parameters of New.
type Options struct {
	Client   kubernetes.Interface
	NodeName string
	Log      *slog.Logger
	// Counted is called with the result of each Event; may be nil.
	Counted func(result string)
}

// Recorder writes Events. Its methods return at once and may be called from any
// goroutine. A nil Recorder writes none; it stands for a missing API server.
//
// client-go's broadcaster queues, retries, and counts repetitions of an Event.
type Recorder struct {
	opts     Options
	limit    flowcontrol.PassiveRateLimiter
	recorder events.EventRecorder
	uids     sync.Map    // plan.ServiceName -> types.UID
	pending  sync.Map    // eventKey -> nil: no attempt to write it has ended
	failing  atomic.Bool // the last attempt failed
}

// eventKey identifies an Event that is written by this process.
type eventKey struct {
	regarding corev1.ObjectReference
	reason    string
}

// New returns a Recorder that writes Events until ctx ends. Those that are not
// written then are lost.
func New(ctx context.Context, opts Options) *Recorder {
	if opts.Counted == nil {
		opts.Counted = func(string) {}
	}
	r := &Recorder{opts: opts, limit: flowcontrol.NewTokenBucketPassiveRateLimiter(perSecond, burst)}
	broadcaster := events.NewBroadcaster(sink{&events.EventSinkImpl{Interface: opts.Client.EventsV1()}, r})
	// The broadcaster logs every attempt that fails; the sink logs the first.
	// Only a broadcaster that was shut down returns an error.
	_ = broadcaster.StartRecordingToSinkWithContext(klog.NewContext(ctx, logr.Discard()))
	context.AfterFunc(ctx, broadcaster.Shutdown)
	r.recorder = broadcaster.NewRecorder(scheme.Scheme, controller)
	return r
}

// Watch returns a Sink that passes everything on to next and remembers the UIDs
// of Services. kubectl describe shows only Events with the Service's UID, and
// the rights of a service proxy do not allow to get a single Service.
func (r *Recorder) Watch(next service.Sink) service.Sink {
	if r == nil {
		return next
	}
	return uidSink{next, &r.uids}
}

type uidSink struct {
	service.Sink
	uids *sync.Map
}

func (s uidSink) Apply(obj runtime.Object) {
	if svc, ok := obj.(*corev1.Service); ok {
		s.uids.Store(plan.ServiceName{Namespace: svc.Namespace, Name: svc.Name}, svc.UID)
	}
	s.Sink.Apply(obj)
}

func (s uidSink) Delete(obj runtime.Object) {
	if svc, ok := obj.(*corev1.Service); ok {
		s.uids.Delete(plan.ServiceName{Namespace: svc.Namespace, Name: svc.Name})
	}
	s.Sink.Delete(obj)
}

// Started reports that signalbox serves this node.
func (r *Recorder) Started() { r.node(corev1.EventTypeNormal, "Starting", "") }

// ModeUnset reports that the mode is a default (KEP-5343).
func (r *Recorder) ModeUnset(note string) {
	r.node(corev1.EventTypeWarning, "KubeProxyDefaultMode", note)
}

// HealthzFailed reports that the health server cannot listen.
func (r *Recorder) HealthzFailed(err error) {
	r.node(corev1.EventTypeWarning, "FailedToStartProxierHealthcheck", err.Error())
}

// MetricsFailed reports that the metrics server cannot listen.
func (r *Recorder) MetricsFailed(err error) {
	r.node(corev1.EventTypeWarning, "FailedToStartMetricServer", err.Error())
}

// ConfigurationRejected reports that a changed configuration file or kubeconfig is not in force.
func (r *Recorder) ConfigurationRejected(err error) {
	r.node(corev1.EventTypeWarning, "ConfigurationRejected", fmt.Sprintf("the changed configuration is not in force, the one before is: %v", err))
}

// HealthCheckFailed reports that a Service's healthCheckNodePort cannot be
// listened on. It has the form of health.ServiceOptions.Failed.
func (r *Recorder) HealthCheckFailed(service plan.ServiceName, port uint16, err error) {
	if r == nil {
		return
	}
	r.service(service, "", "FailedToStartServiceHealthcheck", "Listen",
		fmt.Sprintf("node %s cannot answer health checks on port %d, so load balancers take it for dead; it tries again: %v", r.opts.NodeName, port, err))
}

// Problem reports that a field of a Service cannot be served. Problems of other
// objects are only logged. Each field has an Event of its own, since of equal
// Events the broadcaster keeps the first note and counts the others.
func (r *Recorder) Problem(p plan.Problem) {
	namespace, name, ok := strings.Cut(p.Object, "/")
	if r == nil || p.Kind != "Service" || !ok {
		return
	}
	r.service(plan.ServiceName{Namespace: namespace, Name: name}, p.Field, "NotFullyServed", "ProgramService",
		fmt.Sprintf("node %s: %s: %s", r.opts.NodeName, p.Field, p.Reason))
}

func (r *Recorder) node(kind, reason, note string) {
	if r == nil {
		return
	}
	// The kubelet and kubectl describe use the node's name as its UID.
	regarding := corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: r.opts.NodeName, UID: types.UID(r.opts.NodeName)}
	r.write(regarding, kind, reason, "StartKubeProxy", note)
}

func (r *Recorder) service(name plan.ServiceName, field, reason, action, note string) {
	regarding := corev1.ObjectReference{APIVersion: "v1", Kind: "Service", Namespace: name.Namespace, Name: name.Name, FieldPath: field}
	if uid, ok := r.uids.Load(name); ok {
		regarding.UID = uid.(types.UID)
	}
	r.write(regarding, corev1.EventTypeWarning, reason, action, note)
}

func (r *Recorder) write(regarding corev1.ObjectReference, kind, reason, action, note string) {
	if !r.limit.TryAccept() {
		r.opts.Counted(Dropped)
		return
	}
	r.pending.Store(eventKey{regarding, reason}, nil)
	r.recorder.Eventf(&regarding, nil, kind, reason, action, "%s", truncate(note))
}

// maxNote is the API's limit of an Event's note, in bytes.
const maxNote = 1024

func truncate(note string) string {
	const dots = " …"
	if len(note) <= maxNote {
		return note
	}
	return strings.ToValidUTF8(note[:maxNote-len(dots)], "") + dots
}

// Flush waits until an attempt to write each Event has ended, and no longer than
// atMost. A repetition that the broadcaster only counts makes it wait that long.
func (r *Recorder) Flush(atMost time.Duration) {
	if r == nil {
		return
	}
	_ = wait.PollUntilContextTimeout(context.Background(), 10*time.Millisecond, atMost, true, func(context.Context) (bool, error) {
		done := true
		r.pending.Range(func(any, any) bool { done = false; return false })
		return done, nil
	})
}

// sink bounds each attempt to write an Event and takes its result.
type sink struct {
	events.EventSink
	recorder *Recorder
}

// attemptTimeout bounds an attempt to write an Event. Each Event has a goroutine
// in the broadcaster, which would otherwise wait forever for a hanging server.
const attemptTimeout = 10 * time.Second

// Create implements events.EventSink.
func (s sink) Create(ctx context.Context, e *eventsv1.Event) (*eventsv1.Event, error) {
	return s.attempt(ctx, e, func(ctx context.Context) (*eventsv1.Event, error) { return s.EventSink.Create(ctx, e) })
}

// Patch implements events.EventSink.
func (s sink) Patch(ctx context.Context, e *eventsv1.Event, data []byte) (*eventsv1.Event, error) {
	return s.attempt(ctx, e, func(ctx context.Context) (*eventsv1.Event, error) { return s.EventSink.Patch(ctx, e, data) })
}

// attempt logs the first failure in a row: nothing depends on Events.
func (s sink) attempt(ctx context.Context, e *eventsv1.Event, write func(context.Context) (*eventsv1.Event, error)) (*eventsv1.Event, error) {
	bounded, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	written, err := write(bounded)
	r := s.recorder
	switch {
	case ctx.Err() != nil:
		return written, err
	case err == nil:
		r.failing.Store(false)
		r.opts.Counted(Sent)
	case apierrors.IsAlreadyExists(err) || e.Series != nil && apierrors.IsNotFound(err):
		// A repetition overtook the Event, or the Event has expired: the broadcaster
		// finds the other request for it.
		return written, err
	default:
		if !r.failing.Swap(true) {
			r.opts.Log.Warn("a Kubernetes Event cannot be written; further failures are not logged until one is written",
				"reason", e.Reason, "object", e.Regarding.Name, "error", err, "remedy", "the ClusterRole system:node-proxier allows a service proxy to write Events")
		}
		r.opts.Counted(Failed)
	}
	r.pending.Delete(eventKey{e.Regarding, e.Reason})
	return written, err
}
