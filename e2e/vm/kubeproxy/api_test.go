// SPDX-License-Identifier: Apache-2.0

//go:build guest

package kubeproxy

import (
	"encoding/json"
	"net/http"
	"path"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"signalbox/internal/netlab"
)

// api is an API server with objects that never change: a real one would take
// most of an emulated processor. It holds a Node, a Service and its
// EndpointSlices.
type api struct {
	node   corev1.Node
	svc    corev1.Service
	slices []discoveryv1.EndpointSlice
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind, q := path.Base(r.URL.Path), r.URL.Query()
	switch {
	case r.Method != http.MethodGet: // Events
		w.WriteHeader(http.StatusNotFound)
	case q.Get("sendInitialEvents") == "true": // clients fall back to a list
		reply(w, http.StatusUnprocessableEntity, &apierrors.NewInvalid(schema.GroupKind{Kind: "ListOptions"}, "", nil).ErrStatus)
	case q.Get("watch") != "":
		w.Header().Set("Content-Type", "application/json")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	case kind == a.node.Name:
		reply(w, http.StatusOK, &a.node)
	default:
		if list := a.list(kind); list != nil {
			reply(w, http.StatusOK, list)
			return
		}
		w.WriteHeader(http.StatusNotFound)
	}
}

func (a *api) list(kind string) runtime.Object {
	meta := metav1.ListMeta{ResourceVersion: "1"}
	named := func(version, kind string) metav1.TypeMeta { return metav1.TypeMeta{APIVersion: version, Kind: kind} }
	switch kind {
	case "nodes":
		return &corev1.NodeList{TypeMeta: named("v1", "NodeList"), ListMeta: meta, Items: []corev1.Node{a.node}}
	case "services":
		return &corev1.ServiceList{TypeMeta: named("v1", "ServiceList"), ListMeta: meta, Items: []corev1.Service{a.svc}}
	case "endpointslices":
		return &discoveryv1.EndpointSliceList{TypeMeta: named("discovery.k8s.io/v1", "EndpointSliceList"), ListMeta: meta, Items: a.slices}
	case "servicecidrs":
		return &networkingv1.ServiceCIDRList{TypeMeta: named("networking.k8s.io/v1", "ServiceCIDRList"), ListMeta: meta}
	}
	return nil
}

func reply(w http.ResponseWriter, status int, object runtime.Object) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(object) // the client may be gone
}

const port, nodePort = 80, 30080

// clusterIPs are the Service's.
var clusterIPs = []string{"10.96.0.10", "fd00:10:96::10"}

// newAPI makes the objects: a Service with a NodePort whose endpoints are a Pod
// of this node and one of another.
func newAPI(lab *netlab.Lab) *api {
	node, tcp := lab.Host("node1"), corev1.ProtocolTCP
	podCIDRs := netlab.NodePodNetwork("node1")
	meta := func(name string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Name: name, Namespace: "default", UID: types.UID(name), ResourceVersion: "1"}
	}
	a := &api{
		node: corev1.Node{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
			ObjectMeta: metav1.ObjectMeta{Name: "node1", UID: "node1", ResourceVersion: "1"},
			Spec:       corev1.NodeSpec{PodCIDR: podCIDRs.V4.String(), PodCIDRs: []string{podCIDRs.V4.String(), podCIDRs.V6.String()}},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
				{Type: corev1.NodeInternalIP, Address: node.Addr.V4.String()}, {Type: corev1.NodeInternalIP, Address: node.Addr.V6.String()},
			}},
		},
		svc: corev1.Service{ObjectMeta: meta("web"), Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeNodePort, ClusterIP: clusterIPs[0], ClusterIPs: clusterIPs,
			IPFamilies:            []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol},
			Ports:                 []corev1.ServicePort{{Name: "http", Protocol: tcp, Port: port, NodePort: nodePort, TargetPort: intstr.FromInt32(8080)}},
			SessionAffinity:       corev1.ServiceAffinityNone,
			ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyCluster,
		}},
	}
	name, target, ready := "http", int32(8080), true
	for _, family := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		s := discoveryv1.EndpointSlice{
			ObjectMeta: meta("web-" + strings.ToLower(string(family))), AddressType: family,
			Ports: []discoveryv1.EndpointPort{{Name: &name, Protocol: &tcp, Port: &target}},
		}
		s.Labels = map[string]string{discoveryv1.LabelServiceName: "web"}
		for _, pod := range pods {
			address := lab.Host(pod).Addr.V4
			if family == discoveryv1.AddressTypeIPv6 {
				address = lab.Host(pod).Addr.V6
			}
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{address.String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready},
			})
		}
		a.slices = append(a.slices, s)
	}
	return a
}

// pods are the endpoints, one on each node.
var pods = []string{"pod-a", "pod-c"}
