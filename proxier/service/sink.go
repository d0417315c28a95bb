package service

import "k8s.io/apimachinery/pkg/runtime"

// Sink is told about objects by a source. The objects are *corev1.Service,
// *discoveryv1.EndpointSlice, *corev1.Node and *networkingv1.ServiceCIDR; any
// other is ignored. A source hands an object over and never changes it
// afterwards. Calls may come from any goroutine and never block for long.
type Sink interface {
	// Apply says that the object exists in this form now.
	Apply(obj runtime.Object)
	// Delete says that the object is gone; only its kind, namespace and name
	// are looked at.
	Delete(obj runtime.Object)
	// Synced says that everything that existed when the source started has
	// been applied. Nothing is programmed before that, so that a node which
	// restarts never serves half of its Services. Only the first call counts.
	Synced()
}
