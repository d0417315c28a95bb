// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/retry"

	"signalbox/internal/cluster"
	"signalbox/internal/netlab"
)

// objects are those of one test. They are gone when it ends, although no
// controller cleans up.
type objects struct {
	t         *testing.T
	client    *kubernetes.Clientset
	lab       *netlab.Lab // where the endpoints are
	namespace string
}

func newObjects(t *testing.T, c *cluster.Cluster, lab *netlab.Lab) *objects {
	t.Helper()
	ns, err := c.Admin().CoreV1().Namespaces().Create(t.Context(),
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "e2e-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	o := &objects{t: t, client: c.Admin(), lab: lab, namespace: ns.Name}
	t.Cleanup(func() {
		if err := o.deleteAll(context.Background()); err != nil {
			t.Errorf("cleaning up: %v", err)
		}
	})
	return o
}

func (o *objects) must(err error) {
	o.t.Helper()
	if err != nil {
		o.t.Fatal(err)
	}
}

// deleteAll leaves the namespace, which only a controller could finish, empty.
func (o *objects) deleteAll(ctx context.Context) error {
	services, err := o.client.CoreV1().Services(o.namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	errs := []error{o.client.DiscoveryV1().EndpointSlices(o.namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{})}
	errs = append(errs, inParallel(len(services.Items), func(i int) error {
		return o.client.CoreV1().Services(o.namespace).Delete(ctx, services.Items[i].Name, metav1.DeleteOptions{})
	}))
	return errors.Join(errs...)
}

// inParallel does n things, a few at a time, as several controllers would.
func inParallel(n int, do func(i int) error) error {
	next := make(chan int)
	errs := make([]error, n)
	var workers sync.WaitGroup
	for range min(n, 8) {
		workers.Go(func() {
			for i := range next {
				errs[i] = do(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	workers.Wait()
	return errors.Join(errs...)
}

// createNode plays the kubelet and the controller that gives out Pod ranges.
func (o *objects) createNode(name string, addr netlab.Pair, podCIDRs netlab.PrefixPair, edit ...func(*corev1.Node)) {
	o.t.Helper()
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name}},
		Spec:       corev1.NodeSpec{PodCIDR: podCIDRs.V4.String(), PodCIDRs: []string{podCIDRs.V4.String(), podCIDRs.V6.String()}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: addr.V4.String()}, {Type: corev1.NodeInternalIP, Address: addr.V6.String()},
		}},
	}
	for _, e := range edit {
		e(node)
	}
	_, err := o.client.CoreV1().Nodes().Create(o.t.Context(), node, metav1.CreateOptions{})
	o.must(err)
	o.t.Cleanup(func() {
		err := o.client.CoreV1().Nodes().Delete(context.Background(), name, metav1.DeleteOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			o.t.Errorf("cleaning up: %v", err)
		}
	})
}

func (o *objects) deleteNode(name string) {
	o.t.Helper()
	o.must(o.client.CoreV1().Nodes().Delete(o.t.Context(), name, metav1.DeleteOptions{}))
}

func (o *objects) updateNode(name string, edit func(*corev1.Node)) {
	o.t.Helper()
	o.must(retry.RetryOnConflict(retry.DefaultRetry, func() error {
		node, err := o.client.CoreV1().Nodes().Get(o.t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		edit(node)
		_, err = o.client.CoreV1().Nodes().Update(o.t.Context(), node, metav1.UpdateOptions{})
		return err
	}))
}

// newService is dual-stack, port 80 of TCP and of UDP.
func newService(name string) *corev1.Service {
	policy := corev1.IPFamilyPolicyRequireDualStack
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.ServiceSpec{
			IPFamilyPolicy: &policy,
			Ports: []corev1.ServicePort{
				{Name: "tcp", Protocol: corev1.ProtocolTCP, Port: 80, TargetPort: intstr.FromInt32(8080)},
				{Name: "udp", Protocol: corev1.ProtocolUDP, Port: 80, TargetPort: intstr.FromInt32(8080)},
			},
		},
	}
}

// createService makes a Service whose endpoints are the named Pods.
func (o *objects) createService(name string, pods []string, edit ...func(*corev1.Service)) *corev1.Service {
	o.t.Helper()
	svc, err := o.tryCreateService(name, edit...)
	o.must(err)
	o.setEndpoints(name, pods)
	return svc
}

// service is a Service as it is now.
func (o *objects) service(name string) *corev1.Service {
	o.t.Helper()
	svc, err := o.client.CoreV1().Services(o.namespace).Get(o.t.Context(), name, metav1.GetOptions{})
	o.must(err)
	return svc
}

// endpointsOf are the Pods that a Service has for endpoints.
func (o *objects) endpointsOf(name string) []string {
	o.t.Helper()
	found, err := o.client.DiscoveryV1().EndpointSlices(o.namespace).Get(o.t.Context(), name+"-ipv4", metav1.GetOptions{})
	o.must(err)
	var pods []string
	for _, e := range found.Endpoints {
		i := slices.IndexFunc(netlab.DefaultPods, func(p netlab.PodSpec) bool { return o.lab.Host(p.Name).Addr.V4.String() == e.Addresses[0] })
		pods = append(pods, netlab.DefaultPods[i].Name)
	}
	return pods
}

// tryCreateService makes a Service without endpoints, if the API server agrees.
func (o *objects) tryCreateService(name string, edit ...func(*corev1.Service)) (*corev1.Service, error) {
	svc := newService(name)
	for _, e := range edit {
		e(svc)
	}
	return o.client.CoreV1().Services(o.namespace).Create(o.t.Context(), svc, metav1.CreateOptions{})
}

func (o *objects) updateService(name string, edit func(*corev1.Service)) *corev1.Service {
	o.t.Helper()
	var out *corev1.Service
	o.must(retry.RetryOnConflict(retry.DefaultRetry, func() error {
		svc, err := o.client.CoreV1().Services(o.namespace).Get(o.t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		edit(svc)
		out, err = o.client.CoreV1().Services(o.namespace).Update(o.t.Context(), svc, metav1.UpdateOptions{})
		return err
	}))
	return out
}

// setLoadBalancerIPs plays the cloud's part.
func (o *objects) setLoadBalancerIPs(svc *corev1.Service, addrs ...netip.Addr) {
	o.t.Helper()
	svc = svc.DeepCopy()
	for _, a := range addrs {
		svc.Status.LoadBalancer.Ingress = append(svc.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a.String()})
	}
	_, err := o.client.CoreV1().Services(o.namespace).UpdateStatus(o.t.Context(), svc, metav1.UpdateOptions{})
	o.must(err)
}

func (o *objects) deleteService(name string) {
	o.t.Helper()
	ctx := o.t.Context()
	o.must(o.client.CoreV1().Services(o.namespace).Delete(ctx, name, metav1.DeleteOptions{}))
	o.must(o.client.DiscoveryV1().EndpointSlices(o.namespace).DeleteCollection(ctx, metav1.DeleteOptions{},
		metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + name}))
}

// setEndpoints plays the EndpointSlice controller: the Service gets a slice per
// family with the named Pods, in place of what it had.
func (o *objects) setEndpoints(service string, pods []string, edit ...func(*discoveryv1.Endpoint)) {
	o.t.Helper()
	for _, family := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		o.must(o.applySlice(o.newSlice(service, family, pods, edit...)))
	}
}

