package proxier

import (
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// service is what a Service object says, checked and in a form that is small
// to hold and cheap to compare.
type service struct {
	name                ServiceName
	created             time.Time // decides who keeps a frontend that two claim
	clusterIPs          []netip.Addr
	externalIPs         []netip.Addr
	loadBalancerIPs     []netip.Addr
	sources             []netip.Prefix // of both families
	deniedFamilies      []Family       // every source range of these families was malformed: nobody is admitted
	ports               []servicePort
	internalLocal       bool
	externalLocal       bool
	affinity            time.Duration
	healthCheckNodePort uint16
}

type servicePort struct {
	name     string
	protocol Protocol
	port     uint16
	nodePort uint16
}

func (s *service) equal(o *service) bool {
	return s.name == o.name && s.created.Equal(o.created) &&
		slices.Equal(s.clusterIPs, o.clusterIPs) && slices.Equal(s.externalIPs, o.externalIPs) &&
		slices.Equal(s.loadBalancerIPs, o.loadBalancerIPs) && slices.Equal(s.sources, o.sources) &&
		slices.Equal(s.deniedFamilies, o.deniedFamilies) && slices.Equal(s.ports, o.ports) &&
		s.internalLocal == o.internalLocal && s.externalLocal == o.externalLocal &&
		s.affinity == o.affinity && s.healthCheckNodePort == o.healthCheckNodePort
}

// readService returns nil for a Service that no proxy serves: headless,
// ExternalName, without a cluster IP, or handed to another proxy by its label.
func readService(obj *corev1.Service) (*service, []Problem) {
	p := problems{kind: "Service", object: objectName(obj)}
	if !validNames(obj, &p) || !servedByUs(obj) {
		return nil, p.found
	}
	s := &service{
		name:                ServiceName{obj.Namespace, obj.Name},
		created:             obj.CreationTimestamp.Time,
		clusterIPs:          readAddrs(&p, "spec.clusterIPs", clusterIPs(obj)),
		externalIPs:         readAddrs(&p, "spec.externalIPs", obj.Spec.ExternalIPs),
		loadBalancerIPs:     readAddrs(&p, "status.loadBalancer.ingress", ingressIPs(obj)),
		ports:               readServicePorts(&p, obj.Spec.Ports),
		affinity:            readAffinity(&p, obj),
		healthCheckNodePort: readHealthCheckNodePort(&p, obj),
	}
	s.readSources(&p, obj.Spec.LoadBalancerSourceRanges)
	s.internalLocal = isLocal(&p, "spec.internalTrafficPolicy", string(deref(obj.Spec.InternalTrafficPolicy)))
	s.externalLocal = isLocal(&p, "spec.externalTrafficPolicy", string(obj.Spec.ExternalTrafficPolicy))
	return s, p.found
}

// LabelServiceProxyName hands a Service to the proxy it names; signalbox, like
// kube-proxy, leaves every Service alone that carries it.
const LabelServiceProxyName = "service.kubernetes.io/service-proxy-name"

func servedByUs(obj *corev1.Service) bool {
	if _, other := obj.Labels[LabelServiceProxyName]; other {
		return false
	}
	ip := obj.Spec.ClusterIP
	if ip == "" && len(obj.Spec.ClusterIPs) > 0 {
		ip = obj.Spec.ClusterIPs[0]
	}
	return obj.Spec.Type != corev1.ServiceTypeExternalName && ip != "" && ip != corev1.ClusterIPNone
}

func clusterIPs(obj *corev1.Service) []string {
	if len(obj.Spec.ClusterIPs) > 0 {
		return obj.Spec.ClusterIPs
	}
	return []string{obj.Spec.ClusterIP}
}

// ingressIPs leaves out host names, and addresses whose load balancer answers
// by itself (ipMode Proxy, KEP-1860).
func ingressIPs(obj *corev1.Service) []string {
	var ips []string
	for _, in := range obj.Status.LoadBalancer.Ingress {
		if in.IP != "" && (in.IPMode == nil || *in.IPMode == corev1.LoadBalancerIPModeVIP) {
			ips = append(ips, in.IP)
		}
	}
	return ips
}

func readAddrs(p *problems, field string, texts []string) []netip.Addr {
	var addrs []netip.Addr
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		switch {
		case err != nil:
			p.add(field, "%q is not an IP address; it is left out", text)
		case !routable(a):
			p.add(field, "%s is a loopback, link-local, multicast or unspecified address; it is left out", a)
		case !slices.Contains(addrs, a.Unmap()):
			addrs = append(addrs, a.Unmap())
		}
	}
	return addrs
}

