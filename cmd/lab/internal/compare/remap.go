// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
)

// Dump makes cases of the Services of a cluster, as `kubectl get
// services,endpointslices,nodes -A -o yaml` prints them. Nodes, Pods, ports and addresses
// become those of the lab: the Node called thisNode, or else the first, becomes node1, and
// all others node2. Notes say what the lab cannot show.
func Dump(r io.Reader, thisNode string) (cases []Case, notes []string, err error) {
	objects, err := readObjects(r)
	if err != nil {
		return nil, nil, err
	}
	m := remapper{nodes: map[string]string{}, nodeAddrs: map[netip.Addr]string{}, zones: map[string]string{}, nodePorts: map[int32]bool{}}
	if err := m.mapNodes(objects, thisNode); err != nil {
		return nil, nil, err
	}
	slicesOf := map[string][]*discoveryv1.EndpointSlice{}
	for _, o := range objects {
		if s, ok := o.(*discoveryv1.EndpointSlice); ok {
			key := s.Namespace + "/" + s.Labels[discoveryv1.LabelServiceName]
			slicesOf[key] = append(slicesOf[key], s)
		}
	}
	for _, o := range objects {
		s, ok := o.(*corev1.Service)
		if !ok || s.Namespace == metav1.NamespaceDefault && s.Name == "kubernetes" {
			continue // the lab's API server has its own
		}
		if len(cases) == maxCases {
			m.note("only the first %d Services are compared", maxCases)
			break
		}
		key := s.Namespace + "/" + s.Name
		cases = append(cases, m.mapCase(len(cases), s, slicesOf[key]))
	}
	if len(cases) == 0 {
		return nil, nil, errors.New("no Services to compare")
	}
	return cases, m.notes, nil
}

func readObjects(r io.Reader) (all []runtime.Object, err error) {
	err = eachDocument(r, func(text []byte) error {
		objects, err := decodeList(text)
		all = append(all, objects...)
		return err
	})
	return all, err
}

type remapper struct {
	nodes     map[string]string     // dumped name -> node1 or node2
	nodeAddrs map[netip.Addr]string // dumped address -> node1 or node2
	zones     map[string]string     // dumped zone -> the lab's
	nodePorts map[int32]bool        // given to a case
	notes     []string
}

func (m *remapper) note(format string, args ...any) {
	m.notes = append(m.notes, fmt.Sprintf(format, args...))
}

// mapNodes maps the zone of this node to zone-1, and all others to zone-2.
func (m *remapper) mapNodes(objects []runtime.Object, thisNode string) error {
	var nodes []*corev1.Node
	for _, o := range objects {
		if n, ok := o.(*corev1.Node); ok {
			nodes = append(nodes, n)
		}
	}
	first := max(0, slices.IndexFunc(nodes, func(n *corev1.Node) bool { return n.Name == thisNode }))
	if len(nodes) == 0 || thisNode != "" && nodes[first].Name != thisNode {
		return fmt.Errorf("the objects have no Node %s", thisNode)
	}
	m.note("%s becomes node1, and the %d others node2", nodes[first].Name, len(nodes)-1)
	m.zones[nodes[first].Labels[corev1.LabelTopologyZone]] = testbed.ZoneOf("node1")
	for i, n := range nodes {
		name := "node2"
		if i == first {
			name = "node1"
		}
		m.nodes[n.Name] = name
		for _, a := range n.Status.Addresses {
			if addr, err := netip.ParseAddr(a.Address); err == nil {
				m.nodeAddrs[addr] = name
			}
		}
	}
	return nil
}

func (m *remapper) zone(dumped string) string {
	if z, ok := m.zones[dumped]; ok && dumped != "" {
		return z
	}
	return testbed.ZoneOf("node2")
}

// endpointMap maps the endpoints of one Service.
type endpointMap struct {
	*remapper
	service string
	hosts   map[string]string // dumped address -> host
	used    map[string]int    // node -> Pods given away
	targets map[int32]int32
}

