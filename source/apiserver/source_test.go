// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

// recorder is a Sink that keeps one line for each call.
type recorder struct {
	mu    sync.Mutex
	lines []string
	told  chan struct{} // one token for each line
}

func newRecorder() *recorder { return &recorder{told: make(chan struct{}, 1000)} }

func (r *recorder) add(format string, args ...any) {
	r.mu.Lock()
	r.lines = append(r.lines, fmt.Sprintf(format, args...))
	r.mu.Unlock()
	r.told <- struct{}{}
}

func (r *recorder) Apply(o runtime.Object)  { r.add("apply %s", describe(o)) }
func (r *recorder) Delete(o runtime.Object) { r.add("delete %s", describe(o)) }
func (r *recorder) Synced()                 { r.add("synced") }

func describe(o runtime.Object) string {
	m := o.(metav1.Object)
	return strings.TrimPrefix(fmt.Sprintf("%T %s/%s", o, m.GetNamespace(), m.GetName()), "*v1.")
}

// take waits for n lines and returns them.
func (r *recorder) take(t *testing.T, n int) []string {
	t.Helper()
	for range n {
		select {
		case <-r.told:
		case <-t.Context().Done():
			t.Fatal("the source told too little")
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	lines := slices.Clone(r.lines[:n])
	r.lines = r.lines[n:]
	return lines
}

func svc(name, version string) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, ResourceVersion: version}}
}

func TestRelistTellsOnlyDifferences(t *testing.T) {
	sink := newRecorder()
	r := newResource("services", &corev1.Service{}, sink, nil, slog.Default())
	if err := r.Replace([]any{svc("a", "1"), svc("b", "2")}, "2"); err != nil {
		t.Fatal(err)
	}
	sink.take(t, 2)
	if err := r.Update(svc("a", "5")); err != nil {
		t.Fatal(err)
	}
	if err := r.Replace([]any{svc("a", "5"), svc("c", "7")}, "9"); err != nil {
		t.Fatal(err)
	}
	want := []string{"delete Service default/b", "apply Service default/c"}
	if got := sink.take(t, 2); !slices.Equal(got, want) {
		t.Errorf("a relist told %q, want %q", got, want)
	}
	if len(sink.lines) > 0 {
		t.Errorf("a relist told also %q", sink.lines)
	}
}

// An API server without its data lists only its own Service.
func TestEmptyListIsConfirmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sink := newRecorder()
		r := newResource("services", &corev1.Service{}, sink, nil, slog.Default())
		empty := func() error { return r.Replace([]any{svc("kubernetes", "9")}, "9") }
		if err := empty(); err != nil {
			t.Fatalf("the first list, of an empty cluster: %v", err)
		}
		if err := r.Replace([]any{svc("kubernetes", "9"), svc("a", "1")}, "2"); err != nil {
			t.Fatal(err)
		}
		sink.take(t, 2)
		if empty() == nil {
			t.Error("an empty list is believed at once")
		}
		time.Sleep(emptyGrace - time.Second)
		if empty() == nil {
			t.Error("an empty list is believed too early")
		}
		if err := r.Replace([]any{svc("a", "1")}, "2"); err != nil {
			t.Fatal(err)
		}
		sink.take(t, 1) // kubernetes is gone
		time.Sleep(time.Hour)
		if empty() == nil {
			t.Error("an empty list is believed because of one before the data came back")
		}
		time.Sleep(emptyGrace)
		if err := empty(); err != nil {
			t.Error(err)
		}
		want := []string{"delete Service default/a", "apply Service default/kubernetes"}
		if got := sink.take(t, 2); !slices.Equal(got, want) {
			t.Errorf("the confirmed list told %q, want %q", got, want)
		}
	})
}

// The Node of a list without it stays, too. A Node that a watch reports as deleted goes.
func TestListWithoutNodeIsConfirmed(t *testing.T) {
	sink := newRecorder()
	r := newResource("nodes", &corev1.Node{}, sink, nil, slog.Default())
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}}
	if err := r.Replace([]any{node}, "1"); err != nil {
		t.Fatal(err)
	}
	if r.Replace(nil, "2") == nil {
		t.Error("a list without the Node is believed at once")
	}
	if err := r.Delete(node); err != nil {
		t.Fatal(err)
	}
	if err := r.Replace(nil, "3"); err != nil {
		t.Errorf("a list without the deleted Node: %v", err)
	}
	if got, want := sink.take(t, 2), []string{"apply Node /node-1", "delete Node /node-1"}; !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
}

// What was known before the start matters to empty lists only, until one list is believed.
func TestFirstListIsConfirmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newResource("services", &corev1.Service{}, newRecorder(), nil, slog.Default())
		r.earlier = 7
		if r.Replace(nil, "1") == nil {
			t.Error("an empty first list is believed at once")
		}
		if err := r.Replace([]any{svc("other", "1")}, "2"); err != nil {
			t.Errorf("the first list with objects, of another cluster: %v", err)
		}
		time.Sleep(time.Hour)
		if r.Replace(nil, "3") == nil {
			t.Error("an empty list is believed because of one before the first objects")
		}
		if err := r.Delete(svc("other", "1")); err != nil {
			t.Fatal(err)
		}
		if err := r.Replace(nil, "4"); err != nil {
			t.Errorf("an empty list of an empty cluster: %v", err)
		}
	})
}

