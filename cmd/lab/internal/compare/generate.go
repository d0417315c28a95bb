// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
)

// kind is the type of a Service, with headless as one of its own.
type kind int

const (
	clusterIP kind = iota
	nodePort
	loadBalancer
	headless
	externalName
)

// draft is a random Service before it becomes objects.
type draft struct {
	id                 int
	pairs              vips
	kind               kind
	families           []corev1.IPFamily
	ports              []portDraft
	internal, external bool // whether the traffic policy is Local
	ranges             []string
	sticky             bool
	distribution       string
	externalIPs        bool
	ingress            []ingress
	noNodePorts        bool
	endpoints          []endpointDraft
	deleted            bool
	withoutSlices      bool
}

type portDraft struct {
	name             string
	protocol         corev1.Protocol
	number, nodePort int32
	target           int32
}

type ingress struct {
	mode     *corev1.LoadBalancerIPMode
	hostname bool
}

type endpointDraft struct {
	host       string
	conditions discoveryv1.EndpointConditions
	noNode     bool
	zones      []string
	nodes      []string
	slice      int
}

// Generate makes n random cases of two states each. Case i depends on the seed and i
// alone. sctp allows that protocol.
func Generate(seed uint64, n int, sctp bool) ([]Case, error) {
	if n < 1 || n > maxCases {
		return nil, fmt.Errorf("%d random Services: must be 1 to %d", n, maxCases)
	}
	cases := make([]Case, n)
	for i := range cases {
		g := generator{rand.New(rand.NewPCG(seed, uint64(i))), sctp}
		d := g.draft(i)
		cases[i] = Case{Name: d.name(), States: []State{d.state()}}
		for range 1 + g.IntN(2) {
			g.change(&d)
		}
		cases[i].States = append(cases[i].States, d.state())
	}
	return cases, nil
}

type generator struct {
	*rand.Rand
	sctp bool
}

func (g generator) chance(percent int) bool { return g.IntN(100) < percent }

func oneOf[T any](g generator, all ...T) T { return all[g.IntN(len(all))] }

func (g generator) draft(id int) draft {
	d := draft{id: id, pairs: vipsOf(id)}
	d.kind = oneOf(g, clusterIP, clusterIP, clusterIP, nodePort, nodePort, nodePort, loadBalancer, loadBalancer,
		loadBalancer, loadBalancer, loadBalancer, headless, externalName)
	v4, v6 := corev1.IPv4Protocol, corev1.IPv6Protocol
	d.families = oneOf(g, []corev1.IPFamily{v4}, []corev1.IPFamily{v6}, []corev1.IPFamily{v4, v6}, []corev1.IPFamily{v6, v4})
	d.ports = g.portDrafts(id)
	d.internal, d.external = g.chance(30), g.chance(45)
	d.ranges = g.sourceRanges()
	d.sticky = g.chance(20)
	d.distribution = oneOf(g, "", "", corev1.ServiceTrafficDistributionPreferClose, corev1.ServiceTrafficDistributionPreferSameNode)
	d.externalIPs = g.chance(30)
	d.ingress = g.ingresses()
	d.noNodePorts = g.chance(15)
	d.withoutSlices = g.chance(4)
	d.endpoints = g.endpoints()
	return d
}

func (g generator) protocol() corev1.Protocol {
	protocols := []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolTCP, corev1.ProtocolUDP}
	if g.sctp {
		protocols = append(protocols, corev1.ProtocolSCTP)
	}
	return oneOf(g, protocols...)
}

// portDrafts also makes Services like DNS, with one number for two protocols.
func (g generator) portDrafts(id int) []portDraft {
	first := portDraft{protocol: g.protocol(), number: 80, nodePort: nodePortOf(id, 0), target: oneOf[int32](g, 8080, 8081)}
	if g.chance(50) {
		return []portDraft{first}
	}
	first.name = "first"
	second := portDraft{name: "second", protocol: g.protocol(), number: 81, nodePort: nodePortOf(id, 1), target: oneOf[int32](g, 8080, 8081)}
	if second.protocol != first.protocol && g.chance(50) {
		second.number, second.nodePort = first.number, first.nodePort
	}
	return []portDraft{first, second}
}

