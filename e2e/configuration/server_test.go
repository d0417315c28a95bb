// SPDX-License-Identifier: Apache-2.0

package configuration

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// apiServer tells a proxy of its Node, and that there is nothing else. A real one
// has the other tests.
type apiServer struct {
	t *testing.T
	// started is closed by the Event that says that the proxy serves.
	started chan struct{}
	once    sync.Once
	// modeUnset says that an Event told that no mode is configured.
	modeUnset atomic.Bool
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	q := r.URL.Query()
	resource := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	switch {
	case r.Method == http.MethodPost:
		s.create(w, r)
	case q.Get("sendInitialEvents") == "true": // an API server before 1.32
		err := apierrors.NewInvalid(schema.GroupKind{Kind: "ListOptions"}, "", nil)
		w.WriteHeader(int(err.ErrStatus.Code))
		s.write(w, &err.ErrStatus)
	case q.Get("watch") != "":
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	case resource == "nodes":
		_, name, _ := strings.Cut(q.Get("fieldSelector"), "=")
		s.write(w, nodes(name))
	default:
		s.writeList(w, resource)
	}
}

// create accepts every object, whose body need not be JSON.
func (s *apiServer) create(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err == nil && bytes.Contains(body, []byte("Starting")) {
		s.once.Do(func() { close(s.started) })
	}
	if bytes.Contains(body, []byte("KubeProxyDefaultMode")) {
		s.modeUnset.Store(true)
	}
	w.WriteHeader(http.StatusCreated)
	s.write(w, &metav1.PartialObjectMetadata{
		TypeMeta:   metav1.TypeMeta{APIVersion: "events.k8s.io/v1", Kind: "Event"},
		ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceDefault, Name: "started"},
	})
}

func nodes(name string) *corev1.NodeList {
	return &corev1.NodeList{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "NodeList"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"},
		Items: []corev1.Node{{
			ObjectMeta: metav1.ObjectMeta{Name: name, ResourceVersion: "1"},
			Spec:       corev1.NodeSpec{PodCIDR: "10.244.1.0/24", PodCIDRs: []string{"10.244.1.0/24", "fd00:10:244:1::/64"}},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
				{Type: corev1.NodeInternalIP, Address: "192.0.2.10"}, {Type: corev1.NodeInternalIP, Address: "2001:db8::10"},
			}},
		}},
	}
}

func (s *apiServer) writeList(w http.ResponseWriter, resource string) {
	kinds := map[string]metav1.TypeMeta{
		"services":       {APIVersion: "v1", Kind: "ServiceList"},
		"endpointslices": {APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSliceList"},
		"servicecidrs":   {APIVersion: "networking.k8s.io/v1", Kind: "ServiceCIDRList"},
	}
	kind, known := kinds[resource]
	if !known {
		w.WriteHeader(http.StatusNotFound)
		kind = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
	}
	s.write(w, &metav1.PartialObjectMetadataList{TypeMeta: kind, ListMeta: metav1.ListMeta{ResourceVersion: "1"}, Items: []metav1.PartialObjectMetadata{}})
}

func (s *apiServer) write(w http.ResponseWriter, v any) {
	if err := json.NewEncoder(w).Encode(v); err != nil {
		s.t.Logf("answering: %v", err) // the client may be gone
	}
}