func (m *remapper) mapCase(id int, dumped *corev1.Service, dumpedSlices []*discoveryv1.EndpointSlice) Case {
	e := endpointMap{m, dumped.Namespace + "/" + dumped.Name, map[string]string{}, map[string]int{}, map[int32]int32{}}
	s := State{Service: m.mapService(id, dumped)}
	for _, d := range dumpedSlices {
		s.Slices = append(s.Slices, e.mapSlice(d))
	}
	return Case{Name: dumped.Namespace + "-" + dumped.Name, States: []State{s}}
}

func cleanMeta(o metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: o.Name, Namespace: o.Namespace, Labels: o.Labels, Annotations: o.Annotations}
}

func (m *remapper) mapService(id int, dumped *corev1.Service) *corev1.Service {
	s := &corev1.Service{ObjectMeta: cleanMeta(dumped.ObjectMeta), Spec: *dumped.Spec.DeepCopy()}
	spec, pairs := &s.Spec, vipsOf(id)
	delete(s.Annotations, "kubectl.kubernetes.io/last-applied-configuration")
	for i, ip := range spec.ClusterIPs {
		if ip != corev1.ClusterIPNone {
			spec.ClusterIPs[i] = like(pairs.cluster, ip)
			spec.ClusterIP = spec.ClusterIPs[0]
		}
	}
	spec.LoadBalancerIP = "" // a wish for the cloud
	spec.ExternalIPs = m.mapVIPs(dumped, "external IPs", spec.ExternalIPs, pairs.external)
	var ips []string
	for _, in := range dumped.Status.LoadBalancer.Ingress {
		if in.IP != "" {
			ips = append(ips, in.IP)
		}
	}
	ips = m.mapVIPs(dumped, "load-balancer IPs", ips, pairs.balancer)
	for _, in := range dumped.Status.LoadBalancer.Ingress {
		if in.IP != "" {
			if in.IP = like(pairs.balancer, in.IP); !slices.Contains(ips, in.IP) {
				continue
			}
			ips = slices.DeleteFunc(ips, func(ip string) bool { return ip == in.IP })
		}
		s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: in.IP, Hostname: in.Hostname, IPMode: in.IPMode})
	}
	for i, r := range spec.LoadBalancerSourceRanges {
		spec.LoadBalancerSourceRanges[i] = m.mapRange(dumped, i, r)
	}
	m.mapNodePorts(id, s)
	return s
}

// mapVIPs has one address of each family: a further one cannot be mapped.
func (m *remapper) mapVIPs(s *corev1.Service, what string, dumped []string, to netlab.Pair) []string {
	var mapped []string
	for _, ip := range dumped {
		mapped = add(mapped, like(to, ip))
	}
	if left := len(dumped) - len(mapped); left > 0 {
		m.note("%s/%s: %d of its %s are not mapped", s.Namespace, s.Name, left, what)
	}
	return mapped
}

// like is the address of the same family.
func like(p netlab.Pair, dumped string) string {
	if a, err := netip.ParseAddr(dumped); err == nil && a.Is6() {
		return p.V6.String()
	}
	return p.V4.String()
}

// mapRange gives each range a part of the lab's clients, and leaves one for everybody.
func (m *remapper) mapRange(s *corev1.Service, i int, dumped string) string {
	p, err := netip.ParsePrefix(dumped)
	if err != nil || p.Bits() == 0 {
		return dumped
	}
	all := []netlab.PrefixPair{netlab.ClientNetwork, netlab.NodeNetwork, netlab.PodNetwork, netlab.ClientNetwork2}
	to := all[i%len(all)].V4
	if p.Addr().Is6() {
		to = all[i%len(all)].V6
	}
	m.note("%s/%s: the source range %s becomes %s", s.Namespace, s.Name, dumped, to)
	return to.String()
}