// routable says whether packets to a can reach another host. The API server
// lets nothing else through.
func routable(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsValid() && a.Zone() == "" && !a.IsUnspecified() && !a.IsLoopback() && !a.IsLinkLocalUnicast() &&
		!a.IsMulticast() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

func readServicePorts(p *problems, ports []corev1.ServicePort) []servicePort {
	var out []servicePort
	for i, sp := range ports {
		field := indexed("spec.ports", i)
		proto, ok := readProtocol(p, field, &sp.Protocol)
		if !ok {
			continue
		}
		if !validPort(sp.Port) {
			p.add(field+".port", "%d is not a port (1 to 65535); the port is left out", sp.Port)
			continue
		}
		if !utf8.ValidString(sp.Name) {
			p.add(field+".name", "%q is not UTF-8; the port is left out", sp.Name)
			continue
		}
		next := servicePort{name: sp.Name, protocol: proto, port: uint16(sp.Port)}
		if sp.NodePort != 0 && !validPort(sp.NodePort) {
			p.add(field+".nodePort", "%d is not a port (1 to 65535); the port has no node port", sp.NodePort)
		} else {
			next.nodePort = uint16(sp.NodePort)
		}
		if j := slices.IndexFunc(out, next.collides); j >= 0 {
			p.add(field, "repeats the name or the number of another %s port; it is left out", proto)
			continue
		}
		out = append(out, next)
	}
	return out
}

func (s servicePort) collides(o servicePort) bool {
	return s.protocol == o.protocol && (s.name == o.name || s.port == o.port)
}

func readProtocol(p *problems, field string, proto *corev1.Protocol) (Protocol, bool) {
	switch deref(proto) {
	case corev1.ProtocolTCP, "":
		return TCP, true
	case corev1.ProtocolUDP:
		return UDP, true
	case corev1.ProtocolSCTP:
		return SCTP, true
	}
	p.add(field+".protocol", "%q is none of TCP, UDP and SCTP; the port is left out", *proto)
	return 0, false
}

// readSources keeps what can be read. Where a family's ranges were all
// malformed it admits nobody, so that a typing error never opens a Service.
func (s *service) readSources(p *problems, ranges []string) {
	malformed := false
	for _, text := range ranges {
		prefix, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil {
			malformed = true
			p.add("spec.loadBalancerSourceRanges", "%q is not a CIDR; it admits nobody", text)
			continue
		}
		s.sources = append(s.sources, prefix.Masked())
	}
	slices.SortFunc(s.sources, netip.Prefix.Compare)
	s.sources = slices.Compact(s.sources)
	if !malformed {
		return
	}
	for _, family := range Families {
		if !slices.ContainsFunc(s.sources, func(x netip.Prefix) bool { return FamilyOf(x.Addr()) == family }) {
			s.deniedFamilies = append(s.deniedFamilies, family)
		}
	}
}

// sourcesOf returns the source ranges of one family as Frontend.Sources wants
// them: nil where everybody is admitted.
func (s *service) sourcesOf(family Family) []netip.Prefix {
	if slices.Contains(s.deniedFamilies, family) {
		return []netip.Prefix{}
	}
	var out []netip.Prefix
	for _, prefix := range s.sources {
		if FamilyOf(prefix.Addr()) != family {
			continue
		}
		if prefix.Bits() == 0 {
			return nil
		}
		out = append(out, prefix)
	}
	return out
}

// DefaultAffinityTimeout is the API's default of
// sessionAffinityConfig.clientIP.timeoutSeconds.
const DefaultAffinityTimeout = 10800 * time.Second

func readAffinity(p *problems, obj *corev1.Service) time.Duration {
	switch obj.Spec.SessionAffinity {
	case corev1.ServiceAffinityNone, "":
		return 0
	case corev1.ServiceAffinityClientIP:
	default:
		p.add("spec.sessionAffinity", "%q is neither None nor ClientIP; there is no affinity", obj.Spec.SessionAffinity)
		return 0
	}
	cfg := obj.Spec.SessionAffinityConfig
	if cfg == nil || cfg.ClientIP == nil || cfg.ClientIP.TimeoutSeconds == nil {
		return DefaultAffinityTimeout
	}
	seconds := *cfg.ClientIP.TimeoutSeconds
	if seconds < 1 || seconds > 86400 {
		p.add("spec.sessionAffinityConfig.clientIP.timeoutSeconds", "%d is not between 1 and 86400; %v is used", seconds, DefaultAffinityTimeout)
		return DefaultAffinityTimeout
	}
	return time.Duration(seconds) * time.Second
}

func readHealthCheckNodePort(p *problems, obj *corev1.Service) uint16 {
	port := obj.Spec.HealthCheckNodePort
	if port == 0 || obj.Spec.Type != corev1.ServiceTypeLoadBalancer || obj.Spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
		return 0
	}
	if !validPort(port) {
		p.add("spec.healthCheckNodePort", "%d is not a port (1 to 65535); there is no health check", port)
		return 0
	}
	return uint16(port)
}

func isLocal(p *problems, field, policy string) bool {
	switch policy {
	case "Local":
		return true
	case "Cluster", "":
	default:
		p.add(field, "%q is neither Cluster nor Local; Cluster is used", policy)
	}
	return false
}

func validPort(port int32) bool { return port > 0 && port <= 65535 }

func validNames(obj metav1.Object, p *problems) bool {
	for _, name := range []string{obj.GetNamespace(), obj.GetName()} {
		if !utf8.ValidString(name) || strings.ContainsAny(name, "/ \t\r\n\"\x00") {
			p.add("metadata", "the name or namespace %q is not one that the API allows; the object is left out", name)
			return false
		}
	}
	if obj.GetName() == "" {
		p.add("metadata.name", "is empty; the object is left out")
		return false
	}
	return true
}
