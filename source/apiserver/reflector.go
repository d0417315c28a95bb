// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"reflect"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	backoff "k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/utils/clock"

	"signalbox/internal/wait"
	"signalbox/proxier/service"
)

type object interface {
	runtime.Object
	metav1.Object
}

// resource watches the objects of one kind and passes changes on to the sink. It
// is the store of its reflector, which calls Add, Update, Delete and Replace one
// at a time.
type resource struct {
	name      string // plural and lower case, as in RBAC rules
	example   object // of the kind; never changed
	sink      service.Sink
	reflector *cache.Reflector

	log   *slog.Logger
	seed  maphash.Seed
	mu    sync.Mutex                  // guards sent and text
	sent  map[cache.ObjectName]uint64 // hashes of the objects that the sink has
	text  []byte                      // see textForm
	saver *saver                      // nil: nothing is saved
	path  string                      // of the saved objects; empty: there are none

	// emptySince is when a list first lacked all known objects; zero if the last one did
	// not.
	emptySince time.Time
	earlier    int // how many objects an earlier Source knew, or an earlier process saved

	listed, answered           chan struct{} // closed after the first list; after the first list or refusal
	closeListed, closeAnswered func()
}

var _ cache.TransformingStore = (*resource)(nil)

func newResource(name string, example object, sink service.Sink, lw cache.ListerWatcher, log *slog.Logger) *resource {
	r := &resource{
		name: name, example: example, sink: sink, log: log, seed: maphash.MakeSeed(), sent: map[cache.ObjectName]uint64{},
		listed: make(chan struct{}), answered: make(chan struct{}),
	}
	r.closeListed = sync.OnceFunc(func() { close(r.listed) })
	r.closeAnswered = sync.OnceFunc(func() { close(r.answered) })
	r.reflector = cache.NewReflectorWithOptions(lw, example, r, cache.ReflectorOptions{
		Name: "signalbox/" + name, TypeDescription: name, Backoff: newBackoff(),
	})
	return r
}

// run lists and watches until ctx ends. requestStatus logs the failures.
func (r *resource) run(ctx context.Context) {
	delay := newBackoff().DelayWithReset(clock.RealClock{}, backoffReset)
	_ = delay.Until(ctx, true, true, func(ctx context.Context) (bool, error) {
		err := r.reflector.ListAndWatchWithContext(ctx)
		if apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
			r.closeAnswered()
		}
		return false, nil
	})
}

// backoffReset is how long no failure must happen until the next counts as the
// first.
const backoffReset = time.Minute

// newBackoff returns the pauses between requests to a server that fails. They are
// drawn from a wide range, so that the nodes of a cluster do not return together.
func newBackoff() *backoff.Backoff {
	return &backoff.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 1 << 30, Cap: 10 * time.Second}
}

// Transformer implements cache.TransformingStore: it trims the objects of a
// streamed list one by one.
func (r *resource) Transformer() cache.TransformFunc { return trim }

// Add implements cache.ReflectorStore.
func (r *resource) Add(obj any) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.apply(obj)
}

// Update implements cache.ReflectorStore.
func (r *resource) Update(obj any) error { return r.Add(obj) }

