// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func clientOver(t *testing.T, host string, over roundTripper) kubernetes.Interface {
	t.Helper()
	client, err := kubernetes.NewForConfig(&rest.Config{Host: host, Transport: over, QPS: 1000, Burst: 1000})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func TestServerThatComesUpLate(t *testing.T) {
	api, host := newServerAt(t)
	api.set("10", 0, served("a", "1", "10.96.0.1"))
	var asked atomic.Int32
	var lines logged
	sink := start(t, clientOver(t, host, func(r *http.Request) (*http.Response, error) {
		// Each request for Services comes after the last one's end was noted.
		if strings.HasSuffix(r.URL.Path, "/services") && asked.Add(1) <= 3 {
			return nil, syscall.ECONNREFUSED
		}
		return http.DefaultTransport.RoundTrip(r)
	}), slog.New(slog.NewTextHandler(&lines, nil)))
	if got := sink.take(t, 2); !slices.Equal(got, []string{"apply Service default/a", "synced"}) {
		t.Errorf("once the server was up it told %q", got)
	}
	for _, line := range []string{`resource=services request=watch reason="nothing listens at its address; look at --master`, "answers again"} {
		if n := lines.count(line); n != 1 {
			t.Errorf("%q is logged %d times, want once:\n%s", line, n, lines.b.String())
		}
	}
}

func TestEndsOfStreamedLists(t *testing.T) {
	slices := schema.GroupResource{Group: "discovery.k8s.io", Resource: "endpointslices"}
	for name, test := range map[string]struct {
		w    watch.Interface
		err  error
		want string // in the log, with the resource; nothing is logged if empty
	}{
		"under way":         {w: watch.NewFake()},
		"nobody listens":    {err: syscall.ECONNREFUSED, want: "nothing listens"},
		"forbidden":         {err: apierrors.NewForbidden(slices, "", errors.New("no rule")), want: "system:node-proxier"},
		"too many requests": {err: apierrors.NewTooManyRequests("later", 1), want: "overloaded"},
		"no answer":         {w: watch.NewEmptyWatch(), want: "no answer"},
		"no streamed lists": {err: apierrors.NewInvalid(schema.GroupKind{Kind: "ListOptions"}, "", nil)},
	} {
		t.Run(name, func(t *testing.T) {
			var lines logged
			status := &requestStatus{resource: "endpointslices", log: slog.New(slog.NewTextHandler(&lines, nil)), now: time.Now}
			answer := func(context.Context, metav1.ListOptions) (watch.Interface, error) { return test.w, test.err }
			lw := listWatch[*corev1.ServiceList](nil, answer, func(*metav1.ListOptions) {}, status)
			for range 2 {
				w, err := lw.WatchFuncWithContext(t.Context(), metav1.ListOptions{SendInitialEvents: ptr.To(true)})
				if w != test.w || !errors.Is(err, test.err) {
					t.Fatalf("the reflector gets %v, %v, want what the client returned", w, err)
				}
			}
			want := 0
			if test.want != "" {
				want = 1
			}
			if lines.count("\n") != want || want > 0 && (lines.count(test.want) != 1 || lines.count("resource=endpointslices") != 1) {
				t.Errorf("want %d lines about %q in the log:\n%s", want, test.want, lines.b.String())
			}
		})
	}
}

func TestRunEndsWhileAReflectorHangs(t *testing.T) {
	release, hanging := make(chan struct{}), make(chan struct{})
	var once sync.Once
	client := clientOver(t, "http://192.0.2.1", func(*http.Request) (*http.Response, error) {
		once.Do(func() { close(hanging) })
		<-release // deaf to the request's context
		return nil, syscall.ECONNREFUSED
	})
	t.Cleanup(func() { close(release) })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- New(client, "node-1", slog.Default()).Run(ctx, newRecorder()) }()
	<-hanging
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("Run returned %v", err)
		}
	case <-time.After(30 * time.Second): // far more than any machine needs
		t.Error("Run waits for a reflector that hangs")
	}
}