// sourceRanges chooses ranges that divide the lab's hosts.
func (g generator) sourceRanges() []string {
	if g.chance(60) {
		return nil
	}
	var all []string
	for range 1 + g.IntN(3) {
		p := oneOf(g, netlab.ClientNetwork, netlab.ClientNetwork2, netlab.NodeNetwork, netlab.NodePodNetwork("node1"), netlab.NodePodNetwork("node2"))
		all = append(all, oneOf(g, p.V4, p.V6).String())
	}
	if g.chance(15) {
		all = append(all, oneOf(g, "0.0.0.0/0", "::/0"))
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func (g generator) ingresses() []ingress {
	vip, proxy := corev1.LoadBalancerIPModeVIP, corev1.LoadBalancerIPModeProxy
	return oneOf(g, nil, []ingress{{}}, []ingress{{}}, []ingress{{mode: &vip}}, []ingress{{mode: &vip}}, []ingress{{mode: &proxy}}, []ingress{{hostname: true}})
}

var endpointHosts = []string{"pod-a", "pod-b", "pod-c", "pod-d", "node1", "node2"}

func (g generator) endpoints() []endpointDraft {
	hosts := slices.Clone(endpointHosts[:4])
	if g.chance(15) {
		hosts = slices.Clone(endpointHosts)
	}
	g.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
	hosts = hosts[:oneOf(g, 0, 1, 1, 2, 2, 3, 4)]
	hints := oneOf(g, "", "", "zones", "nodes", "both")
	partial := g.chance(20)
	all := make([]endpointDraft, len(hosts))
	for i, host := range hosts {
		all[i] = endpointDraft{host: host, conditions: g.conditions(), noNode: g.chance(4), slice: g.IntN(2)}
		if partial && g.chance(50) {
			continue
		}
		if hints == "zones" || hints == "both" {
			all[i].zones = oneOf(g, []string{"zone-1"}, []string{"zone-2"}, []string{"zone-1", "zone-2"})
		}
		if hints == "nodes" || hints == "both" {
			all[i].nodes = []string{oneOf(g, "node1", "node2")}
		}
	}
	return all
}

// conditions are those that the EndpointSlice controller writes, and sometimes any
// others.
func (g generator) conditions() discoveryv1.EndpointConditions {
	yes, no := true, false
	switch n := g.IntN(100); {
	case n < 60:
		return discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes, Terminating: &no}
	case n < 70:
		return discoveryv1.EndpointConditions{}
	case n < 82:
		return discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}
	case n < 87:
		return discoveryv1.EndpointConditions{Ready: &no, Serving: &no, Terminating: &yes}
	case n < 92:
		return discoveryv1.EndpointConditions{Ready: &no, Serving: &no, Terminating: &no}
	}
	return discoveryv1.EndpointConditions{
		Ready: oneOf(g, nil, &yes, &no), Serving: oneOf(g, nil, &yes, &no), Terminating: oneOf(g, nil, &yes, &no),
	}
}

// change changes one thing of a draft.
func (g generator) change(d *draft) {
	changes := []func(){
		func() { d.endpoints = g.endpoints() },
		func() { g.shiftConditions(d.endpoints) },
		func() { d.internal = !d.internal },
		func() { d.external = !d.external },
		func() { d.ranges = g.sourceRanges() },
		func() { d.sticky = !d.sticky },
		func() { d.externalIPs = !d.externalIPs },
		func() { d.ingress = g.ingresses() },
		func() { d.ports = g.portDrafts(d.id) },
		func() { d.withoutSlices = !d.withoutSlices },
		func() { d.deleted = true },
		func() { d.kind = g.otherKind(d.kind) },
		func() { d.families = otherFamilies(d.families) },
	}
	changes[g.IntN(len(changes))]()
}

func (g generator) shiftConditions(endpoints []endpointDraft) {
	for i := range endpoints {
		if g.chance(60) {
			endpoints[i].conditions = g.conditions()
		}
	}
}

// otherKind is a type that the API lets a Service change to.
func (g generator) otherKind(k kind) kind {
	if k == headless || k == externalName {
		return k
	}
	return oneOf(g, clusterIP, nodePort, loadBalancer, externalName)
}

// otherFamilies adds or removes the second family: the first is immutable.
func otherFamilies(families []corev1.IPFamily) []corev1.IPFamily {
	if len(families) == 2 {
		return families[:1]
	}
	if families[0] == corev1.IPv4Protocol {
		return []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
	}
	return []corev1.IPFamily{corev1.IPv6Protocol, corev1.IPv4Protocol}
}

func (d *draft) name() string { return fmt.Sprintf("case-%d", d.id) }

func (d *draft) state() State {
	var s State
	if !d.deleted {
		s.Service = d.service()
	}
	if !d.withoutSlices && d.kind != externalName {
		s.Slices = d.slices()
	}
	return s
}

func (d *draft) service() *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Name: d.name(), Namespace: metav1.NamespaceDefault,
			Annotations: map[string]string{probeAnnotation: d.probes()},
		},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, SessionAffinity: corev1.ServiceAffinityNone},
	}
	spec := &s.Spec
	for _, p := range d.ports {
		spec.Ports = append(spec.Ports, corev1.ServicePort{Name: p.name, Protocol: p.protocol, Port: p.number, TargetPort: intstr.FromInt32(p.target)})
	}
	if d.kind == externalName {
		spec.Type, spec.ExternalName = corev1.ServiceTypeExternalName, "example.com"
		return s
	}
	d.addresses(spec)
	if d.sticky {
		spec.SessionAffinity = corev1.ServiceAffinityClientIP
	}
	if d.distribution != "" {
		spec.TrafficDistribution = &d.distribution
	}
	policy := corev1.ServiceInternalTrafficPolicyCluster
	if d.internal {
		policy = corev1.ServiceInternalTrafficPolicyLocal
	}
	spec.InternalTrafficPolicy = &policy
	if d.kind != headless {
		d.outside(s)
	}
	return s
}

