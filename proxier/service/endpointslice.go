// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/utils/ptr"

	"signalbox/proxier/plan"
)

// sliceName identifies an EndpointSlice.
type sliceName struct{ Namespace, Name string }

func compareSliceNames(a, b sliceName) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// endpointSlice is what an EndpointSlice object says, checked and small.
type endpointSlice struct {
	name      sliceName
	service   plan.ServiceName
	family    plan.Family
	ports     []slicePort
	endpoints []sliceEndpoint
	// spreadsUnevenly says that the slice's own annotation asks for more than
	// equal shares.
	spreadsUnevenly bool
	// trigger is when what this slice tells of came about; zero where it does
	// not say. Slices that differ in it alone say the same.
	trigger time.Time
}

type slicePort struct {
	name     string
	protocol plan.Protocol
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
	weighted    bool   // the slice says weight
	weight      uint16 // share of new connections; 0 for none
	target      string // name of what is behind the address, mostly a Pod; may be empty
	hints       *hints // nil for none; endpoints with the same may share them
}

// hints are the places whose clients an endpoint is meant for.
type hints struct {
	zones, nodes []unique.Handle[string]
}

func (h *hints) equal(o *hints) bool {
	if h == nil || o == nil {
		return h == o
	}
	return slices.Equal(h.zones, o.zones) && slices.Equal(h.nodes, o.nodes)
}

func (h *hints) forZones() []unique.Handle[string] {
	if h == nil {
		return nil
	}
	return h.zones
}

func (h *hints) forNodes() []unique.Handle[string] {
	if h == nil {
		return nil
	}
	return h.nodes
}

func (e sliceEndpoint) equal(o sliceEndpoint) bool {
	return e.addr == o.addr && e.node == o.node && e.ready == o.ready && e.serving == o.serving && e.terminating == o.terminating &&
		e.weighted == o.weighted && e.weight == o.weight && e.target == o.target && e.hints.equal(o.hints)
}

func (s *endpointSlice) equal(o *endpointSlice) bool {
	return s.name == o.name && s.service == o.service && s.family == o.family && s.spreadsUnevenly == o.spreadsUnevenly && slices.Equal(s.ports, o.ports) &&
		slices.EqualFunc(s.endpoints, o.endpoints, sliceEndpoint.equal)
}

func (s *endpointSlice) has(at plan.FrontendKey) bool {
	return slices.ContainsFunc(s.endpoints, func(e sliceEndpoint) bool { return e.addr == at.Addr }) &&
		slices.ContainsFunc(s.ports, func(p slicePort) bool {
			return at.Includes(plan.FrontendKey{Addr: at.Addr, Port: p.port, Protocol: p.protocol})
		})
}

func (s *endpointSlice) hasZoneHints() bool {
	return slices.ContainsFunc(s.endpoints, func(e sliceEndpoint) bool { return len(e.hints.forZones()) > 0 })
}

// readEndpointSlice returns nil for a slice that is not for a proxy: of a
// headless Service, of host names, or naming no Service.
func readEndpointSlice(obj *discoveryv1.EndpointSlice) (*endpointSlice, []plan.Problem) {
	p := plan.Problems{Kind: "EndpointSlice", Object: objectName(obj)}
	if _, headless := obj.Labels[corev1.IsHeadlessService]; headless || !validNames(&p, obj, validation.IsDNS1123Subdomain) {
		return nil, p.All()
	}
	owner := obj.Labels[discoveryv1.LabelServiceName]
	if owner == "" {
		p.Add("metadata.labels", "%s is missing, so the slice belongs to no Service; it is left out", discoveryv1.LabelServiceName)
		return nil, p.All()
	}
	s := &endpointSlice{
		name:    sliceName{obj.Namespace, obj.Name},
		service: plan.ServiceName{Namespace: obj.Namespace, Name: owner},
	}
	// What is not a time says nothing.
	s.trigger, _ = time.Parse(time.RFC3339Nano, obj.Annotations[corev1.EndpointsLastChangeTriggerTime])
	switch obj.AddressType {
	case discoveryv1.AddressTypeIPv4:
		s.family = plan.IPv4
	case discoveryv1.AddressTypeIPv6:
		s.family = plan.IPv6
	default:
		p.Add("addressType", "%q endpoints cannot be served; the slice is left out", obj.AddressType)
		return nil, p.All()
	}
	s.ports = readSlicePorts(&p, obj.Ports)
	weights := readWeights(&p, obj)
	s.spreadsUnevenly = weights.differ()
	s.readEndpoints(&p, obj.Endpoints, weights)
	return s, p.All()
}

func readSlicePorts(p *plan.Problems, ports []discoveryv1.EndpointPort) []slicePort {
	var out []slicePort
	for i, ep := range ports {
		field := indexed("ports", i)
		if ep.Name == nil {
			p.Add(field+".name", "is missing; the port is left out")
			continue
		}
		if ep.Port == nil {
			continue // "all ports": nothing that a Service port could be sent to
		}
		if !validPort(*ep.Port) {
			p.Add(field+".port", "%d is not a port (1 to 65535); the port is left out", *ep.Port)
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
func (s *endpointSlice) readEndpoints(p *plan.Problems, endpoints []discoveryv1.Endpoint, weights weightRules) {
	s.endpoints = make([]sliceEndpoint, 0, len(endpoints))
	for i := range endpoints {
		ep := &endpoints[i]
		if len(ep.Addresses) == 0 {
			p.Add(indexed("endpoints", i)+".addresses", "is empty; the endpoint is left out")
			continue
		}
		a, ok := ParseAddr(ep.Addresses[0])
		if reason := s.unusable(a, ok); reason != "" {
			p.Add(indexed("endpoints", i)+".addresses[0]", "%q %s; the endpoint is left out", ep.Addresses[0], reason)
			continue
		}
		e := sliceEndpoint{
			addr:        a,
			node:        unique.Make(ptr.Deref(ep.NodeName, "")),
			ready:       ptr.Deref(ep.Conditions.Ready, true),
			serving:     ptr.Deref(ep.Conditions.Serving, true),
			terminating: ptr.Deref(ep.Conditions.Terminating, false),
			target:      ptr.Deref(ep.TargetRef, corev1.ObjectReference{}).Name,
			hints:       readHints(ep.Hints),
		}
		e.weight, e.weighted = weights.of(e.addr, e.target)
		if n := len(s.endpoints); n > 0 && e.hints.equal(s.endpoints[n-1].hints) {
			e.hints = s.endpoints[n-1].hints
		}
		s.endpoints = append(s.endpoints, e)
	}
}

func readHints(from *discoveryv1.EndpointHints) *hints {
	if from == nil || len(from.ForZones)+len(from.ForNodes) == 0 {
		return nil
	}
	h := &hints{}
	for _, z := range from.ForZones {
		h.zones = append(h.zones, unique.Make(z.Name))
	}
	for _, n := range from.ForNodes {
		h.nodes = append(h.nodes, unique.Make(n.Name))
	}
	return h
}

func (s *endpointSlice) unusable(a netip.Addr, parsed bool) string {
	switch {
	case !parsed:
		return "is not an IP address"
	case plan.FamilyOf(a) != s.family:
		return fmt.Sprintf("is not an %s address, which the slice's addressType promises", s.family)
	case !routable(a):
		return "is a loopback, link-local, multicast or unspecified address"
	}
	return ""
}
