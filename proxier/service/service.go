// SPDX-License-Identifier: Apache-2.0

// Package service turns API objects into Service ports of a plan. It alone knows
// traffic policies, topology hints, termination, masquerade, reject and drop.
package service

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/utils/ptr"

	"signalbox/proxier/plan"
)

// svc is a checked Service object, in a form that is small and cheap to compare.
type svc struct {
	name                plan.ServiceName
	created             int64 // Unix seconds, 0 where unknown: decides who owns a frontend that two request
	clusterIPs          []netip.Addr
	externalIPs         []netip.Addr
	loadBalancerIPs     []netip.Addr
	notServedAt         []notServedAt
	sources             []netip.Prefix // of both families
	deniedFamilies      []plan.Family  // every source range of these families was malformed: nobody is admitted
	ports               []servicePort
	internalLocal       bool
	externalLocal       bool
	affinity            time.Duration
	healthCheckNodePort uint16
	scheduler           string // "" for the mode's own
	weights             weightRules
}

// notServedAt is an address at which a Service is not served.
type notServedAt struct {
	addr   netip.Addr
	reason plan.Reason
}

type servicePort struct {
	name     string
	protocol plan.Protocol
	port     uint16
	nodePort uint16
}

func (s *svc) equal(o *svc) bool {
	return s.name == o.name && s.created == o.created &&
		slices.Equal(s.clusterIPs, o.clusterIPs) && slices.Equal(s.externalIPs, o.externalIPs) &&
		slices.Equal(s.loadBalancerIPs, o.loadBalancerIPs) && slices.Equal(s.notServedAt, o.notServedAt) && slices.Equal(s.sources, o.sources) &&
		slices.Equal(s.deniedFamilies, o.deniedFamilies) && slices.Equal(s.ports, o.ports) &&
		s.internalLocal == o.internalLocal && s.externalLocal == o.externalLocal &&
		s.affinity == o.affinity && s.healthCheckNodePort == o.healthCheckNodePort &&
		s.scheduler == o.scheduler && slices.Equal(s.weights, o.weights)
}

// readService returns nil for a Service that no proxy serves: headless,
// ExternalName, without a cluster IP, or handed to another proxy by its label.
func readService(obj *corev1.Service, externalIPCIDRs []netip.Prefix) (*svc, []plan.Problem) {
	p := plan.Problems{Kind: "Service", Object: objectName(obj)}
	if notServed(obj) != plan.NoReason || !validNames(&p, obj, validation.IsDNS1123Label) {
		return nil, p.All()
	}
	s := &svc{
		name:                plan.ServiceName{Namespace: obj.Namespace, Name: obj.Name},
		created:             created(obj),
		clusterIPs:          readClusterIPs(&p, obj),
		ports:               readServicePorts(&p, obj.Spec.Ports),
		affinity:            readAffinity(&p, obj),
		healthCheckNodePort: readHealthCheckNodePort(&p, obj),
		scheduler:           readScheduler(&p, obj),
		weights:             readWeights(&p, obj),
	}
	s.readExternalIPs(&p, obj.Spec.ExternalIPs, externalIPCIDRs)
	s.readIngressIPs(&p, obj.Status.LoadBalancer.Ingress)
	s.readSources(&p, obj.Spec.LoadBalancerSourceRanges)
	s.internalLocal = isLocal(&p, "spec.internalTrafficPolicy", string(ptr.Deref(obj.Spec.InternalTrafficPolicy, "")))
	s.externalLocal = isLocal(&p, "spec.externalTrafficPolicy", string(obj.Spec.ExternalTrafficPolicy))
	return s, p.All()
}

func created(obj *corev1.Service) int64 {
	if obj.CreationTimestamp.IsZero() {
		return 0
	}
	return obj.CreationTimestamp.Unix()
}

// LabelServiceProxyName hands a Service to the proxy it names; signalbox, like
// kube-proxy, leaves every Service alone that carries it.
const LabelServiceProxyName = "service.kubernetes.io/service-proxy-name"

// notServed says why no Service of this kind is served here; plan.NoReason if it is.
func notServed(obj *corev1.Service) plan.Reason {
	ip := obj.Spec.ClusterIP
	if ip == "" && len(obj.Spec.ClusterIPs) > 0 {
		ip = obj.Spec.ClusterIPs[0]
	}
	_, otherProxy := obj.Labels[LabelServiceProxyName]
	switch {
	case otherProxy:
		return plan.OtherProxy
	case obj.Spec.Type == corev1.ServiceTypeExternalName:
		return plan.ExternalName
	case ip == corev1.ClusterIPNone:
		return plan.Headless
	case ip == "":
		return plan.NoClusterIP
	}
	return plan.NoReason
}