func TestDeletedAndMadeAgain(t *testing.T) {
	sink := newRecorder()
	r := newResource("services", &corev1.Service{}, sink, nil, slog.Default())
	for _, step := range []error{r.Add(svc("a", "1")), r.Delete(svc("a", "2")), r.Add(svc("a", "1"))} {
		if step != nil {
			t.Fatal(step)
		}
	}
	want := []string{"apply Service default/a", "delete Service default/a", "apply Service default/a"}
	if got := sink.take(t, 3); !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
}

func TestForeignObjectIsAnError(t *testing.T) {
	r := newResource("services", &corev1.Service{}, newRecorder(), nil, slog.Default())
	if err := r.Add("not an object"); err == nil || !strings.Contains(err.Error(), "services") {
		t.Errorf("Add of a string answers %v", err)
	}
}

func start(t *testing.T, client kubernetes.Interface, log *slog.Logger) *recorder {
	t.Helper()
	sink := newRecorder()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- New(client, "node-1", log).Run(ctx, sink) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run returned %v", err)
		}
	})
	return sink
}

func TestSyncedComesAfterEverything(t *testing.T) {
	sink := start(t, fake.NewClientset(
		svc("web", "1"),
		&discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web-1"}},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}},
	), slog.Default())
	got := sink.take(t, 4)
	if got[3] != "synced" {
		t.Errorf("told %q: synced is not last", got)
	}
	slices.Sort(got)
	want := []string{"apply EndpointSlice default/web-1", "apply Node /node-1", "apply Service default/web", "synced"}
	if !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
}

func TestChangesAreTold(t *testing.T) {
	client := fake.NewClientset()
	changes := watch.NewFake()
	client.PrependWatchReactor("services", clienttesting.DefaultWatchReactor(changes, nil))
	sink := start(t, client, slog.Default())
	sink.take(t, 1)
	changes.Add(svc("web", "1"))
	changed := svc("web", "2")
	changed.Spec.ClusterIP = "10.96.0.1"
	changes.Modify(changed)
	changes.Delete(svc("web", "3"))
	want := []string{"apply Service default/web", "apply Service default/web", "delete Service default/web"}
	if got := sink.take(t, 3); !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
}

func TestRefusedServiceCIDRsHoldNothingUp(t *testing.T) {
	client := fake.NewClientset(svc("web", "1"))
	refused := apierrors.NewForbidden(schema.GroupResource{Resource: "servicecidrs"}, "", errors.New("no rule"))
	client.PrependReactor("list", "servicecidrs", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, refused })
	sink := start(t, client, slog.Default())
	if got := sink.take(t, 2); got[0] != "apply Service default/web" || got[1] != "synced" {
		t.Errorf("told %q", got)
	}
}

func TestSelectorsAreKubeProxys(t *testing.T) {
	client := fake.NewClientset()
	sink := start(t, client, slog.Default())
	sink.take(t, 1)
	want := map[string][2]string{
		"services":       {"!service.kubernetes.io/service-proxy-name", "spec.clusterIP!=None"},
		"endpointslices": {"!service.kubernetes.io/headless", ""},
		"nodes":          {"", "metadata.name=node-1"},
		"servicecidrs":   {"", ""},
	}
	seen := map[string]bool{}
	for _, action := range client.Actions() {
		list, ok := action.(clienttesting.ListAction)
		if !ok {
			continue
		}
		name := action.GetResource().Resource
		seen[name] = true
		got := [2]string{list.GetListRestrictions().Labels.String(), list.GetListRestrictions().Fields.String()}
		if got != want[name] {
			t.Errorf("%s are listed with %q, want %q", name, got, want[name])
		}
	}
	if len(seen) != len(want) {
		t.Errorf("listed %v", seen)
	}
}

func TestClientErrors(t *testing.T) {
	dir := t.TempDir()
	kubeconfig := func(text string) ClientOptions {
		file, err := os.CreateTemp(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if _, err := file.WriteString(text); err != nil {
			t.Fatal(err)
		}
		return ClientOptions{Kubeconfig: file.Name()}
	}
	for name, test := range map[string]struct {
		opts ClientOptions
		want string
	}{
		"nothing given":   {ClientOptions{}, "no --kubeconfig, --master or --source is given"},
		"no such file":    {ClientOptions{Kubeconfig: "/nonexistent/config"}, "--kubeconfig=/nonexistent/config (clientConnection.kubeconfig in a file): no such file or directory; name a file that is there"},
		"not YAML":        {kubeconfig("a: b: c"), "not a kubeconfig: yaml: mapping values are not allowed in this context; give one such as"},
		"empty":           {kubeconfig(""), "names no API server: a kubeconfig has clusters"},
		"no kubeconfig":   {kubeconfig("apiVersion: v2\nkind: Foo\n"), `no kind "Foo"`},
		"no context":      {kubeconfig("apiVersion: v1\nkind: Config\ncurrent-context: a\n"), "context was not found"},
		"not an address":  {ClientOptions{Master: "http://[::1"}, `the API server at "http://[::1", of --master=http://[::1: `},
		"master is taken": {ClientOptions{Master: "http://127.0.0.1:1"}, ""},
	} {
		_, err := Client(test.opts)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want an error with %q", name, err, test.want)
		}
		if err != nil && !strings.Contains(err.Error(), test.opts.Kubeconfig) {
			t.Errorf("%s: %v does not name the file", name, err)
		}
	}
}
