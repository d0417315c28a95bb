package apiserver

import (
	"context"
	"errors"
	"fmt"
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

	versions map[cache.ObjectName]string // resource version by object
	listed   chan struct{}               // closed once the first list is told
	refused  chan struct{}               // closed once the API server forbade it or did not know it
	once     sync.Once
}

func newResource(name string, example object, sink proxier.Sink, lw cache.ListerWatcher, log *slog.Logger) *resource {
	r := &resource{
		name: name, example: example, sink: sink, log: log.With("resource", name),
		versions: map[cache.ObjectName]string{}, listed: make(chan struct{}), refused: make(chan struct{}),
	}
	r.reflector = cache.NewReflectorWithOptions(lw, example, r, cache.ReflectorOptions{Name: "signalbox/" + name})
	return r
}

// run lists and watches until ctx ends. The API server is never given up.
func (r *resource) run(ctx context.Context) {
	backoff := newBackoff()
	refused := sync.OnceFunc(func() { close(r.refused) })
	var last string
	for ctx.Err() == nil {
		began := time.Now()
		err := r.reflector.ListAndWatchWithContext(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > backoffReset {
			backoff, last = newBackoff(), ""
		}
		if apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
			refused()
		}
		pause := backoff.Step()
		if err != nil && err.Error() != last { // the same answer again is no news
			last = err.Error()
			r.log.Warn("cannot watch; what is known goes on being served", "error", err, "remedy", r.remedy(err), "tryAgainIn", pause)
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

func newBackoff() *wait.Backoff {
	return &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Jitter: 0.2, Steps: 1 << 30, Cap: 30 * time.Second}
}

// remedy is what an operator can do about an answer of the API server.
func (r *resource) remedy(err error) string {
	switch {
	case apierrors.IsForbidden(err):
		return fmt.Sprintf("allow list and watch of %s; the ClusterRole system:node-proxier does", r.name)
	case apierrors.IsUnauthorized(err):
		return "check the credentials in the kubeconfig or the service account"
	case apierrors.IsNotFound(err):
		return fmt.Sprintf("none needed if this API server is too old to serve %s", r.name)
	}
	return "check that the API server runs and can be reached from this node"
}

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
	delete(r.versions, cache.MetaObjectToName(o))
	r.sink.Delete(o)
	return nil
}

// Replace implements cache.ReflectorStore: the result of a list. What is not
// in it any more is gone, what has the same version as before is no news.
func (r *resource) Replace(list []any, _ string) error {
	there := make(map[cache.ObjectName]struct{}, len(list))
	for _, item := range list {
		if o, ok := item.(object); ok {
			there[cache.MetaObjectToName(o)] = struct{}{}
		}
	}
	for name := range r.versions {
		if _, ok := there[name]; !ok {
			delete(r.versions, name)
			r.sink.Delete(r.named(name))
		}
	}
	var failed []error
	for _, item := range list {
		failed = append(failed, r.apply(item))
	}
	r.once.Do(func() { close(r.listed) })
	return errors.Join(failed...)
}

// Resync implements cache.ReflectorStore. The sink forgets nothing that would
// have to be told again.
func (r *resource) Resync() error { return nil }

func (r *resource) apply(obj any) error {
	o, ok := obj.(object)
	if !ok {
		return fmt.Errorf("watching %s: got a %T", r.name, obj)
	}
	name, version := cache.MetaObjectToName(o), o.GetResourceVersion()
	if known, seen := r.versions[name]; seen && known == version && version != "" {
		return nil
	}
	r.versions[name] = version
	r.sink.Apply(o)
	return nil
}

// named makes an object that says no more than which one it is.
func (r *resource) named(name cache.ObjectName) object {
	o := reflect.New(reflect.TypeOf(r.example).Elem()).Interface().(object)
	o.SetNamespace(name.Namespace)
	o.SetName(name.Name)
	return o
}

// listWatch joins a typed client's two calls, with the same options for both.
func listWatch[L runtime.Object](
	list func(context.Context, metav1.ListOptions) (L, error),
	watchFunc func(context.Context, metav1.ListOptions) (watch.Interface, error),
	restrict func(*metav1.ListOptions),
) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			restrict(&o)
			return list(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			restrict(&o)
			return watchFunc(ctx, o)
		},
	}
}
