package ipvs

import (
	"flag"
	"fmt"
	"net/netip"
	"time"

	"signalbox/proxier"
)

var update = flag.Bool("update", false, "write the golden files anew")

// world makes plans of one family.
type world struct{ family proxier.Family }

func (w world) addr(v4, v6 string) netip.Addr {
	if w.family == proxier.IPv6 {
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

func (w world) pods(numbers ...int) *proxier.EndpointSet {
	set := &proxier.EndpointSet{}
	for _, n := range numbers {
		a := w.addr(fmt.Sprintf("10.244.1.%d", n), fmt.Sprintf("fd00:244:1::%x", n))
		set.Endpoints = append(set.Endpoints, proxier.Endpoint{AddrPort: netip.AddrPortFrom(a, 8080), MayHairpin: n%2 == 0})
	}
	return set
}

// service is a Service port with the given frontends.
func (w world) service(name string, protocol proxier.Protocol, serving *proxier.EndpointSet, frontends ...proxier.Frontend) *proxier.ServicePort {
	return &proxier.ServicePort{
		Name:      proxier.ServicePortName{ServiceName: proxier.ServiceName{Namespace: "default", Name: name}, Protocol: protocol},
		Frontends: frontends, Usable: serving,
	}
}

func clusterIP(a netip.Addr, port uint16, set *proxier.EndpointSet) proxier.Frontend {
	return proxier.Frontend{Kind: proxier.ClusterIP, Addr: a, Port: port, Internal: set, External: set,
		Masquerade: proxier.FromNode | proxier.FromOutside}
}

func local(kind proxier.FrontendKind, a netip.Addr, port uint16, internal, external *proxier.EndpointSet) proxier.Frontend {
	return proxier.Frontend{Kind: kind, Addr: a, Port: port, Internal: internal, External: external,
		Masquerade: proxier.FromNode, WhenEmpty: proxier.Drop}
}

func (w world) plan(services ...*proxier.ServicePort) *proxier.Plan {
	plan := &proxier.Plan{
		Family:   w.family,
		Services: make(map[proxier.ServicePortName]*proxier.ServicePort),
		Node: proxier.Node{
			LocalPods:     proxier.LocalPods{Prefixes: []netip.Prefix{w.prefix("10.244.0.0/16", "fd00:244::/32")}},
			NodePortAddrs: proxier.NodePortAddrs{All: true},
			ServiceCIDRs:  []netip.Prefix{w.prefix("10.96.0.0/16", "fd00:96::/64")},
		},
	}
	for _, sp := range services {
		plan.Services[sp.Name] = sp
	}
	return plan
}

func (w world) prefix(v4, v6 string) netip.Prefix {
	if w.family == proxier.IPv6 {
		return netip.MustParsePrefix(v6)
	}
	return netip.MustParsePrefix(v4)
}

// example has a Service of every kind.
func (w world) example() *proxier.Plan {
	all, here, none := w.pods(1, 2, 3), w.pods(2), &proxier.EndpointSet{}
	balanced := w.service("balanced", proxier.TCP, all,
		clusterIP(w.vip(2), 443, all),
		local(proxier.LoadBalancerIP, w.external(1), 443, all, here),
		local(proxier.NodePort, netip.Addr{}, 30443, all, here))
	balanced.HealthCheckNodePort = 32000
	balanced.Frontends[1].Sources = []netip.Prefix{w.prefix("198.51.100.0/24", "2001:db8:100::/48")}
	sticky := w.service("sticky", proxier.TCP, all,
		clusterIP(w.vip(4), 80, all), local(proxier.NodePort, netip.Addr{}, 30080, all, here))
	sticky.AffinityTimeout = 3 * time.Hour
	return w.plan(
		w.service("web", proxier.TCP, all, clusterIP(w.vip(1), 80, all)),
		w.service("dns", proxier.UDP, all, clusterIP(w.vip(1), 53, all)),
		w.service("signal", proxier.SCTP, here, clusterIP(w.vip(3), 2905, here)),
		w.service("empty", proxier.TCP, none, clusterIP(w.vip(5), 80, none)),
		w.service("elsewhere", proxier.TCP, all,
			local(proxier.ExternalIP, w.external(2), 80, all, none),
			local(proxier.ExternalIP, w.external(3), 80, none, all)),
		balanced, sticky)
}
