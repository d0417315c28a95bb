// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
)

// api writes cases to the API server.
type api struct{ client kubernetes.Interface }

// each calls apply for every case, some at once.
func each(cases []Case, apply func(Case) error) error {
	var all errgroup.Group
	all.SetLimit(8)
	for _, c := range cases {
		all.Go(func() error {
			if err := apply(c); err != nil {
				return fmt.Errorf("%s: %w", c.Name, err)
			}
			return nil
		})
	}
	return all.Wait()
}

// move brings the API from one state to another.
func (a api) move(ctx context.Context, from, to State) error {
	if err := a.moveService(ctx, from.Service, to.Service); err != nil {
		return err
	}
	old := map[string]*discoveryv1.EndpointSlice{}
	for _, s := range from.Slices {
		old[s.Name] = s
	}
	for _, s := range to.Slices {
		slices := a.client.DiscoveryV1().EndpointSlices(s.Namespace)
		var err error
		switch was := old[s.Name]; {
		case was == nil:
			_, err = slices.Create(ctx, s, metav1.CreateOptions{})
		case !equality.Semantic.DeepEqual(was, s):
			_, err = slices.Update(ctx, s, metav1.UpdateOptions{})
		}
		if err != nil {
			return err
		}
		delete(old, s.Name)
	}
	for _, s := range old {
		if err := a.client.DiscoveryV1().EndpointSlices(s.Namespace).Delete(ctx, s.Name, metav1.DeleteOptions{}); err != nil {
			return err
		}
	}
	return nil
}

func (a api) moveService(ctx context.Context, from, to *corev1.Service) error {
	if to == nil {
		if from == nil {
			return nil
		}
		return a.client.CoreV1().Services(from.Namespace).Delete(ctx, from.Name, metav1.DeleteOptions{})
	}
	services := a.client.CoreV1().Services(to.Namespace)
	var now *corev1.Service
	var err error
	switch {
	case from == nil:
		now, err = services.Create(ctx, to, metav1.CreateOptions{})
	case !equality.Semantic.DeepEqual(from, to):
		now, err = services.Update(ctx, to, metav1.UpdateOptions{})
	default:
		return nil
	}
	if err != nil {
		return err
	}
	if equality.Semantic.DeepEqual(now.Status.LoadBalancer, to.Status.LoadBalancer) {
		return nil
	}
	now.Status.LoadBalancer = to.Status.LoadBalancer
	_, err = services.UpdateStatus(ctx, now, metav1.UpdateOptions{})
	return err
}

// namespaces creates those of the cases.
func (a api) namespaces(ctx context.Context, cases []Case) error {
	for _, c := range cases {
		for _, s := range c.States {
			if s.Service == nil {
				continue
			}
			ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.Service.Namespace}}
			_, err := a.client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{})
			if err != nil && !apierrors.IsAlreadyExists(err) {
				return err
			}
		}
	}
	return nil
}

// marker is a Service that a proxy serves once it serves all that was written before:
// it comes last in the watches of Services and of EndpointSlices.
func marker(n int) State {
	d := draft{
		id: n, pairs: vips{cluster: markerVIP(n)},
		families:  []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol},
		ports:     []portDraft{{protocol: corev1.ProtocolUDP, number: markerPort, target: int32(serverPorts[0])}},
		endpoints: []endpointDraft{{host: "pod-b"}},
	}
	s := d.state()
	s.Service.Name = fmt.Sprintf("marker-%d", n)
	s.Service.Spec.Ports[0].TargetPort = intstr.FromInt32(int32(serverPorts[0]))
	for _, slice := range s.Slices {
		slice.Name = "marker-" + slice.Name
		slice.Labels[discoveryv1.LabelServiceName] = s.Service.Name
	}
	return s
}

const markerPort = 7000
