// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
	"signalbox/proxier/plan"
)

const (
	namespace = metav1.NamespaceDefault
	// othersPort is where othersPod answers.
	othersPort = 9090
	// movingPort is where every Pod of a lab answers with its name.
	movingPort = 8080
	// firstService is the place of the first cluster IP in the range. The API server
	// gives Services without an address the lower ones.
	firstService = 4096
)

// endpointRanges hold the addresses of the endpoints. They are none of a node's.
var endpointRanges = map[plan.Family]netip.Prefix{
	plan.IPv4: netip.MustParsePrefix("10.0.0.0/10"),
	plan.IPv6: netip.MustParsePrefix("fd00:10:128::/48"),
}

// objects are the Services of one size, and their EndpointSlices.
type objects struct {
	*store
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

// fixed is the number of the Service for connections, whose endpoint never changes.
func (o *objects) fixed() int { return o.services + 1 }

// clusterIP is the address of Service number n. The moving Service comes after the others,
// and then the fixed one.
func (o *objects) clusterIP(f plan.Family, n int) netip.Addr {
	return netlab.Nth(netlab.ServiceNetwork.Of(f), firstService+n)
}

func newObjects(s *store, families []plan.Family, size Size) *objects {
	return &objects{
		store: s, families: families, services: size.Services, perSlice: size.Endpoints,
		slices: make(map[plan.Family][]*discoveryv1.EndpointSlice), moving: make(map[plan.Family]*discoveryv1.EndpointSlice),
		random: rand.New(rand.NewPCG(1, uint64(size.Services))),
	}
}

// create writes all objects, with the addresses of a lab.
func (o *objects) create(ctx context.Context, lab *netlab.Lab) error {
	for _, node := range []string{"node1", "node2"} {
		if err := o.writeNode(ctx, testbed.Node(lab.Host(node))); err != nil {
			return err
		}
	}
	for _, n := range []int{o.services, o.fixed()} {
		if err := o.writeService(ctx, o.service(n)); err != nil {
			return err
		}
	}
	var services []*corev1.Service
	for n := range o.services {
		services = append(services, o.service(n))
	}
	var slices []*discoveryv1.EndpointSlice
	for _, f := range o.families {
		moving, fixed := o.slice(f, o.services), o.slice(f, o.fixed())
		moving.Endpoints = []discoveryv1.Endpoint{endpointAt(lab.Host(movingPods[0]).Addr.Of(f), "node1")}
		fixed.Endpoints = []discoveryv1.Endpoint{endpointAt(lab.Host(fixedPod).Addr.Of(f), "node1")}
		var err error
		if o.moving[f], err = o.writeSlice(ctx, moving); err != nil {
			return err
		}
		if _, err = o.writeSlice(ctx, fixed); err != nil {
			return err
		}
		for n := range o.services {
			o.slices[f] = append(o.slices[f], o.fullSlice(f, n))
		}
		slices = append(slices, o.slices[f]...)
	}
	return o.createAll(ctx, services, slices)
}

func serviceName(n int) string { return fmt.Sprintf("bench-%05d", n) }

func (o *objects) service(n int) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: serviceName(n)},
		Spec: corev1.ServiceSpec{
			IPFamilyPolicy: ptr.To(corev1.IPFamilyPolicySingleStack),
			Ports:          o.ports(n),
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

func (o *objects) ports(n int) (ports []corev1.ServicePort) {
	switch n {
	case o.fixed():
		for _, p := range connectionPorts {
			ports = append(ports, servicePort(p.name, p.protocol, p.service, p.pod))
		}
		return ports
	case o.services:
		return []corev1.ServicePort{servicePort("http", corev1.ProtocolTCP, 80, movingPort)}
	}
	return []corev1.ServicePort{servicePort("http", corev1.ProtocolTCP, 80, othersPort)}
}

func servicePort(name string, protocol corev1.Protocol, port, target uint16) corev1.ServicePort {
	return corev1.ServicePort{Name: name, Protocol: protocol, Port: int32(port), TargetPort: intstr.FromInt32(int32(target))}
}

// slice has no endpoints yet.
func (o *objects) slice(f plan.Family, n int) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace,
			Name:      fmt.Sprintf("%s-%s", serviceName(n), map[plan.Family]string{plan.IPv4: "v4", plan.IPv6: "v6"}[f]),
			Labels: map[string]string{
				discoveryv1.LabelServiceName: serviceName(n), discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io",
			},
		},
		AddressType: discoveryv1.AddressType(f.String()),
	}
	for _, p := range o.ports(n) {
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: ptr.To(p.Name), Port: ptr.To(p.TargetPort.IntVal), Protocol: ptr.To(p.Protocol)})
	}
	return s
}

// fullSlice has endpoints that othersPod plays.
func (o *objects) fullSlice(f plan.Family, n int) *discoveryv1.EndpointSlice {
	s := o.slice(f, n)
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
	s, err := o.writeSlice(ctx, s)
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
	s, err := o.writeSlice(ctx, s)
	if err == nil {
		o.slices[f][n] = s
	}
	return err
}