// DefaultAffinityTimeout is the API's default of
// sessionAffinityConfig.clientIP.timeoutSeconds.
const DefaultAffinityTimeout = 10800 * time.Second

func readAffinity(p *plan.Problems, obj *corev1.Service) time.Duration {
	switch obj.Spec.SessionAffinity {
	case corev1.ServiceAffinityNone, "":
		return 0
	case corev1.ServiceAffinityClientIP:
	default:
		p.Add("spec.sessionAffinity", "%q is neither None nor ClientIP; there is no affinity", obj.Spec.SessionAffinity)
		return 0
	}
	cfg := obj.Spec.SessionAffinityConfig
	if cfg == nil || cfg.ClientIP == nil || cfg.ClientIP.TimeoutSeconds == nil {
		return DefaultAffinityTimeout
	}
	seconds := *cfg.ClientIP.TimeoutSeconds
	if seconds < 1 || seconds > 86400 {
		p.Add("spec.sessionAffinityConfig.clientIP.timeoutSeconds", "%d is not between 1 and 86400; %v is used", seconds, DefaultAffinityTimeout)
		return DefaultAffinityTimeout
	}
	return time.Duration(seconds) * time.Second
}

func readHealthCheckNodePort(p *plan.Problems, obj *corev1.Service) uint16 {
	port := obj.Spec.HealthCheckNodePort
	if port == 0 || obj.Spec.Type != corev1.ServiceTypeLoadBalancer || obj.Spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
		return 0
	}
	if !validPort(port) {
		p.Add("spec.healthCheckNodePort", "%d is not a port (1 to 65535); there is no health check", port)
		return 0
	}
	return uint16(port)
}

func isLocal(p *plan.Problems, field, policy string) bool {
	switch policy {
	case "Local":
		return true
	case "Cluster", "":
	default:
		p.Add(field, "%q is neither Cluster nor Local; Cluster is used", policy)
	}
	return false
}

// readClusterIPs returns at most one address of each family.
func readClusterIPs(p *plan.Problems, obj *corev1.Service) []netip.Addr {
	texts, field := obj.Spec.ClusterIPs, "spec.clusterIPs"
	if len(texts) == 0 {
		texts, field = []string{obj.Spec.ClusterIP}, "spec.clusterIP"
	}
	var out []netip.Addr
	for i, text := range texts {
		at := field
		if field == "spec.clusterIPs" {
			at = indexed(field, i)
		}
		a, ok := readAddr(p, at, text)
		switch {
		case !ok:
		case i < len(obj.Spec.IPFamilies) && string(obj.Spec.IPFamilies[i]) != plan.FamilyOf(a).String():
			p.Add(at, "%s is not an %s address, which %s promises; it is left out", a, obj.Spec.IPFamilies[i], indexed("spec.ipFamilies", i))
		case slices.ContainsFunc(out, func(o netip.Addr) bool { return plan.FamilyOf(o) == plan.FamilyOf(a) }):
			p.Add(at, "%s is a second %s address; it is left out", a, plan.FamilyOf(a))
		default:
			out = append(out, a)
		}
	}
	return out
}

func (s *svc) readExternalIPs(p *plan.Problems, texts []string, allowed []netip.Prefix) {
	var out addrSet
	for i, text := range texts {
		field := indexed("spec.externalIPs", i)
		a, ok := readAddr(p, field, text)
		switch {
		case !ok:
		case !routable(a):
			p.Add(field, "%s is a link-local address; it is left out", a)
		case len(allowed) > 0 && !plan.AnyContains(allowed, a):
			p.Add(field, "%s is in no range of --external-ip-cidrs; it is left out", a)
			s.notServedAt = append(s.notServedAt, notServedAt{a, plan.ExternalIPNotAllowed})
		default:
			out.add(a)
		}
	}
	s.externalIPs = out.addrs
}

// readIngressIPs leaves out host names, and addresses whose load balancer
// answers by itself (ipMode Proxy, KEP-1860).
func (s *svc) readIngressIPs(p *plan.Problems, ingress []corev1.LoadBalancerIngress) {
	var out addrSet
	for i, in := range ingress {
		if in.IP == "" {
			continue
		}
		if in.IPMode != nil && *in.IPMode != corev1.LoadBalancerIPModeVIP {
			if a, err := netip.ParseAddr(in.IP); err == nil {
				s.notServedAt = append(s.notServedAt, notServedAt{a.Unmap(), plan.LoadBalancerAnswers})
			}
			continue
		}
		if a, ok := readAddr(p, indexed("status.loadBalancer.ingress", i)+".ip", in.IP); ok {
			out.add(a)
		}
	}
	s.loadBalancerIPs = out.addrs
}

