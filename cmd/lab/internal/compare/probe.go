// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"signalbox/internal/netlab"
)

// probeAnnotation names further addresses and NodePorts of a Service that are probed,
// separated by spaces. A generated Service names all that it has at some time, or never.
const probeAnnotation = "lab.signalbox/probe"

// Probe is a kind of connection that both labs try.
type Probe struct {
	Client, Network string
	Target          netip.AddrPort
	// Frontend is what the target is in the Service: see the constants.
	Frontend string
	// service is the name of the case.
	service string
	// most is how many endpoints may answer at most.
	most int
	// sticky says that the Service has session affinity.
	sticky bool
}

// Kinds of targets.
const (
	ofClusterIP = "cluster IP"
	ofExternal  = "external IP"
	ofBalancer  = "load-balancer IP"
	ofNodePort  = "NodePort"
	ofHealth    = "health check node port"
	// ofNothing is an address or port that the Service does not have.
	ofNothing = "not of the Service"
)

// healthNetwork and healthProtocol are those of a health check node port.
const (
	healthNetwork                  = "http"
	healthProtocol corev1.Protocol = "HTTP"
)

// String returns for example "pod-x to tcp 10.96.16.1:80 (cluster IP)".
func (p Probe) String() string {
	return fmt.Sprintf("%s to %s %s (%s)", p.Client, p.Network, p.Target, p.Frontend)
}

var (
	// allClients try what a Service has in some state.
	allClients = []string{"pod-x", "pod-a", "pod-c", "node1", "node2", "client1"}
	// someClients try what it never has.
	someClients = []string{"pod-x", "node1", "client1"}
)

// unusedPort is in no Service.
const unusedPort = 9

// frontend is where a Service can be reached. A NodePort has no address.
type frontend struct {
	addr     netip.Addr
	port     int32
	protocol corev1.Protocol
}

// frontends are those of one state, with their kinds.
func (s State) frontends() map[frontend]string {
	all := map[frontend]string{}
	if s.Service == nil || s.Service.Spec.Type == corev1.ServiceTypeExternalName {
		return all
	}
	addrs := map[netip.Addr]string{}
	put := func(kind string, text string) {
		if a, err := netip.ParseAddr(text); err == nil {
			addrs[a] = kind
		}
	}
	for _, in := range s.Service.Status.LoadBalancer.Ingress {
		put(ofBalancer, in.IP)
	}
	for _, ip := range s.Service.Spec.ExternalIPs {
		put(ofExternal, ip)
	}
	for _, ip := range s.Service.Spec.ClusterIPs {
		put(ofClusterIP, ip)
	}
	for _, p := range s.Service.Spec.Ports {
		for a, kind := range addrs {
			all[frontend{a, p.Port, protocolOf(p)}] = kind
		}
		if p.NodePort != 0 {
			all[frontend{port: p.NodePort, protocol: protocolOf(p)}] = ofNodePort
		}
	}
	if port := s.Service.Spec.HealthCheckNodePort; port != 0 {
		all[frontend{port: port, protocol: healthProtocol}] = ofHealth
	}
	return all
}

// probes are what the clients try in state n: the same in each state of a case, except
// for what is known about the answers.
func (c Case) probes(n int) []Probe {
	b := probeBuilder{service: c.Name, state: c.States[n], now: c.States[n].frontends(), ever: map[frontend]bool{}}
	addrs, nodePorts := map[netip.Addr]bool{}, map[int32]bool{}
	for _, s := range c.States {
		for f := range s.frontends() {
			b.ever[f] = true
			switch {
			case f.addr.IsValid():
				addrs[f.addr] = true
			case f.protocol != healthProtocol:
				nodePorts[f.port] = true
			}
		}
		b.restricted = b.restricted || s.restricted()
	}
	numbers, protocols := c.ports()
	for a := range addrs {
		for _, protocol := range protocols {
			for _, port := range append(numbers, unusedPort) {
				b.add(frontend{a, port, protocol})
			}
		}
	}
	for port := range nodePorts {
		for _, protocol := range protocols {
			b.add(frontend{port: port, protocol: protocol})
		}
	}
	for f := range b.ever {
		if f.protocol == healthProtocol {
			b.add(f)
		}
	}
	c.addAnnotated(&b, addrs, nodePorts)
	slices.SortFunc(b.probes, func(x, y Probe) int { return strings.Compare(x.String(), y.String()) })
	return b.probes
}

