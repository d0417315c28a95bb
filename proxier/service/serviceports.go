package service

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"signalbox/proxier/plan"
)

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
	switch deref(proto) {
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