// addrSet keeps the order in which addresses first come. What is searched is
// a map, as nothing bounds the number of addresses in an object.
type addrSet struct {
	addrs []netip.Addr
	seen  map[netip.Addr]struct{}
}

func (s *addrSet) add(a netip.Addr) {
	if _, twice := s.seen[a]; twice {
		return
	}
	if s.seen == nil {
		s.seen = map[netip.Addr]struct{}{}
	}
	s.seen[a] = struct{}{}
	s.addrs = append(s.addrs, a)
}

// readSources keeps what can be read. Where a family's ranges were all
// malformed it admits nobody, so that a typing error never opens a Service.
func (s *svc) readSources(p *plan.Problems, ranges []string) {
	malformed := false
	for i, text := range ranges {
		prefix, ok := ParsePrefix(strings.TrimSpace(text))
		if !ok {
			malformed = true
			p.Add(indexed("spec.loadBalancerSourceRanges", i), "%q is not a CIDR; it admits nobody", text)
			continue
		}
		s.sources = append(s.sources, prefix)
	}
	slices.SortFunc(s.sources, netip.Prefix.Compare)
	s.sources = slices.Compact(s.sources)
	if !malformed {
		return
	}
	for _, family := range plan.Families {
		if !slices.ContainsFunc(s.sources, func(x netip.Prefix) bool { return plan.FamilyOf(x.Addr()) == family }) {
			s.deniedFamilies = append(s.deniedFamilies, family)
		}
	}
}

// sourcesOf returns the source ranges of one family as Frontend.Sources wants
// them: nil where everybody is admitted.
func (s *svc) sourcesOf(family plan.Family) []netip.Prefix {
	if slices.Contains(s.deniedFamilies, family) {
		return []netip.Prefix{}
	}
	var out []netip.Prefix
	for _, prefix := range s.sources {
		if plan.FamilyOf(prefix.Addr()) != family {
			continue
		}
		if prefix.Bits() == 0 {
			return nil
		}
		out = append(out, prefix)
	}
	return out
}

func readServicePorts(p *plan.Problems, ports []corev1.ServicePort) []servicePort {
	type named struct {
		name     string
		protocol plan.Protocol
	}
	type numbered struct {
		port     uint16
		protocol plan.Protocol
	}
	names, numbers := map[named]struct{}{}, map[numbered]struct{}{}
	var out []servicePort
	for i := range ports {
		next, ok := readServicePort(p, indexed("spec.ports", i), &ports[i])
		if !ok {
			continue
		}
		name, number := named{next.name, next.protocol}, numbered{next.port, next.protocol}
		_, sameName := names[name]
		_, sameNumber := numbers[number]
		if sameName || sameNumber {
			p.Add(indexed("spec.ports", i), "repeats the name or the number of another %s port; it is left out", next.protocol)
			continue
		}
		names[name], numbers[number] = struct{}{}, struct{}{}
		out = append(out, next)
	}
	return out
}

func readServicePort(p *plan.Problems, field string, sp *corev1.ServicePort) (servicePort, bool) {
	proto, ok := readProtocol(p, field, &sp.Protocol)
	if !ok {
		return servicePort{}, false
	}
	if !validPort(sp.Port) {
		p.Add(field+".port", "%d is not a port (1 to 65535); the port is left out", sp.Port)
		return servicePort{}, false
	}
	if sp.Name != "" && len(validation.IsDNS1123Label(sp.Name)) > 0 {
		p.Add(field+".name", "%q is not a name that the API allows; the port is left out", sp.Name)
		return servicePort{}, false
	}
	next := servicePort{name: sp.Name, protocol: proto, port: uint16(sp.Port)}
	switch {
	case sp.NodePort == 0:
	case !validPort(sp.NodePort):
		p.Add(field+".nodePort", "%d is not a port (1 to 65535); the port has no node port", sp.NodePort)
	default:
		next.nodePort = uint16(sp.NodePort)
	}
	return next, true
}

func readProtocol(p *plan.Problems, field string, proto *corev1.Protocol) (plan.Protocol, bool) {
	switch ptr.Deref(proto, "") {
	case corev1.ProtocolTCP, "":
		return plan.TCP, true
	case corev1.ProtocolUDP:
		return plan.UDP, true
	case corev1.ProtocolSCTP:
		return plan.SCTP, true
	}
	p.Add(field+".protocol", "%q is none of TCP, UDP and SCTP; the port is left out", *proto)
	return 0, false
}
