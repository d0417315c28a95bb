package service

import (
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"signalbox/proxier/plan"
)

// service is what a Service object says, checked and in a form that is small
// to hold and cheap to compare.
type svc struct {
	name                plan.ServiceName
	created             int64 // Unix seconds, 0 where unknown: decides who has a frontend that two claim
	clusterIPs          []netip.Addr
	externalIPs         []netip.Addr
	loadBalancerIPs     []netip.Addr
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

type servicePort struct {
	name     string
	protocol plan.Protocol
	port     uint16
	nodePort uint16
}

func (s *svc) equal(o *svc) bool {
	return s.name == o.name && s.created == o.created &&
		slices.Equal(s.clusterIPs, o.clusterIPs) && slices.Equal(s.externalIPs, o.externalIPs) &&
		slices.Equal(s.loadBalancerIPs, o.loadBalancerIPs) && slices.Equal(s.sources, o.sources) &&
		slices.Equal(s.deniedFamilies, o.deniedFamilies) && slices.Equal(s.ports, o.ports) &&
		s.internalLocal == o.internalLocal && s.externalLocal == o.externalLocal &&
		s.affinity == o.affinity && s.healthCheckNodePort == o.healthCheckNodePort &&
		s.scheduler == o.scheduler && slices.Equal(s.weights, o.weights)
}

// readService returns nil for a Service that no proxy serves: headless,
// ExternalName, without a cluster IP, or handed to another proxy by its label.
func readService(obj *corev1.Service) (*svc, []plan.Problem) {
	p := plan.Problems{Kind: "Service", Object: objectName(obj)}
	if !servedByUs(obj) || !validNames(&p, obj, validation.IsDNS1123Label) {
		return nil, p.All()
	}
	s := &svc{
		name:                plan.ServiceName{Namespace: obj.Namespace, Name: obj.Name},
		created:             created(obj),
		clusterIPs:          readClusterIPs(&p, obj),
		externalIPs:         readExternalIPs(&p, obj.Spec.ExternalIPs),
		loadBalancerIPs:     readIngressIPs(&p, obj.Status.LoadBalancer.Ingress),
		ports:               readServicePorts(&p, obj.Spec.Ports),
		affinity:            readAffinity(&p, obj),
		healthCheckNodePort: readHealthCheckNodePort(&p, obj),
		scheduler:           readScheduler(&p, obj),
		weights:             readWeights(&p, obj),
	}
	s.readSources(&p, obj.Spec.LoadBalancerSourceRanges)
	s.internalLocal = isLocal(&p, "spec.internalTrafficPolicy", string(deref(obj.Spec.InternalTrafficPolicy)))
	s.externalLocal = isLocal(&p, "spec.externalTrafficPolicy", string(obj.Spec.ExternalTrafficPolicy))
	return s, p.All()
}

// since is when the Service was created, 0 for none.
func (s *svc) since() int64 {
	if s == nil {
		return 0
	}
	return s.created
}

func (s *svc) portCount() int {
	if s == nil {
		return 0
	}
	return len(s.ports)
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