func (o *objects) applySlice(slice *discoveryv1.EndpointSlice) error {
	slices := o.client.DiscoveryV1().EndpointSlices(o.namespace)
	old, err := slices.Get(o.t.Context(), slice.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = slices.Create(o.t.Context(), slice, metav1.CreateOptions{})
		return err
	}
	if err != nil {
		return err
	}
	slice.ResourceVersion = old.ResourceVersion
	_, err = slices.Update(o.t.Context(), slice, metav1.UpdateOptions{})
	return err
}

func (o *objects) newSlice(service string, family discoveryv1.AddressType, pods []string, edit ...func(*discoveryv1.Endpoint)) *discoveryv1.EndpointSlice {
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Name:   service + "-" + strings.ToLower(string(family)),
			Labels: map[string]string{discoveryv1.LabelServiceName: service},
		},
		AddressType: family,
		Ports: []discoveryv1.EndpointPort{
			{Name: ptr("tcp"), Protocol: ptr(corev1.ProtocolTCP), Port: ptr(int32(8080))},
			{Name: ptr("udp"), Protocol: ptr(corev1.ProtocolUDP), Port: ptr(int32(8080))},
		},
	}
	for _, pod := range pods {
		e := discoveryv1.Endpoint{
			Addresses:  []string{addrOf(o.lab.Host(pod), family == discoveryv1.AddressTypeIPv6).String()},
			NodeName:   ptr(nodeOf(pod)),
			Conditions: discoveryv1.EndpointConditions{Ready: ptr(true), Serving: ptr(true), Terminating: ptr(false)},
		}
		for _, change := range edit {
			change(&e)
		}
		slice.Endpoints = append(slice.Endpoints, e)
	}
	return slice
}

func ptr[T any](v T) *T { return &v }

// clusterIP is the Service's address of a family.
func clusterIP(svc *corev1.Service, v6 bool) netip.Addr {
	for _, text := range svc.Spec.ClusterIPs {
		if a := netip.MustParseAddr(text); a.Is6() == v6 {
			return a
		}
	}
	panic(fmt.Sprintf("Service %s has no cluster IP of IPv6=%v: %v", svc.Name, v6, svc.Spec.ClusterIPs))
}

func nodeOf(pod string) string {
	i := slices.IndexFunc(netlab.DefaultPods, func(p netlab.PodSpec) bool { return p.Name == pod })
	return netlab.DefaultPods[i].Node
}