func (d *draft) addresses(spec *corev1.ServiceSpec) {
	policy := corev1.IPFamilyPolicySingleStack
	if len(d.families) == 2 {
		policy = corev1.IPFamilyPolicyRequireDualStack
	}
	spec.IPFamilyPolicy, spec.IPFamilies = &policy, d.families
	if d.kind == headless {
		spec.ClusterIP, spec.ClusterIPs = corev1.ClusterIPNone, []string{corev1.ClusterIPNone}
		return
	}
	for _, f := range d.families {
		spec.ClusterIPs = append(spec.ClusterIPs, ofFamily(d.pairs.cluster, f).String())
	}
	spec.ClusterIP = spec.ClusterIPs[0]
}

// outside fills in how the Service is reached from outside the cluster.
func (d *draft) outside(s *corev1.Service) {
	spec := &s.Spec
	if d.externalIPs {
		for _, f := range d.families {
			spec.ExternalIPs = append(spec.ExternalIPs, ofFamily(d.pairs.external, f).String())
		}
	}
	if d.kind != clusterIP || d.externalIPs {
		spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
		if d.external {
			spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		}
	}
	withNodePorts := d.kind == nodePort || d.kind == loadBalancer && !d.noNodePorts
	for i := range spec.Ports {
		if withNodePorts {
			spec.Ports[i].NodePort = d.ports[i].nodePort
		}
	}
	switch d.kind {
	case nodePort:
		spec.Type = corev1.ServiceTypeNodePort
	case loadBalancer:
		spec.Type = corev1.ServiceTypeLoadBalancer
		spec.AllocateLoadBalancerNodePorts, spec.LoadBalancerSourceRanges = &withNodePorts, d.ranges
		if d.external {
			spec.HealthCheckNodePort = nodePortOf(d.id, 2)
		}
		d.fillIngress(s)
	}
}

func (d *draft) fillIngress(s *corev1.Service) {
	for _, in := range d.ingress {
		if in.hostname {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{Hostname: "lb.example.com"})
			continue
		}
		for _, f := range d.families {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress,
				corev1.LoadBalancerIngress{IP: ofFamily(d.pairs.balancer, f).String(), IPMode: in.mode})
		}
	}
}

// slices are up to two EndpointSlices in each of the Service's families.
func (d *draft) slices() []*discoveryv1.EndpointSlice {
	var all []*discoveryv1.EndpointSlice
	for _, f := range d.families {
		for n := range 2 {
			slice := &discoveryv1.EndpointSlice{
				ObjectMeta: metav1.ObjectMeta{
					Name: fmt.Sprintf("%s-%s-%d", d.name(), strings.ToLower(string(f)), n), Namespace: metav1.NamespaceDefault,
					Labels: map[string]string{discoveryv1.LabelServiceName: d.name()},
				},
				AddressType: discoveryv1.AddressType(f),
			}
			if d.kind == headless {
				slice.Labels[corev1.IsHeadlessService] = ""
			}
			for _, p := range d.ports {
				slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: &p.name, Protocol: &p.protocol, Port: &p.target})
			}
			for _, e := range d.endpoints {
				if e.slice == n {
					slice.Endpoints = append(slice.Endpoints, e.endpoint(f))
				}
			}
			if len(slice.Endpoints) > 0 {
				all = append(all, slice)
			}
		}
	}
	return all
}

func (e *endpointDraft) endpoint(f corev1.IPFamily) discoveryv1.Endpoint {
	out := discoveryv1.Endpoint{Addresses: []string{ofFamily(hostAddr(e.host), f).String()}, Conditions: e.conditions}
	node := nodeOf(e.host)
	zone := testbed.ZoneOf(node)
	out.Zone = &zone
	if !e.noNode {
		out.NodeName = &node
	}
	if len(e.zones)+len(e.nodes) > 0 {
		out.Hints = &discoveryv1.EndpointHints{}
	}
	for _, z := range e.zones {
		out.Hints.ForZones = append(out.Hints.ForZones, discoveryv1.ForZone{Name: z})
	}
	for _, n := range e.nodes {
		out.Hints.ForNodes = append(out.Hints.ForNodes, discoveryv1.ForNode{Name: n})
	}
	return out
}

// probes are the value of probeAnnotation: addresses and NodePorts that the Service has
// in some state, or never.
func (d *draft) probes() string {
	var words []string
	for _, p := range []netlab.Pair{d.pairs.cluster, d.pairs.external, d.pairs.balancer} {
		words = append(words, p.V4.String(), p.V6.String())
	}
	for i := range 2 {
		words = append(words, fmt.Sprint(nodePortOf(d.id, i)))
	}
	return strings.Join(words, " ")
}

func ofFamily(p netlab.Pair, f corev1.IPFamily) netip.Addr {
	if f == corev1.IPv4Protocol {
		return p.V4
	}
	return p.V6
}
