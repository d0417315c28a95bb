// Package proxiertest holds what tests of modes share: the contract suite that
// every mode passes with real packets, and plans of any size to measure with.
package proxiertest

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"signalbox/proxier"
)

// Fleet is a plan of many like Services to measure modes with: Services
// default/svc-0 to svc-(services-1), each with one TCP port 80 named "http" at
// a cluster IP of its own in 10.96.0.0/12 (fd00:96::/64), and the given number
// of endpoints on port 8080. Pods are numbered from 10.128.0.1 (fd00:128::1)
// on; one endpoint in a hundred may hairpin, as on a node of a cluster of a
// hundred nodes.
func Fleet(family proxier.Family, services, endpoints int) *proxier.Plan {
	plan := &proxier.Plan{
		Family:   family,
		Services: make(map[proxier.ServicePortName]*proxier.ServicePort, services),
		Node: proxier.Node{
			LocalPods:     proxier.LocalPods{Prefixes: []netip.Prefix{fleetPrefix(family, "10.128.0.0/9", "fd00:128::/64")}},
			NodePortAddrs: proxier.NodePortAddrs{Addrs: []netip.Addr{fleetPrefix(family, "192.168.0.1/32", "fd00:192::1/128").Addr()}},
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
func FleetService(family proxier.Family, i, firstPod, endpoints int) *proxier.ServicePort {
	set := &proxier.EndpointSet{Endpoints: make([]proxier.Endpoint, endpoints)}
	pods := fleetPrefix(family, "10.128.0.0/9", "fd00:128::/64").Addr()
	for n := range endpoints {
		pod := firstPod + n
		set.Endpoints[n] = proxier.Endpoint{
			AddrPort:   netip.AddrPortFrom(nthAddr(pods, pod+1), 8080),
			MayHairpin: pod%100 == 0,
		}
	}
	return &proxier.ServicePort{
		Name: proxier.ServicePortName{
			ServiceName: proxier.ServiceName{Namespace: "default", Name: fmt.Sprintf("svc-%d", i)},
			Port:        "http", Protocol: proxier.TCP,
		},
		Usable: set,
		Frontends: []proxier.Frontend{{
			Kind: proxier.ClusterIP, Addr: nthAddr(fleetPrefix(family, "10.96.0.0/12", "fd00:96::/64").Addr(), i+1), Port: 80,
			Internal: set, External: set,
			Masquerade: proxier.FromNode | proxier.FromOutside,
		}},
	}
}

func fleetPrefix(family proxier.Family, v4, v6 string) netip.Prefix {
	if family == proxier.IPv6 {
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