// addAnnotated adds the first port of each annotated address that the Service never has.
func (c Case) addAnnotated(b *probeBuilder, addrs map[netip.Addr]bool, nodePorts map[int32]bool) {
	if c.States[0].Service == nil || len(c.States[0].Service.Spec.Ports) == 0 {
		return
	}
	first := c.States[0].Service.Spec.Ports[0]
	for _, word := range strings.Fields(c.States[0].Service.Annotations[probeAnnotation]) {
		if a, err := netip.ParseAddr(word); err == nil {
			if !addrs[a] {
				b.add(frontend{a, first.Port, protocolOf(first)})
			}
		} else if port, err := strconv.ParseUint(word, 10, 16); err == nil && !nodePorts[int32(port)] {
			b.add(frontend{port: int32(port), protocol: protocolOf(first)})
		}
	}
}

type probeBuilder struct {
	service    string
	state      State
	now        map[frontend]string
	ever       map[frontend]bool
	restricted bool
	probes     []Probe
}

func (b *probeBuilder) add(f frontend) {
	clients := someClients
	if b.ever[f] {
		clients = allClients
		if b.restricted {
			clients = append(slices.Clone(clients), "client2")
		}
	}
	if f.addr.IsValid() {
		b.addTarget(f, f.addr, clients)
		return
	}
	node, gateway := hostAddr("node1"), netlab.NodePodNetwork("node1").Nth(1)
	for _, a := range []netip.Addr{node.V4, node.V6} {
		b.addTarget(f, a, clients)
	}
	if !b.ever[f] {
		return
	}
	for _, a := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
		b.addTarget(f, a, []string{"node1"})
	}
	for _, a := range []netip.Addr{gateway.V4, gateway.V6} {
		b.addTarget(f, a, []string{"pod-x"})
	}
}

func (b *probeBuilder) addTarget(f frontend, a netip.Addr, clients []string) {
	kind, ok := b.now[f]
	if !ok {
		kind = ofNothing
	}
	p := Probe{
		Network: strings.ToLower(string(f.protocol)), Target: netip.AddrPortFrom(a, uint16(f.port)), Frontend: kind,
		service: b.service, most: b.state.endpoints(a.Is4()), sticky: ok && b.state.Service.Spec.SessionAffinity == corev1.ServiceAffinityClientIP,
	}
	if f.protocol == healthProtocol {
		p.most, p.sticky = 1, false // the proxy itself answers
	}
	for _, p.Client = range clients {
		b.probes = append(b.probes, p)
	}
}

// restricted says that the Service has source ranges.
func (s State) restricted() bool {
	return s.Service != nil && len(s.Service.Spec.LoadBalancerSourceRanges) > 0
}

// endpoints counts the endpoints of a family.
func (s State) endpoints(v4 bool) int {
	n := 0
	for _, slice := range s.Slices {
		if (slice.AddressType == discoveryv1.AddressTypeIPv4) == v4 {
			n += len(slice.Endpoints)
		}
	}
	return n
}

// Outcome is what became of the connections of a probe: who answered and what source
// address it saw, or how a connection failed; each once, in order.
type Outcome []string

// String joins the parts.
func (o Outcome) String() string { return strings.Join(o, ", ") }

// without are the parts that another outcome does not have.
func (o Outcome) without(other Outcome) Outcome {
	return slices.DeleteFunc(slices.Clone(o), func(part string) bool { return slices.Contains(other, part) })
}
