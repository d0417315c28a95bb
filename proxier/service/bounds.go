package service

import "fmt"

// A Service beyond one of these bounds in a family is not served there. A small
// object can ask for a lot, as its ports are multiplied by its addresses and its
// endpoints. No Service that people need comes near:
//
//   - maxFrontends counts ports times addresses, and source ranges for each
//     frontend that has them. An object has room for some 30,000 ports, and a
//     Service with so many has one or two addresses.
//   - maxPortFrontends counts those of one port. They are written at once, as a
//     port changes atomically.
//   - maxEndpoints counts endpoints once for each port.
const (
	maxFrontends     = 1 << 16
	maxPortFrontends = 1 << 14
	maxEndpoints     = 1 << 18
)

// tooLarge says which bound a Service is beyond; "" for none.
func (r *Resolver) tooLarge(s *svc, addrs []serviceAddr, filed []*endpointSlice) string {
	each := len(addrs)
	for _, a := range addrs {
		each += len(a.sources)
	}
	all := each * len(s.ports)
	for _, port := range s.ports {
		if port.nodePort != 0 {
			all++
		}
	}
	endpoints := 0
	for _, slice := range filed {
		if slice.family == r.family {
			endpoints += len(slice.endpoints) * min(len(slice.ports), len(s.ports))
		}
	}
	switch {
	case each > maxPortFrontends:
		return fmt.Sprintf("each port has %d addresses and source ranges, more than %d", each, maxPortFrontends)
	case all > maxFrontends:
		return fmt.Sprintf("%d ports at %d addresses and source ranges make more than %d frontends", len(s.ports), each, maxFrontends)
	case endpoints > maxEndpoints:
		return fmt.Sprintf("%d ports with their endpoints make more than %d", len(s.ports), maxEndpoints)
	}
	return ""
}
