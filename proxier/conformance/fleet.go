// SPDX-License-Identifier: Apache-2.0

// Package conformance holds what tests of modes share: the contract suite that
// every mode passes with real packets, and plans of any size to measure with.
package conformance

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"signalbox/proxier/plan"
)

// Fleet is a plan of many like Services to measure modes with: Services
// default/svc-0 to svc-(services-1), each with one TCP port 80 named "http" at
// a cluster IP of its own in 10.96.0.0/12 (fd00:96::/64), and the given number
// of endpoints on port 8080. Pods are numbered from 10.128.0.1 (fd00:128::1)
// on; one endpoint in a hundred may hairpin, as on a node of a cluster of a
// hundred nodes.
func Fleet(family plan.Family, services, endpoints int) *plan.Plan {
	plan := &plan.Plan{
		Family:   family,
		Services: make(map[plan.ServicePortName]*plan.ServicePort, services),
		Node: plan.Node{
			LocalPods:     plan.LocalPods{Prefixes: []netip.Prefix{fleetPrefix(family, "10.128.0.0/9", "fd00:128::/64")}},
			NodePortAddrs: plan.NodePortAddrs{Addrs: []netip.Addr{fleetPrefix(family, "192.168.0.1/32", "fd00:192::1/128").Addr()}},
			ServiceCIDRs:  []netip.Prefix{fleetPrefix(family, "10.96.0.0/12", "fd00:96::/64")},
		},
	}
	for i := range services {
		sp := FleetService(family, i, i*endpoints, endpoints)
		plan.Services[sp.Name] = sp
	}
	return plan
}

// FleetService is Service number i of a Fleet with the endpoints firstPod to
// firstPod+endpoints-1: with another firstPod than Fleet gave it, it is a
// Service whose endpoints moved.
func FleetService(family plan.Family, i, firstPod, endpoints int) *plan.ServicePort {
	set := &plan.EndpointSet{Endpoints: make([]plan.Endpoint, endpoints)}
	pods := fleetPrefix(family, "10.128.0.0/9", "fd00:128::/64").Addr()
	for n := range endpoints {
		pod := firstPod + n
		set.Endpoints[n] = plan.Endpoint{
			AddrPort:   netip.AddrPortFrom(nthAddr(pods, pod+1), 8080),
			MayHairpin: pod%100 == 0,
		}
	}
	return &plan.ServicePort{
		Name: plan.ServicePortName{
			ServiceName: plan.ServiceName{Namespace: "default", Name: fmt.Sprintf("svc-%d", i)},
			Port:        "http", Protocol: plan.TCP,
		},
		Usable: set,
		Frontends: []plan.Frontend{{
			Kind: plan.ClusterIP, Addr: nthAddr(fleetPrefix(family, "10.96.0.0/12", "fd00:96::/64").Addr(), i+1), Port: 80,
			Internal: set, External: set,
			Masquerade: plan.FromNode | plan.FromOutside,
		}},
	}
}

func fleetPrefix(family plan.Family, v4, v6 string) netip.Prefix {
	if family == plan.IPv6 {
		return netip.MustParsePrefix(v6)
	}
	return netip.MustParsePrefix(v4)
}

// nthAddr is the address n after base; only the last 32 bits count up.
func nthAddr(base netip.Addr, n int) netip.Addr {
	b := base.AsSlice()
	last := b[len(b)-4:]
	binary.BigEndian.PutUint32(last, binary.BigEndian.Uint32(last)+uint32(n))
	a, _ := netip.AddrFromSlice(b)
	return a
}
