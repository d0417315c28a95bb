// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"fmt"
	"regexp"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

// manifests reads the YAML documents of a text.
func manifests(t testing.TB, text string) []runtime.Object {
	t.Helper()
	var objects []runtime.Object
	for _, doc := range regexp.MustCompile(`(?m)^---$`).Split(text, -1) {
		var kind struct{ Kind string }
		if err := yaml.Unmarshal([]byte(doc), &kind); err != nil {
			t.Fatalf("%v in manifest:\n%s", err, doc)
		}
		var obj runtime.Object
		switch kind.Kind {
		case "":
			continue
		case "Service":
			obj = &corev1.Service{}
		case "EndpointSlice":
			obj = &discoveryv1.EndpointSlice{}
		case "Node":
			obj = &corev1.Node{}
		case "ServiceCIDR":
			obj = &networkingv1.ServiceCIDR{}
		default:
			t.Fatalf("a manifest of unknown kind %q", kind.Kind)
		}
		decode(t, doc, obj)
		objects = append(objects, obj)
	}
	return objects
}

func decode(t testing.TB, doc string, into any) {
	t.Helper()
	if err := yaml.UnmarshalStrict([]byte(doc), into); err != nil {
		t.Fatalf("%v in manifest:\n%s", err, doc)
	}
}

// newService is a ClusterIP Service default/name at ip with the TCP port http.
func newService(name, ip string, change ...func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{}
	s.Namespace, s.Name = "default", name
	s.Spec.ClusterIP, s.Spec.ClusterIPs = ip, []string{ip}
	s.Spec.Ports = []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}}
	for _, c := range change {
		c(s)
	}
	return s
}

func overUDP(s *corev1.Service) { s.Spec.Ports[0].Protocol = corev1.ProtocolUDP }

func nodePort(port int32) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeNodePort
		s.Spec.Ports[0].NodePort = port
	}
}

// newSlice is the slice default/service-1 with the addresses ready on port
// 8080, in the protocol TCP, on another node.
func newSlice(service string, addresses ...string) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{AddressType: discoveryv1.AddressTypeIPv4}
	s.Namespace, s.Name = "default", service+"-1"
	s.Labels = map[string]string{discoveryv1.LabelServiceName: service}
	s.Ports = []discoveryv1.EndpointPort{{Name: new("http"), Protocol: new(corev1.ProtocolTCP), Port: new(int32(8080))}}
	for _, a := range addresses {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}, NodeName: new("node2")})
	}
	return s
}

func newUDPSlice(service string, addresses ...string) *discoveryv1.EndpointSlice {
	s := newSlice(service, addresses...)
	s.Ports[0].Protocol = new(corev1.ProtocolUDP)
	return s
}

func clusterIP(i int) string { return fmt.Sprintf("10.96.%d.%d", i/250, i%250+1) }
