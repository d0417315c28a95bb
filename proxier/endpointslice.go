package proxier

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// sliceName identifies an EndpointSlice.
type sliceName struct{ Namespace, Name string }

func compareSliceNames(a, b sliceName) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// endpointSlice is what an EndpointSlice object says, checked and small.
type endpointSlice struct {
	name      sliceName
	service   ServiceName
	family    Family
	ports     []slicePort
	endpoints []sliceEndpoint
}

type slicePort struct {
	name     string
	protocol Protocol
	port     uint16
}

// sliceEndpoint is one address of a slice; it counts for each of its ports.
// Names that recur in thousands of endpoints are interned.
type sliceEndpoint struct {
	addr        netip.Addr
	node        unique.Handle[string] // empty where the slice does not say
	ready       bool
	serving     bool
	terminating bool
	zoneHints   []unique.Handle[string]
	nodeHints   []unique.Handle[string]
}

func (e sliceEndpoint) equal(o sliceEndpoint) bool {
	return e.addr == o.addr && e.node == o.node && e.ready == o.ready && e.serving == o.serving && e.terminating == o.terminating &&
		slices.Equal(e.zoneHints, o.zoneHints) && slices.Equal(e.nodeHints, o.nodeHints)
}

func (s *endpointSlice) equal(o *endpointSlice) bool {
	return s.name == o.name && s.service == o.service && s.family == o.family && slices.Equal(s.ports, o.ports) &&
		slices.EqualFunc(s.endpoints, o.endpoints, sliceEndpoint.equal)
}

// readEndpointSlice returns nil for a slice that is not for a proxy: of a
// headless Service, of host names, or naming no Service.
func readEndpointSlice(obj *discoveryv1.EndpointSlice) (*endpointSlice, []Problem) {
	p := problems{kind: "EndpointSlice", object: objectName(obj)}
	if _, headless := obj.Labels[corev1.IsHeadlessService]; headless || !validNames(obj, &p) {
		return nil, p.found
	}
	owner := obj.Labels[discoveryv1.LabelServiceName]
	if owner == "" {
		p.add("metadata.labels", "%s is missing, so the slice belongs to no Service; it is left out", discoveryv1.LabelServiceName)
		return nil, p.found
	}
	s := &endpointSlice{
		name:    sliceName{obj.Namespace, obj.Name},
		service: ServiceName{obj.Namespace, owner},
	}
	switch obj.AddressType {
	case discoveryv1.AddressTypeIPv4:
		s.family = IPv4
	case discoveryv1.AddressTypeIPv6:
		s.family = IPv6
	default:
		p.add("addressType", "%q endpoints cannot be served; the slice is left out", obj.AddressType)
		return nil, p.found
	}
	s.ports = readSlicePorts(&p, obj.Ports)
	s.readEndpoints(&p, obj.Endpoints)
	return s, p.found
}

func readSlicePorts(p *problems, ports []discoveryv1.EndpointPort) []slicePort {
	var out []slicePort
	for i, ep := range ports {
		field := indexed("ports", i)
		if ep.Name == nil {
			p.add(field+".name", "is missing; the port is left out")
			continue
		}
		if ep.Port == nil || *ep.Port == 0 {
			continue // "all ports": nothing that a Service port could be sent to
		}
		if !validPort(*ep.Port) {
			p.add(field+".port", "%d is not a port (1 to 65535); the port is left out", *ep.Port)
			continue
		}
		proto, ok := readProtocol(p, field, ep.Protocol)
		if !ok {
			continue
		}
		out = append(out, slicePort{*ep.Name, proto, uint16(*ep.Port)})
	}
	return out
}

// readEndpoints uses the first address of each endpoint, as the API asks of
// its consumers, and reads missing conditions as the API defines them.
func (s *endpointSlice) readEndpoints(p *problems, endpoints []discoveryv1.Endpoint) {
	s.endpoints = make([]sliceEndpoint, 0, len(endpoints))
	for i, ep := range endpoints {
		if len(ep.Addresses) == 0 {
			p.add(indexed("endpoints", i)+".addresses", "is empty; the endpoint is left out")
			continue
		}
		a, err := netip.ParseAddr(ep.Addresses[0])
		if reason := s.unusable(a, err); reason != "" {
			p.add(indexed("endpoints", i)+".addresses[0]", "%q %s; the endpoint is left out", ep.Addresses[0], reason)
			continue
		}
		e := sliceEndpoint{
			addr:        a,
			node:        unique.Make(deref(ep.NodeName)),
			ready:       ep.Conditions.Ready == nil || *ep.Conditions.Ready,
			serving:     ep.Conditions.Serving == nil || *ep.Conditions.Serving,
			terminating: deref(ep.Conditions.Terminating),
		}
		if ep.Hints != nil {
			for _, z := range ep.Hints.ForZones {
				e.zoneHints = append(e.zoneHints, unique.Make(z.Name))
			}
			for _, n := range ep.Hints.ForNodes {
				e.nodeHints = append(e.nodeHints, unique.Make(n.Name))
			}
		}
		s.endpoints = append(s.endpoints, e)
	}
}

func (s *endpointSlice) unusable(a netip.Addr, err error) string {
	switch {
	case err != nil:
		return "is not an IP address"
	case FamilyOf(a) != s.family || a.Is4In6():
		return fmt.Sprintf("is not an %s address, which the slice's addressType promises", s.family)
	case !routable(a):
		return "is a loopback, link-local, multicast or unspecified address"
	}
	return ""
}

func objectName(obj metav1.Object) string {
	if obj.GetNamespace() == "" {
		return obj.GetName()
	}
	return obj.GetNamespace() + "/" + obj.GetName()
}

func indexed(field string, i int) string { return fmt.Sprintf("%s[%d]", field, i) }

// deref returns the zero value for nil.
func deref[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}
