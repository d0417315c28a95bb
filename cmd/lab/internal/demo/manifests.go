// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/ptr"

	"signalbox/internal/netlab"

	"signalbox/proxier/plan"
)

// service is one Service that is probed. It listens on port 80 over TCP and UDP
// in both families, and sends to port 8080 of its Pods.
type service struct {
	name string
	// number is the last part of its cluster IPs and load-balancer IPs.
	number   int
	nodePort int32 // also asks for a load-balancer IP; 0 for neither
	local    bool  // externalTrafficPolicy: Local
	sticky   bool  // sessionAffinity: ClientIP
	pods     []string
}

const (
	namespace   = "demo"
	servicePort = 80
	podPort     = 8080
)

var allPods = []string{"pod-a", "pod-b", "pod-c", "pod-d"}

var (
	web      = service{name: "web", number: 10, nodePort: 30080, pods: allPods}
	webLocal = service{name: "web-local", number: 11, nodePort: 30081, local: true, pods: allPods}
	sticky   = service{name: "sticky", number: 12, sticky: true, pods: allPods}
	single   = service{name: "single", number: 13, pods: []string{"pod-b"}}
	empty    = service{name: "empty", number: 14}
	moving   = service{name: "moving", number: 15, pods: []string{"pod-a"}}
)

var services = []service{web, webLocal, sticky, single, empty, moving}

// at is where the Service is reached; node is the address of the node, for a
// NodePort.
func (s *service) at(kind plan.FrontendKind, f plan.Family, node netip.Addr) netip.AddrPort {
	switch kind {
	case plan.NodePort:
		return netip.AddrPortFrom(node, uint16(s.nodePort))
	case plan.LoadBalancerIP:
		return netip.AddrPortFrom(netlab.Nth(netlab.ExternalNetwork.Of(f), s.number), servicePort)
	}
	return netip.AddrPortFrom(netlab.Nth(netlab.ServiceNetwork.Of(f), s.number), servicePort)
}

// layout is what the manifests must know about the lab.
type layout struct {
	families []plan.Family
	nodes    map[string]netlab.Pair // by name
	pods     map[string]pod         // by name
}

type pod struct {
	node string
	addr netlab.Pair
}

// manifest is a file of one or more objects.
type manifest struct {
	name    string
	objects []runtime.Object
}

// movingManifest is the file that holds only the EndpointSlice of the moving
// Service in one family, so that a change of it is a change of nothing else.
func (l *layout) movingManifest(f plan.Family, podName string) manifest {
	s := moving
	s.pods = []string{podName}
	return manifest{fmt.Sprintf("moving-%s.yaml", f), []runtime.Object{l.slice(&s, f)}}
}

// perFile is how many further Services share a file.
const perFile = 100

// manifests describes the cluster, the probed Services, and more Services of
// the same four Pods.
func manifests(l layout, more int) []manifest {
	files := []manifest{{"cluster.yaml", []runtime.Object{l.node("node1"), l.node("node2"), l.serviceCIDR()}}}
	for i := range services {
		s := &services[i]
		file := manifest{s.name + ".yaml", []runtime.Object{l.service(s)}}
		for _, f := range l.families {
			if s.name == moving.name {
				files = append(files, l.movingManifest(f, s.pods[0]))
			} else if len(s.pods) > 0 {
				file.objects = append(file.objects, l.slice(s, f))
			}
		}
		files = append(files, file)
	}
	for first := 0; first < more; first += perFile {
		file := manifest{name: fmt.Sprintf("more-%05d.yaml", first)}
		for n := first; n < min(first+perFile, more); n++ {
			s := service{name: fmt.Sprintf("more-%05d", n), pods: allPods}
			file.objects = append(file.objects, l.serviceAt(&s, netlab.ServiceNetwork2, n+1))
			for _, f := range l.families {
				file.objects = append(file.objects, l.slice(&s, f))
			}
		}
		files = append(files, file)
	}
	return files
}

func (l *layout) node(name string) *corev1.Node {
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name},
	}
	for _, f := range l.families {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: l.nodes[name].Of(f).String()})
	}
	return n
}

func (l *layout) serviceCIDR() *networkingv1.ServiceCIDR {
	s := &networkingv1.ServiceCIDR{
		ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"},
	}
	for _, f := range l.families {
		s.Spec.CIDRs = append(s.Spec.CIDRs, netlab.ServiceNetwork.Of(f).String())
	}
	return s
}

func (l *layout) service(s *service) *corev1.Service {
	return l.serviceAt(s, netlab.ServiceNetwork, s.number)
}

func (l *layout) serviceAt(s *service, network netlab.PrefixPair, number int) *corev1.Service {
	o := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: s.name},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP,
			Ports: []corev1.ServicePort{
				{Name: "tcp", Protocol: corev1.ProtocolTCP, Port: servicePort, NodePort: s.nodePort},
				{Name: "udp", Protocol: corev1.ProtocolUDP, Port: servicePort, NodePort: s.nodePort},
			},
		},
	}
	for _, f := range l.families {
		o.Spec.ClusterIPs = append(o.Spec.ClusterIPs, netlab.Nth(network.Of(f), number).String())
		o.Spec.IPFamilies = append(o.Spec.IPFamilies, corev1.IPFamily(f.String()))
	}
	o.Spec.ClusterIP = o.Spec.ClusterIPs[0]
	o.Spec.IPFamilyPolicy = ptr.To(corev1.IPFamilyPolicySingleStack)
	if len(l.families) > 1 {
		o.Spec.IPFamilyPolicy = ptr.To(corev1.IPFamilyPolicyRequireDualStack)
	}
	if s.sticky {
		o.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
	}
	if s.nodePort != 0 {
		l.loadBalance(s, o)
	}
	return o
}

func (l *layout) loadBalance(s *service, o *corev1.Service) {
	o.Spec.Type = corev1.ServiceTypeLoadBalancer
	o.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
	if s.local {
		o.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	}
	for _, f := range l.families {
		o.Status.LoadBalancer.Ingress = append(o.Status.LoadBalancer.Ingress,
			corev1.LoadBalancerIngress{IP: netlab.Nth(netlab.ExternalNetwork.Of(f), s.number).String()})
	}
}

func (l *layout) slice(s *service, f plan.Family) *discoveryv1.EndpointSlice {
	o := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: fmt.Sprintf("%s-ipv%d", s.name, f),
			Labels: map[string]string{discoveryv1.LabelServiceName: s.name},
		},
		AddressType: discoveryv1.AddressType(f.String()),
		Ports: []discoveryv1.EndpointPort{
			{Name: ptr.To("tcp"), Protocol: ptr.To(corev1.ProtocolTCP), Port: ptr.To[int32](podPort)},
			{Name: ptr.To("udp"), Protocol: ptr.To(corev1.ProtocolUDP), Port: ptr.To[int32](podPort)},
		},
	}
	for _, name := range s.pods {
		p := l.pods[name]
		o.Endpoints = append(o.Endpoints, discoveryv1.Endpoint{
			Addresses:  []string{p.addr.Of(f).String()},
			NodeName:   ptr.To(p.node),
			Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true)},
		})
	}
	return o
}