// mapNodePorts lets Services have three NodePorts at most, health checks included.
func (m *remapper) mapNodePorts(id int, s *corev1.Service) {
	n := 0
	for i := range s.Spec.Ports {
		p := &s.Spec.Ports[i]
		switch {
		case p.NodePort == 0:
		case n < 2:
			p.NodePort = nodePortOf(id, n)
			n++
		default:
			m.note("%s/%s: the NodePort %d is not mapped", s.Namespace, s.Name, p.NodePort)
			s.Spec.Ports = s.Spec.Ports[:i]
			return
		}
	}
	if s.Spec.HealthCheckNodePort != 0 {
		s.Spec.HealthCheckNodePort = nodePortOf(id, 2)
	}
}

func (e *endpointMap) mapSlice(dumped *discoveryv1.EndpointSlice) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{ObjectMeta: cleanMeta(dumped.ObjectMeta), AddressType: dumped.AddressType}
	for _, p := range dumped.Ports {
		if p.Port != nil {
			port := e.target(*p.Port)
			p.Port = &port
		}
		s.Ports = append(s.Ports, p)
	}
	if dumped.AddressType == discoveryv1.AddressTypeFQDN {
		s.Endpoints = dumped.Endpoints
		return s
	}
	for _, d := range dumped.Endpoints {
		if mapped, ok := e.mapEndpoint(d); ok {
			s.Endpoints = append(s.Endpoints, mapped)
		}
	}
	if left := len(dumped.Endpoints) - len(s.Endpoints); left > 0 {
		e.note("%s: the lab has no Pods for %d endpoints of %s", e.service, left, dumped.Name)
	}
	return s
}

func (e *endpointMap) target(dumped int32) int32 {
	if e.targets[dumped] == 0 {
		e.targets[dumped] = int32(serverPorts[len(e.targets)%len(serverPorts)])
	}
	return e.targets[dumped]
}

func (e *endpointMap) mapEndpoint(dumped discoveryv1.Endpoint) (discoveryv1.Endpoint, bool) {
	mapped := *dumped.DeepCopy()
	mapped.TargetRef, mapped.Hostname = nil, nil
	node := "node2"
	if dumped.NodeName != nil {
		if name, ok := e.nodes[*dumped.NodeName]; ok {
			node = name
		}
		mapped.NodeName = &node
	}
	host, ok := e.host(dumped.Addresses[0], node)
	if !ok {
		return mapped, false
	}
	mapped.Addresses = []string{like(hostAddr(host), dumped.Addresses[0])}
	if mapped.Zone != nil {
		zone := e.zone(*mapped.Zone)
		mapped.Zone = &zone
	}
	if mapped.Hints != nil {
		for i := range mapped.Hints.ForZones {
			mapped.Hints.ForZones[i].Name = e.zone(mapped.Hints.ForZones[i].Name)
		}
		for i, n := range mapped.Hints.ForNodes {
			if mapped.Hints.ForNodes[i].Name = e.nodes[n.Name]; mapped.Hints.ForNodes[i].Name == "" {
				mapped.Hints.ForNodes[i].Name = "node2"
			}
		}
	}
	return mapped, true
}

// host is the Pod that stands for an endpoint's address, or the node itself.
func (e *endpointMap) host(address, node string) (string, bool) {
	if host, ok := e.hosts[address]; ok {
		return host, true
	}
	if a, err := netip.ParseAddr(address); err == nil && e.nodeAddrs[a] != "" {
		return e.nodeAddrs[a], true
	}
	family := address
	if a, err := netip.ParseAddr(address); err == nil {
		family = node + map[bool]string{true: "IPv4", false: "IPv6"}[a.Is4()]
	}
	var free []string
	for _, p := range pods {
		if p.Node == node && p.Name != "pod-x" {
			free = append(free, p.Name)
		}
	}
	n := e.used[family]
	if n == len(free) {
		return "", false
	}
	e.used[family], e.hosts[address] = n+1, free[n]
	return free[n], true
}
