package apiserver

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"reflect"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"signalbox/proxier"
)

type object interface {
	runtime.Object
	metav1.Object
}

// resource watches one kind of object and tells the sink. It is its own
// reflector's store: Add, Update, Delete and Replace are the reflector's calls,
// one at a time.
type resource struct {
	name      string // plural and lower case, as in RBAC rules and in messages
	example   object // of the kind; never changed
	sink      proxier.Sink
	reflector *cache.Reflector
	log       *slog.Logger

	seed    maphash.Seed
	told    map[cache.ObjectName]uint64 // hash of what the sink was told of each object
	buf     []byte                      // for hashing, used again
	listed  chan struct{}               // closed once the first list is told
	refused chan struct{}               // closed once the API server forbade it or did not know it
	once    sync.Once
}

var _ cache.TransformingStore = (*resource)(nil)

func newResource(name string, example object, sink proxier.Sink, lw cache.ListerWatcher, log *slog.Logger) *resource {
	r := &resource{
		name: name, example: example, sink: sink, log: log.With("resource", name),
		seed: maphash.MakeSeed(), told: map[cache.ObjectName]uint64{},
		listed: make(chan struct{}), refused: make(chan struct{}),
	}
	r.reflector = cache.NewReflectorWithOptions(lw, example, r, cache.ReflectorOptions{
		Name: "signalbox/" + name, TypeDescription: name, Backoff: newBackoff(),
	})
	return r
}

// run lists and watches until ctx ends. The API server is never given up. How
// each request ends is reported by the outcome that follows them.
func (r *resource) run(ctx context.Context) {
	backoff := newBackoff()
	refused := sync.OnceFunc(func() { close(r.refused) })
	for ctx.Err() == nil {
		began := time.Now()
		err := r.reflector.ListAndWatchWithContext(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > backoffReset {
			backoff = newBackoff()
		}
		if apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
			refused()
		}
		pause := backoff.Step()
		if err != nil {
			r.log.Debug("listing anew", "error", err, "in", pause)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// backoffReset is how long a watch must have lived for the next failure to
// count as the first.
const backoffReset = time.Minute

// newBackoff returns the waits between tries to reach a server that is away.
// They are drawn from a wide range, so that a cluster's nodes do not return all
// at once.
func newBackoff() *wait.Backoff {
	return &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 1 << 30, Cap: 10 * time.Second}
}

// Transformer has a list that comes in as a stream trimmed object by object.
func (r *resource) Transformer() cache.TransformFunc { return trim }

// Add implements cache.ReflectorStore.
func (r *resource) Add(obj any) error { return r.apply(obj) }

// Update implements cache.ReflectorStore.
func (r *resource) Update(obj any) error { return r.apply(obj) }

// Delete implements cache.ReflectorStore.
func (r *resource) Delete(obj any) error {
	o, ok := obj.(object)
	if !ok {
		return fmt.Errorf("watching %s: a %T was deleted", r.name, obj)
	}
	r.forget(cache.MetaObjectToName(o))
	return nil
}

// Replace implements cache.ReflectorStore: the result of a list. What is not
// in it any more is gone, what says the same as before is no news.
func (r *resource) Replace(list []any, _ string) error {
	there := make(map[cache.ObjectName]struct{}, len(list))
	for _, item := range list {
		if o, ok := item.(object); ok {
			there[cache.MetaObjectToName(o)] = struct{}{}
		}
	}
	for name := range r.told {
		if _, ok := there[name]; !ok {
			r.forget(name)
		}
	}
	var failed []error
	for i, item := range list {
		list[i] = nil // nobody needs it while the rest is worked on
		failed = append(failed, r.apply(item))
	}
	r.once.Do(func() { close(r.listed) })
	return errors.Join(failed...)
}

// Resync implements cache.ReflectorStore. The sink forgets nothing that would
// have to be told again.
func (r *resource) Resync() error { return nil }

func (r *resource) apply(obj any) error {
	if _, err := trim(obj); err != nil {
		return fmt.Errorf("watching %s: %w", r.name, err)
	}
	o := obj.(object)
	name := cache.MetaObjectToName(o)
	hash, err := r.hash(o)
	if err != nil {
		return fmt.Errorf("watching %s: %s: %w", r.name, name, err)
	}
	if told, ok := r.told[name]; ok && told == hash {
		return nil
	}
	r.told[name] = hash
	r.sink.Apply(o)
	return nil
}

func (r *resource) forget(name cache.ObjectName) {
	if _, ok := r.told[name]; ok {
		delete(r.told, name)
		r.sink.Delete(r.named(name))
	}
}

// hash is over the protobuf form, which the API's types write with their maps
// sorted. Unlike a resource version it says whether anything that matters has
// changed, and it is right also after the server's data was restored from an
// older state.
func (r *resource) hash(o object) (uint64, error) {
	m, ok := o.(interface {
		Size() int
		MarshalToSizedBuffer([]byte) (int, error)
	})
	if !ok {
		return 0, fmt.Errorf("a %T has no protobuf form", o)
	}
	size := m.Size()
	if cap(r.buf) < size {
		r.buf = make([]byte, size)
	}
	n, err := m.MarshalToSizedBuffer(r.buf[:size])
	if err != nil {
		return 0, err
	}
	return maphash.Bytes(r.seed, r.buf[size-n:size]), nil
}

// named makes an object that says no more than which one it is.
func (r *resource) named(name cache.ObjectName) object {
	o := reflect.New(reflect.TypeOf(r.example).Elem()).Interface().(object)
	o.SetNamespace(name.Namespace)
	o.SetName(name.Name)
	return o
}

// listWatch joins a typed client's two calls, with the same options for both.
// How each ends is noted: a reflector tells nobody that the server is away
// while it tries to watch again.
func listWatch[L runtime.Object](
	list func(context.Context, metav1.ListOptions) (L, error),
	watchFunc func(context.Context, metav1.ListOptions) (watch.Interface, error),
	restrict func(*metav1.ListOptions), out *outcome,
) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			restrict(&o)
			found, err := list(ctx, o)
			out.note(ctx, "list", err)
			return found, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			restrict(&o)
			w, err := watchFunc(ctx, o)
			switch {
			case err == nil && reflect.TypeOf(w) == emptyWatch:
				out.note(ctx, "watch", errNoAnswer)
			case o.SendInitialEvents != nil && cannotStream(err):
				// The list is asked for plainly now, and how that ends counts.
			default:
				out.note(ctx, "watch", err)
			}
			return w, err
		},
	}
}

// emptyWatch is what client-go returns, without an error, in place of a watch
// whose connection timed out or was closed before the server answered.
var emptyWatch = reflect.TypeOf(watch.NewEmptyWatch())

// cannotStream tells whether the server refused no more than to send a list as
// a stream, as those do that know no such request or have it switched off. All
// else has to be noted at once: where nothing listens, the reflector tries the
// stream for ever and never asks for the list plainly.
func cannotStream(err error) bool { return apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) }