// Delete implements cache.ReflectorStore.
func (r *resource) Delete(obj any) error {
	o, ok := obj.(object)
	if !ok {
		return fmt.Errorf("watching %s: a deleted object is a %T", r.name, obj)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.remove(cache.MetaObjectToName(o))
	return nil
}

// Replace implements cache.ReflectorStore. The list has all objects that exist. After an
// error, the reflector lists again.
func (r *resource) Replace(list []any, _ string) error {
	exists := make(map[cache.ObjectName]bool, len(list))
	for _, item := range list {
		if o, ok := item.(object); ok {
			exists[cache.MetaObjectToName(o)] = true
		}
	}
	first := !wait.Closed(r.listed)
	if first && isEmpty(exists) {
		r.readEarlier()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.confirm(exists, first); err != nil {
		r.closeAnswered()
		return err
	}
	for name := range r.sent {
		if !exists[name] {
			r.remove(name)
		}
	}
	var failed []error
	for i, item := range list {
		list[i] = nil // frees memory while the rest is processed
		failed = append(failed, r.apply(item))
	}
	r.saver.listed()
	r.closeListed()
	r.closeAnswered()
	return errors.Join(failed...)
}

// emptyGrace is how long a list without any known object is not believed.
const emptyGrace = 30 * time.Second

// confirm returns an error if a list lacks all known objects, until lists have lacked them
// for emptyGrace. An API server that has lost its data, or does not have it yet, lists no
// object but those that it makes itself. Until the first list is believed, what was known
// earlier counts, too; such a list may have other objects, as after a change of the cluster.
func (r *resource) confirm(exists map[cache.ObjectName]bool, first bool) error {
	known := 0
	for name := range r.sent {
		switch {
		case name == ofAPIServer:
		case exists[name]:
			r.emptySince = time.Time{}
			return nil
		default:
			known++
		}
	}
	if known == 0 && first && isEmpty(exists) {
		known = r.earlier
	}
	if known == 0 {
		r.emptySince = time.Time{}
		return nil
	}
	if r.emptySince.IsZero() {
		r.emptySince = time.Now()
		r.log.Warn("the API server lists none of the known objects any more; they stay served until further lists confirm this",
			"resource", r.name, "known", known, "gracePeriod", emptyGrace)
	}
	if time.Since(r.emptySince) < emptyGrace {
		return fmt.Errorf("the list of %s has none of %d known objects; it is not believed before %s", r.name, known, r.emptySince.Add(emptyGrace).Format(time.RFC3339))
	}
	r.log.Warn("the API server has listed none of the known objects for the grace period; they are removed", "resource", r.name, "known", known, "gracePeriod", emptyGrace)
	r.emptySince = time.Time{}
	return nil
}

// isEmpty says whether these are at most the objects that an API server makes itself.
func isEmpty(exists map[cache.ObjectName]bool) bool {
	return len(exists) == 0 || len(exists) == 1 && exists[ofAPIServer]
}

// remember sets how many objects the API server has listed.
func (r *resource) remember(known map[string]int) {
	if !wait.Closed(r.listed) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	known[r.name] = len(r.sent)
	if _, ok := r.sent[ofAPIServer]; ok {
		known[r.name]--
	}
}

// ofAPIServer is the Service, and the EndpointSlice, that an API server makes for itself.
var ofAPIServer = cache.ObjectName{Namespace: metav1.NamespaceDefault, Name: "kubernetes"}

// Resync implements cache.ReflectorStore. The sink keeps its objects.
func (r *resource) Resync() error { return nil }

func (r *resource) apply(obj any) error {
	if _, err := trim(obj); err != nil {
		return fmt.Errorf("watching %s: %w", r.name, err)
	}
	o := obj.(object)
	name := cache.MetaObjectToName(o)
	text, err := r.textForm(o)
	if err != nil {
		return fmt.Errorf("watching %s: %s: %w", r.name, name, err)
	}
	hash := maphash.Bytes(r.seed, text)
	if sent, ok := r.sent[name]; !ok || sent != hash {
		r.sent[name] = hash
		r.sink.Apply(o)
		r.saver.put(name, text, !ok)
	}
	return nil
}

func (r *resource) remove(name cache.ObjectName) {
	if _, ok := r.sent[name]; ok {
		delete(r.sent, name)
		gone := r.example.DeepCopyObject().(object)
		gone.SetNamespace(name.Namespace)
		gone.SetName(name.Name)
		r.sink.Delete(gone)
		r.saver.put(name, nil, false)
	}
}

// textForm is the protobuf form, in which maps are sorted. It is valid until the next call.
// Objects are compared by its hash. A resource version would change without a change that
// matters, and would not tell objects apart after the server's data was restored from a
// backup.
func (r *resource) textForm(o object) ([]byte, error) {
	m, ok := o.(interface {
		Size() int
		MarshalToSizedBuffer([]byte) (int, error)
	})
	if !ok {
		return nil, fmt.Errorf("a %T has no protobuf form", o)
	}
	size := m.Size()
	r.text = slices.Grow(r.text[:0], size)
	n, err := m.MarshalToSizedBuffer(r.text[:size])
	return r.text[:n], err
}

// listWatch joins the two calls of a typed client, with the same options for
// both. It records how each ends: a reflector does not report a failure to watch
// that it retries.
func listWatch[L runtime.Object](
	list func(context.Context, metav1.ListOptions) (L, error),
	watchFunc func(context.Context, metav1.ListOptions) (watch.Interface, error),
	restrict func(*metav1.ListOptions), status *requestStatus,
) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			restrict(&o)
			found, err := list(ctx, o)
			status.ended(ctx, "list", err)
			return found, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			restrict(&o)
			w, err := watchFunc(ctx, o)
			switch {
			case err == nil && reflect.TypeOf(w) == emptyWatch:
				status.ended(ctx, "watch", errNoAnswer)
			case o.SendInitialEvents != nil && cannotStream(err):
				// A plain list follows, and its end counts.
			default:
				status.ended(ctx, "watch", err)
			}
			return w, err
		},
	}
}

// emptyWatch is what client-go returns, without an error, if a connection timed
// out or was closed before the server answered a watch.
var emptyWatch = reflect.TypeOf(watch.NewEmptyWatch())

// cannotStream says whether the server only refuses to send a list as a stream,
// because it does not know this or has it switched off. Other failures must be
// recorded at once: if nothing listens, the reflector never asks for a plain list.
func cannotStream(err error) bool { return apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) }
