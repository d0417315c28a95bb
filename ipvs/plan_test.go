// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"flag"
	"fmt"
	"net/netip"
	"time"

	"signalbox/proxier/plan"
)

var update = flag.Bool("update", false, "write the golden files anew")

// world makes plans of one family.
type world struct{ family plan.Family }

func (w world) addr(v4, v6 string) netip.Addr {
	if w.family == plan.IPv6 {
		return netip.MustParseAddr(v6)
	}
	return netip.MustParseAddr(v4)
}

func (w world) vip(n int) netip.Addr {
	return w.addr(fmt.Sprintf("10.96.0.%d", n), fmt.Sprintf("fd00:96::%x", n))
}

func (w world) external(n int) netip.Addr {
	return w.addr(fmt.Sprintf("192.0.2.%d", n), fmt.Sprintf("2001:db8::%x", n))
}

func (w world) pods(numbers ...int) *plan.EndpointSet {
	set := &plan.EndpointSet{}
	for _, n := range numbers {
		a := w.addr(fmt.Sprintf("10.244.1.%d", n), fmt.Sprintf("fd00:244:1::%x", n))
		set.Endpoints = append(set.Endpoints, plan.Endpoint{AddrPort: netip.AddrPortFrom(a, 8080), MayHairpin: n%2 == 0})
	}
	return set
}

// service makes a Service port.
func (w world) service(name string, protocol plan.Protocol, serving *plan.EndpointSet, frontends ...plan.Frontend) *plan.ServicePort {
	return &plan.ServicePort{
		Name:      plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "default", Name: name}, Protocol: protocol},
		Frontends: frontends, Usable: serving,
	}
}

func clusterIP(a netip.Addr, port uint16, set *plan.EndpointSet) plan.Frontend {
	return plan.Frontend{Kind: plan.ClusterIP, Addr: a, Port: port, Internal: set, External: set,
		Masquerade: plan.FromNode | plan.FromOutside}
}

func local(kind plan.FrontendKind, a netip.Addr, port uint16, internal, external *plan.EndpointSet) plan.Frontend {
	return plan.Frontend{Kind: kind, Addr: a, Port: port, Internal: internal, External: external,
		Masquerade: plan.FromNode, WhenEmpty: plan.Drop}
}

func (w world) plan(services ...*plan.ServicePort) *plan.Plan {
	plan := &plan.Plan{
		Family:   w.family,
		Services: make(map[plan.ServicePortName]*plan.ServicePort),
		Node: plan.Node{
			LocalPods:     plan.LocalPods{Prefixes: []netip.Prefix{w.prefix("10.244.0.0/16", "fd00:244::/32")}},
			NodePortAddrs: plan.NodePortAddrs{All: true},
			ServiceCIDRs:  []netip.Prefix{w.prefix("10.96.0.0/16", "fd00:96::/64")},
		},
	}
	for _, sp := range services {
		plan.Services[sp.Name] = sp
	}
	return plan
}

func (w world) prefix(v4, v6 string) netip.Prefix {
	if w.family == plan.IPv6 {
		return netip.MustParsePrefix(v6)
	}
	return netip.MustParsePrefix(v4)
}

// example has a Service of every kind.
func (w world) example() *plan.Plan {
	all, here, none := w.pods(1, 2, 3), w.pods(2), &plan.EndpointSet{}
	balanced := w.service("balanced", plan.TCP, all,
		clusterIP(w.vip(2), 443, all),
		local(plan.LoadBalancerIP, w.external(1), 443, all, here),
		local(plan.NodePort, netip.Addr{}, 30443, all, here))
	balanced.HealthCheckNodePort = 32000
	balanced.Frontends[1].Sources = []netip.Prefix{w.prefix("198.51.100.0/24", "2001:db8:100::/48")}
	sticky := w.service("sticky", plan.TCP, all,
		clusterIP(w.vip(4), 80, all), local(plan.NodePort, netip.Addr{}, 30080, all, here))
	sticky.AffinityTimeout = 3 * time.Hour
	return w.plan(
		w.service("web", plan.TCP, all, clusterIP(w.vip(1), 80, all)),
		w.service("dns", plan.UDP, all, clusterIP(w.vip(1), 53, all)),
		w.service("signal", plan.SCTP, here, clusterIP(w.vip(3), 2905, here)),
		w.service("empty", plan.TCP, none, clusterIP(w.vip(5), 80, none)),
		w.service("elsewhere", plan.TCP, all,
			local(plan.ExternalIP, w.external(2), 80, all, none),
			local(plan.ExternalIP, w.external(3), 80, none, all)),
		balanced, sticky)
}
