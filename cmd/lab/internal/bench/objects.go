package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/utils/ptr"

	"signalbox/internal/netlab"
	"signalbox/proxier/plan"
)

const (
	namespace = metav1.NamespaceDefault
	// bulkPort is where the Pod answers that holds the addresses of all endpoints.
	bulkPort = 9090
	// movingPort is where every Pod of a lab answers with its name.
	movingPort = 8080
	// firstService is the place of the first cluster IP in the range. The API server
	// gives Services without an address the lower ones.
	firstService = 4096
	// writers is how many requests create objects at the same time.
	writers = 16
)

// endpointRanges hold the addresses of the endpoints. They are none of a node's.
var endpointRanges = map[plan.Family]netip.Prefix{
	plan.IPv4: netip.MustParsePrefix("10.0.0.0/10"),
	plan.IPv6: netip.MustParsePrefix("fd00:10:128::/48"),
}

// objects are the Services of one size in the API, and their EndpointSlices.
type objects struct {
	client   kubernetes.Interface
	families []plan.Family
	services int
	perSlice int
	// slices are those of the Services, by family and number.
	slices map[plan.Family][]*discoveryv1.EndpointSlice
	// moving are the slices of the Service whose endpoint moves between two Pods.
	moving map[plan.Family]*discoveryv1.EndpointSlice
	spare  int // addresses given to endpoints that moved
	random *rand.Rand
}

// clusterIP is the address of Service number n; the moving Service comes after the others.
func (o *objects) clusterIP(f plan.Family, n int) netip.Addr {
	return netlab.Nth(netlab.ServiceNetwork.Of(f), firstService+n)
}

func (o *objects) create(ctx context.Context, lab *netlab.Lab) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(writers)
	for n := range o.services + 1 {
		group.Go(func() error {
			_, err := o.client.CoreV1().Services(namespace).Create(ctx, o.service(n), metav1.CreateOptions{})
			return err
		})
	}
	for _, f := range o.families {
		o.slices[f] = make([]*discoveryv1.EndpointSlice, o.services)
		for n := range o.services {
			group.Go(func() (err error) {
				o.slices[f][n], err = o.client.DiscoveryV1().EndpointSlices(namespace).Create(ctx, o.slice(f, n), metav1.CreateOptions{})
				return err
			})
		}
		moving := o.emptySlice(f, o.services, movingPort)
		moving.Endpoints = []discoveryv1.Endpoint{endpointAt(lab.Host(movingPods[0]).Addr.Of(f), "node1")}
		var err error
		if o.moving[f], err = o.client.DiscoveryV1().EndpointSlices(namespace).Create(ctx, moving, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	return group.Wait()
}

func serviceName(n int) string { return fmt.Sprintf("bench-%05d", n) }

func (o *objects) service(n int) *corev1.Service {
	port := bulkPort
	if n == o.services {
		port = movingPort
	}
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: serviceName(n)},
		Spec: corev1.ServiceSpec{
			IPFamilyPolicy: ptr.To(corev1.IPFamilyPolicySingleStack),
			Ports:          []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt(port)}},
		},
	}
	if len(o.families) > 1 {
		s.Spec.IPFamilyPolicy = ptr.To(corev1.IPFamilyPolicyRequireDualStack)
	}
	for _, f := range o.families {
		s.Spec.IPFamilies = append(s.Spec.IPFamilies, corev1.IPFamily(f.String()))
		s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, o.clusterIP(f, n).String())
	}
	s.Spec.ClusterIP = s.Spec.ClusterIPs[0]
	return s
}

func (o *objects) emptySlice(f plan.Family, n, port int) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("%s-%s", serviceName(n), map[plan.Family]string{plan.IPv4: "v4", plan.IPv6: "v6"}[f]),
			Labels: map[string]string{
				discoveryv1.LabelServiceName: serviceName(n), discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io",
			},
		},
		AddressType: discoveryv1.AddressType(f.String()),
		Ports:       []discoveryv1.EndpointPort{{Name: ptr.To("http"), Port: ptr.To(int32(port)), Protocol: ptr.To(corev1.ProtocolTCP)}},
	}
}

func (o *objects) slice(f plan.Family, n int) *discoveryv1.EndpointSlice {
	s := o.emptySlice(f, n, bulkPort)
	for i := range o.perSlice {
		number := n*o.perSlice + i
		s.Endpoints = append(s.Endpoints, endpointAt(netlab.Nth(endpointRanges[f], number+1), nodeOf(number)))
	}
	return s
}

// nodeOf spreads endpoints over a hundred nodes. A node with a hundred thousand Pods does
// not exist.
func nodeOf(endpoint int) string { return fmt.Sprintf("node%d", 1+endpoint%100) }

func endpointAt(a netip.Addr, node string) discoveryv1.Endpoint {
	return discoveryv1.Endpoint{
		Addresses: []string{a.String()}, NodeName: &node,
		Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true), Serving: ptr.To(true), Terminating: ptr.To(false)},
	}
}

// move sends the moving Service of a family to a Pod.
func (o *objects) move(ctx context.Context, f plan.Family, to netip.Addr) error {
	s := o.moving[f].DeepCopy()
	s.Endpoints[0] = endpointAt(to, "node1")
	s, err := o.client.DiscoveryV1().EndpointSlices(namespace).Update(ctx, s, metav1.UpdateOptions{})
	if err == nil {
		o.moving[f] = s
	}
	return err
}

// churn gives one endpoint of a random Service another address.
func (o *objects) churn(ctx context.Context) error {
	f, n := o.families[o.random.IntN(len(o.families))], o.random.IntN(o.services)
	s := o.slices[f][n].DeepCopy()
	o.spare++
	a := netlab.Nth(endpointRanges[f], o.services*o.perSlice+o.spare)
	s.Endpoints[o.random.IntN(len(s.Endpoints))] = endpointAt(a, nodeOf(o.spare))
	s, err := o.client.DiscoveryV1().EndpointSlices(namespace).Update(ctx, s, metav1.UpdateOptions{})
	if err == nil {
		o.slices[f][n] = s
	}
	return err
}
