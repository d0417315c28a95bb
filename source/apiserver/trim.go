// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"fmt"
	"maps"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"signalbox/proxier/plan"
)

// The labels and annotations that a proxy reads.
var (
	keptLabels = map[string]bool{
		discoveryv1.LabelServiceName:               true,
		"service.kubernetes.io/service-proxy-name": true,
		corev1.IsHeadlessService:                   true,
		corev1.LabelTopologyZone:                   true,
	}
	keptAnnotations = map[string]bool{
		corev1.EndpointsLastChangeTriggerTime: true,
		plan.AnnotationScheduler:              true,
		plan.AnnotationWeights:                true,
	}
)

// trim removes from an object what no proxy reads, in place: most of its size, and
// all that changes without effect, such as a Node's heartbeat. It is a
// cache.TransformFunc.
func trim(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Service:
		uid := o.UID
		trimMeta(&o.ObjectMeta)
		o.UID = uid // an Event names it
		o.Spec.Selector = nil
		o.Status.Conditions = nil
	case *discoveryv1.EndpointSlice:
		trimMeta(&o.ObjectMeta)
		for i := range o.Endpoints {
			e := &o.Endpoints[i]
			e.Hostname, e.Zone, e.DeprecatedTopology = nil, nil, nil
			if t := e.TargetRef; t != nil {
				e.TargetRef = &corev1.ObjectReference{Name: t.Name}
			}
		}
	case *corev1.Node:
		trimMeta(&o.ObjectMeta)
		o.Spec = corev1.NodeSpec{PodCIDR: o.Spec.PodCIDR, PodCIDRs: o.Spec.PodCIDRs, Taints: o.Spec.Taints}
		o.Status = corev1.NodeStatus{Addresses: o.Status.Addresses}
	case *networkingv1.ServiceCIDR:
		trimMeta(&o.ObjectMeta)
		o.Status = networkingv1.ServiceCIDRStatus{}
	default:
		return nil, fmt.Errorf("the API server sent a %T, which was not requested", obj)
	}
	return obj, nil
}

func trimMeta(m *metav1.ObjectMeta) {
	drop := func(kept map[string]bool) func(string, string) bool {
		return func(k, _ string) bool { return !kept[k] }
	}
	maps.DeleteFunc(m.Labels, drop(keptLabels))
	maps.DeleteFunc(m.Annotations, drop(keptAnnotations))
	*m = metav1.ObjectMeta{
		Namespace: m.Namespace, Name: m.Name, Labels: m.Labels, Annotations: m.Annotations,
		CreationTimestamp: m.CreationTimestamp, DeletionTimestamp: m.DeletionTimestamp,
	}
}
