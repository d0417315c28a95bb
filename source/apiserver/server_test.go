// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
)

// server speaks as much of the API as a reflector needs: lists of Services and
// watches of them that a test feeds and ends.
type server struct {
	t *testing.T

	mu      sync.Mutex
	objects []*corev1.Service
	version string
	refuse  int               // HTTP status that requests for Services get; 0 for none
	feed    chan *watch.Event // nil ends the watch that takes it
}

func newServer(t *testing.T) (*server, kubernetes.Interface) {
	t.Helper()
	s, host := newServerAt(t)
	client, err := Client(ClientOptions{Master: host, QPS: 1000, Burst: 1000})
	if err != nil {
		t.Fatal(err)
	}
	return s, client
}

func newServerAt(t *testing.T) (*server, string) {
	t.Helper()
	s := &server{t: t, version: "10", feed: make(chan *watch.Event)}
	h := httptest.NewServer(s)
	t.Cleanup(h.Close)
	return s, h.URL
}

func (s *server) set(version string, refuse int, objects ...*corev1.Service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects, s.version, s.refuse = objects, version, refuse
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	objects, version, refuse := s.objects, s.version, s.refuse
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	q := r.URL.Query()
	services := strings.HasSuffix(r.URL.Path, "/services")
	switch {
	case refuse != 0 && services:
		w.WriteHeader(refuse)
		s.write(w, &metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Code: int32(refuse), Reason: metav1.StatusReason(http.StatusText(refuse))})
	case q.Get("sendInitialEvents") == "true": // an API server before 1.32
		err := apierrors.NewInvalid(schema.GroupKind{Kind: "ListOptions"}, "", nil)
		w.WriteHeader(int(err.ErrStatus.Code))
		s.write(w, &err.ErrStatus)
	case q.Get("watch") == "":
		list := &corev1.ServiceList{ListMeta: metav1.ListMeta{ResourceVersion: version}}
		if services {
			for _, o := range objects {
				list.Items = append(list.Items, *o)
			}
		}
		s.writeList(w, r, list)
	case services:
		s.watch(w, r)
	default:
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
}

func (s *server) watch(w http.ResponseWriter, r *http.Request) {
	w.(http.Flusher).Flush()
	for {
		select {
		case <-r.Context().Done():
			return
		case e := <-s.feed:
			if e == nil {
				return
			}
			s.write(w, map[string]any{"type": e.Type, "object": e.Object})
			w.(http.Flusher).Flush()
		}
	}
}

// writeList gives the empty lists of the other kinds their names.
func (s *server) writeList(w http.ResponseWriter, r *http.Request, list *corev1.ServiceList) {
	kinds := map[string][2]string{
		"services": {"v1", "ServiceList"}, "nodes": {"v1", "NodeList"},
		"endpointslices": {"discovery.k8s.io/v1", "EndpointSliceList"}, "servicecidrs": {"networking.k8s.io/v1", "ServiceCIDRList"},
	}
	kind := kinds[r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]]
	list.APIVersion, list.Kind = kind[0], kind[1]
	s.write(w, list)
}

func (s *server) write(w http.ResponseWriter, v any) {
	if err := json.NewEncoder(w).Encode(v); err != nil {
		s.t.Logf("answering: %v", err) // the client may be gone
	}
}

func served(name, version, ip string) *corev1.Service {
	s := svc(name, version)
	s.APIVersion, s.Kind = "v1", "Service"
	s.Spec.ClusterIP = ip
	return s
}

func expired() *watch.Event {
	err := apierrors.NewResourceExpired("too old resource version")
	err.ErrStatus.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
	return &watch.Event{Type: watch.Error, Object: &err.ErrStatus}
}

// logged collects log lines.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

func TestExpiredWatchTellsOnlyDifferences(t *testing.T) {
	api, client := newServer(t)
	api.set("10", 0, served("a", "1", "10.96.0.1"), served("b", "2", "10.96.0.2"))
	sink := start(t, client, slog.Default())
	sink.take(t, 3)
	api.feed <- &watch.Event{Type: watch.Bookmark, Object: served("", "12", "")} // taken: the watch is under way

	// a was touched without meaning, b is gone, c is new: all while nobody
	// watched.
	api.set("20", 0, served("a", "15", "10.96.0.1"), served("c", "16", "10.96.0.3"))
	api.feed <- expired()
	want := []string{"delete Service default/b", "apply Service default/c"}
	if got := sink.take(t, 2); !slices.Equal(got, want) {
		t.Errorf("the relist told %q, want %q", got, want)
	}
	api.feed <- &watch.Event{Type: watch.Modified, Object: served("a", "21", "10.96.0.9")}
	if got := sink.take(t, 1); got[0] != "apply Service default/a" {
		t.Errorf("after the relist came %q, want the changed Service a", got)
	}
}

func TestServerThatRefusesForAWhile(t *testing.T) {
	api, client := newServer(t)
	api.set("10", 0, served("a", "1", "10.96.0.1"))
	var lines logged
	sink := start(t, client, slog.New(slog.NewTextHandler(&lines, nil)))
	sink.take(t, 2)
	// A watch that has answered once is under way, so the event reaches it.
	api.feed <- &watch.Event{Type: watch.Modified, Object: served("a", "11", "10.96.0.9")}
	sink.take(t, 1)

	api.set("10", http.StatusUnauthorized)
	api.feed <- expired()
	await(t, "the refusal in the log", func() bool { return lines.count("the credentials are not accepted") > 0 })
	api.set("30", 0, served("a", "11", "10.96.0.9"), served("b", "25", "10.96.0.2"))
	if got := sink.take(t, 1); got[0] != "apply Service default/b" {
		t.Errorf("once the server answered again it told %q, want the new Service b alone", got)
	}
	await(t, "the end of the refusal in the log", func() bool { return lines.count("answers again") == 1 })
	if n := lines.count("resource=services request"); n != 1 {
		t.Errorf("one refusal was logged %d times:\n%s", n, lines.b.String())
	}
}

// await polls for what another goroutine does without telling.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(time.Minute); !ok(); {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("never came: %s", what)
		}
	}
}
