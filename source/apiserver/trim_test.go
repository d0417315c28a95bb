// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"signalbox/proxier/plan"
)

var (
	made    = metav1.NewTime(time.Unix(1700000000, 0))
	ballast = metav1.ObjectMeta{
		Namespace: "default", Name: "web", UID: "1-2-3", ResourceVersion: "77", Generation: 3, CreationTimestamp: made, Finalizers: []string{"f"},
		OwnerReferences: []metav1.OwnerReference{{Name: "o"}}, ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubectl"}},
		Labels:      map[string]string{"app": "web", discoveryv1.LabelServiceName: "web", corev1.LabelTopologyZone: "z1"},
		Annotations: map[string]string{"note": "long", plan.AnnotationWeights: "*=2", plan.AnnotationScheduler: "lc", corev1.EndpointsLastChangeTriggerTime: "2023-11-14T22:13:20Z"},
	}
	lean = metav1.ObjectMeta{
		Namespace: "default", Name: "web", CreationTimestamp: made,
		Labels:      map[string]string{discoveryv1.LabelServiceName: "web", corev1.LabelTopologyZone: "z1"},
		Annotations: map[string]string{plan.AnnotationWeights: "*=2", plan.AnnotationScheduler: "lc", corev1.EndpointsLastChangeTriggerTime: "2023-11-14T22:13:20Z"},
	}
)

func TestTrim(t *testing.T) {
	named := *lean.DeepCopy()
	named.UID = "1-2-3"
	served := corev1.ServiceSpec{ClusterIP: "10.96.0.1", Ports: []corev1.ServicePort{{Port: 80}}}
	selecting := served
	selecting.Selector = map[string]string{"app": "web"}
	ingress := corev1.LoadBalancerStatus{Ingress: []corev1.LoadBalancerIngress{{IP: "192.0.2.1"}}}
	ready := discoveryv1.EndpointConditions{Ready: ptr.To(true)}
	hints := &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: "z1"}}}
	addresses := []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}}
	taints := []corev1.Taint{{Key: "ToBeDeletedByClusterAutoscaler"}}
	tests := map[string]struct{ in, want any }{
		"Service": {
			&corev1.Service{ObjectMeta: *ballast.DeepCopy(), Spec: selecting, Status: corev1.ServiceStatus{LoadBalancer: ingress, Conditions: []metav1.Condition{{Type: "x"}}}},
			&corev1.Service{ObjectMeta: named, Spec: served, Status: corev1.ServiceStatus{LoadBalancer: ingress}},
		},
		"EndpointSlice": {
			&discoveryv1.EndpointSlice{ObjectMeta: *ballast.DeepCopy(), Endpoints: []discoveryv1.Endpoint{{
				Addresses: []string{"10.0.0.1"}, Conditions: ready, NodeName: ptr.To("n"), Hints: hints,
				TargetRef: &corev1.ObjectReference{Kind: "Pod", Name: "pod", UID: "4-5-6"}, Hostname: ptr.To("h"), Zone: ptr.To("z"), DeprecatedTopology: map[string]string{"a": "b"},
			}}},
			&discoveryv1.EndpointSlice{ObjectMeta: lean, Endpoints: []discoveryv1.Endpoint{{
				Addresses: []string{"10.0.0.1"}, Conditions: ready, NodeName: ptr.To("n"), Hints: hints,
				TargetRef: &corev1.ObjectReference{Name: "pod"},
			}}},
		},
		"Node": {
			&corev1.Node{
				ObjectMeta: *ballast.DeepCopy(),
				Spec:       corev1.NodeSpec{PodCIDR: "10.0.0.0/24", PodCIDRs: []string{"10.0.0.0/24"}, Taints: taints, ProviderID: "p"},
				Status:     corev1.NodeStatus{Addresses: addresses, Images: []corev1.ContainerImage{{SizeBytes: 1}}, Conditions: []corev1.NodeCondition{{Type: "Ready"}}},
			},
			&corev1.Node{
				ObjectMeta: lean,
				Spec:       corev1.NodeSpec{PodCIDR: "10.0.0.0/24", PodCIDRs: []string{"10.0.0.0/24"}, Taints: taints},
				Status:     corev1.NodeStatus{Addresses: addresses},
			},
		},
		"ServiceCIDR": {
			&networkingv1.ServiceCIDR{ObjectMeta: *ballast.DeepCopy(), Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16"}}, Status: networkingv1.ServiceCIDRStatus{Conditions: []metav1.Condition{{Type: "Ready"}}}},
			&networkingv1.ServiceCIDR{ObjectMeta: lean, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16"}}},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := trim(tt.in)
			if diff := cmp.Diff(tt.want, got); diff != "" || err != nil {
				t.Errorf("trimmed (-want +got), %v:\n%s", err, diff)
			}
		})
	}
	if _, err := trim(&corev1.Pod{}); err == nil {
		t.Error("a Pod was trimmed without an error")
	}
}
