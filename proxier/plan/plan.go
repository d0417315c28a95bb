// SPDX-License-Identifier: Apache-2.0

// Package plan has the values that tell a Proxier what this node must do: Service
// ports with their frontends and endpoint sets, and what changed since the last Sync.
package plan

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Family is an IP family. A Plan and a Proxier serve exactly one.
type Family uint8

// The two IP families, numbered as in the IP header's version field.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Families lists both families in the order in which they are programmed.
var Families = []Family{IPv4, IPv6}

// String returns "IPv4" or "IPv6", the spelling of the Service API.
func (f Family) String() string { return fmt.Sprintf("IPv%d", uint8(f)) }

// HostBits is the length of a prefix that holds one address: 32 or 128.
func (f Family) HostBits() int {
	if f == IPv6 {
		return 128
	}
	return 32
}

// FamilyOf returns the family of a valid address. An IPv4-mapped IPv6 address
// counts as IPv6: callers unmap first where that matters.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// Localhost is the loopback address at which NodePorts of a family are served.
func Localhost(f Family) netip.Addr {
	if f == IPv6 {
		return netip.IPv6Loopback()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// Unspecified is 0.0.0.0 or ::.
func Unspecified(f Family) netip.Addr {
	if f == IPv6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// Protocol is an IANA protocol number (RFC 5237); only the three that a
// Service may name are valid.
type Protocol uint8

// The protocols of the Service API.
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// Protocols lists every valid Protocol in numeric order.
var Protocols = []Protocol{TCP, UDP, SCTP}

// String returns the lower-case name that nft and iptables print: tcp, udp or
// sctp.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case SCTP:
		return "sctp"
	}
	return fmt.Sprintf("protocol-%d", uint8(p))
}

// ServiceName is the namespace and name of a Service.
type ServiceName struct{ Namespace, Name string }

// String returns "namespace/name".
func (n ServiceName) String() string { return n.Namespace + "/" + n.Name }

// Compare orders names by namespace, then by name.
func (n ServiceName) Compare(o ServiceName) int {
	return cmp.Or(cmp.Compare(n.Namespace, o.Namespace), cmp.Compare(n.Name, o.Name))
}

// ServicePortName identifies one port of one Service. Port is the port's name
// and is empty for the single port of a Service that has no port names.
type ServicePortName struct {
	ServiceName
	Port     string
	Protocol Protocol
}

// String returns "namespace/name:port", or "namespace/name" for an unnamed
// port, as kube-proxy writes it in rules, comments and logs.
func (n ServicePortName) String() string {
	if n.Port == "" {
		return n.ServiceName.String()
	}
	return n.ServiceName.String() + ":" + n.Port
}

// Compare orders names by namespace, name, port name and protocol.
func (n ServicePortName) Compare(o ServicePortName) int {
	return cmp.Or(
		n.ServiceName.Compare(o.ServiceName),
		cmp.Compare(n.Port, o.Port),
		cmp.Compare(n.Protocol, o.Protocol),
	)
}

// Endpoint is one address and port that connections are sent to.
type Endpoint struct {
	netip.AddrPort
	// MayHairpin says that the endpoint can be the source of a connection that
	// this node sends back to it. That connection's source must be rewritten or
	// the answer would bypass the node.
	MayHairpin bool
	// Weight is the endpoint's share of new connections, compared with others
	// of its set, in a mode that has weights; 0 stands for 1. See
	// AnnotationWeights.
	Weight uint16
}

// EndpointSet is a set of endpoints among which new connections are spread,
// evenly but for weights and schedulers. Sets are immutable once resolved and shared by reference: two
// frontends with the same *EndpointSet send traffic to the same place.
// Endpoints are sorted by address and port and hold no duplicates.
type EndpointSet struct {
	Endpoints []Endpoint
}

// Len is the number of endpoints; a nil set has none.
func (s *EndpointSet) Len() int {
	if s == nil {
		return 0
	}
	return len(s.Endpoints)
}

// Contains says whether an endpoint is at an address and port; a nil set has none.
func (s *EndpointSet) Contains(a netip.AddrPort) bool {
	if s == nil {
		return false
	}
	_, found := slices.BinarySearchFunc(s.Endpoints, a, func(e Endpoint, a netip.AddrPort) int { return e.AddrPort.Compare(a) })
	return found
}

// FrontendKind says which field of a Service a frontend comes from. It serves
// messages and layout (kube-proxy's chains differ by kind); no policy follows
// from it that the Frontend does not say itself.
type FrontendKind uint8

// The kinds of frontends.
const (
	ClusterIP FrontendKind = iota
	ExternalIP
	LoadBalancerIP
	NodePort
)

// String returns the words used in messages and rendered rules.
func (k FrontendKind) String() string {
	switch k {
	case ClusterIP:
		return "cluster IP"
	case ExternalIP:
		return "external IP"
	case LoadBalancerIP:
		return "load-balancer IP"
	case NodePort:
		return "node port"
	}
	return fmt.Sprintf("frontend-kind-%d", uint8(k))
}

// Verdict says what happens to a new connection if the endpoint set for its traffic
// source is empty.
type Verdict uint8

const (
	// Reject answers with ICMP port unreachable, which a TCP client sees as
	// "connection refused". No endpoint exists anywhere.
	Reject Verdict = iota
	// Drop discards the packet silently, so that a load balancer retries on
	// another node. Endpoints exist, but the traffic policy forbids them here.
	Drop
)

// String returns the nft word of the verdict.
func (v Verdict) String() string {
	if v == Drop {
		return "drop"
	}
	return "reject"
}

// TrafficSources is a set of places from which a connection can come, as this
// node sees it.
type TrafficSources uint8

const (
	// FromPods is traffic of Pods on this node, as Node.LocalPods tells them
	// apart. Where it cannot, Pods count as FromOutside.
	FromPods TrafficSources = 1 << iota
	// FromNode is traffic of processes in the node's own network namespace:
	// its source address is one of the node's.
	FromNode
	// FromOutside is everything else.
	FromOutside

	// NoSource is the empty set.
	NoSource TrafficSources = 0
	// AnySource holds all sources.
	AnySource = FromPods | FromNode | FromOutside
)

// FrontendKey is what a packet is matched by: no two frontends of a Plan share
// one. The zero Addr stands for every address that serves NodePorts.
type FrontendKey struct {
	Addr     netip.Addr
	Port     uint16
	Protocol Protocol
}

// String returns for example "10.96.0.1:443/tcp" or "node:30080/udp".
func (k FrontendKey) String() string {
	if !k.Addr.IsValid() {
		return fmt.Sprintf("node:%d/%s", k.Port, k.Protocol)
	}
	return fmt.Sprintf("%s/%s", netip.AddrPortFrom(k.Addr, k.Port), k.Protocol)
}

// Includes says whether k is the other key, or the other key without port or protocol.
func (k FrontendKey) Includes(o FrontendKey) bool {
	return k.Addr == o.Addr && (k.Port == 0 || k.Port == o.Port) && (k.Protocol == 0 || k.Protocol == o.Protocol)
}

// Frontend is one address and port at which a Service is reached.
type Frontend struct {
	Kind FrontendKind
	// Addr is the zero Addr for a NodePort: any address in
	// Node.NodePortAddrs.
	Addr netip.Addr
	Port uint16

	// Internal is where connections FromPods and FromNode go, External where
	// those FromOutside go. Both are always set and are the same pointer
	// unless the external traffic policy tells them apart.
	Internal, External *EndpointSet
	// WhenEmpty applies if the set for the traffic source is empty.
	WhenEmpty Verdict
	// Masquerade has the traffic sources whose source address is rewritten to the
	// node's. A hairpin connection (source address equal to the chosen
	// endpoint's) is always rewritten, whatever this says.
	Masquerade TrafficSources
	// Sources, where not nil, are the only source addresses that may use this
	// frontend, wherever they are; all others are dropped, before WhenEmpty is
	// looked at. A set but empty slice admits nobody.
	Sources []netip.Prefix
	// Bypass has the addresses of this frontend at which processes of this node do
	// not reach the Service but the API server: see Node.Bypass.
	Bypass []netip.Addr
	// ForeignAddr says that Addr is an API server's. A mode must not make it an
	// address of the node, because the node could not reach the API server then.
	ForeignAddr bool
}

// Key returns what packets to this frontend are matched by.
func (f *Frontend) Key(p Protocol) FrontendKey {
	return FrontendKey{Addr: f.Addr, Port: f.Port, Protocol: p}
}

// ServicePort is everything this node must do for one port of one Service in
// one IP family. It is a value: never changed once it is in a Plan, only
// replaced.
type ServicePort struct {
	Name ServicePortName
	// AffinityTimeout, where not zero, keeps a client (by source address,
	// whichever frontend it uses) on one endpoint until it has opened no new
	// connection for this long. Whole seconds.
	AffinityTimeout time.Duration
	// Frontends in the order cluster IP, external IPs, load-balancer IPs,
	// node port.
	Frontends []Frontend
	// Usable holds every endpoint that still answers, whatever policy, topology or
	// termination say. Flows to these must not be cut.
	Usable *EndpointSet
	// Listed holds every endpoint that an EndpointSlice has, whatever its conditions. It
	// is nil unless TCP connections to removed endpoints are reset.
	Listed *EndpointSet
	// HealthCheckNodePort is the TCP port on which a load balancer asks whether
	// this node has local endpoints; 0 for none. One Service port has it for the
	// whole Service.
	HealthCheckNodePort uint16
	// LocalEndpoints is the answer on HealthCheckNodePort: the number of addresses
	// of ready endpoints on this node, over all ports of the Service. 0 without a
	// HealthCheckNodePort.
	LocalEndpoints int
	// Scheduler is the kernel's name of the scheduler, in a mode that has
	// schedulers; "" for the mode's default.
	Scheduler string
}

// LocalPods tells connections of this node's Pods from others. The zero value
// cannot: then nothing is FromPods, and a ClusterIP's Masquerade never depends
// on it.
type LocalPods struct {
	// Prefixes holds the source addresses of local Pods (modes ClusterCIDR
	// and NodeCIDR).
	Prefixes []netip.Prefix
	// Interface is the one interface that local Pods' packets enter by (mode
	// BridgeInterface).
	Interface string
	// InterfacePrefix is what the names of all such interfaces begin with
	// (mode InterfaceNamePrefix).
	InterfacePrefix string
}

// Known says whether local Pods can be told apart at all.
func (l LocalPods) Known() bool {
	return len(l.Prefixes) > 0 || l.Interface != "" || l.InterfacePrefix != ""
}

// NodePortAddrs are the node's addresses at which NodePorts are served.
type NodePortAddrs struct {
	// All serves every local address that is not loopback; Addrs is then not
	// looked at.
	All bool
	// Addrs are single addresses of one family. A loopback address is served
	// only where Node.LocalhostNodePorts is set and the mode can.
	Addrs []netip.Addr
}

// RouteSource is the source address of packets that leave by an interface for a
// destination, as the node's routes name it.
type RouteSource struct {
	Link        string
	Destination netip.Prefix
	// Source is not valid where the route names none, or the one that masquerade
	// takes: an exception to a RouteSource of the same interface whose prefix is
	// shorter.
	Source netip.Addr
}

// Node is what rules need to know about this node in one IP family.
type Node struct {
	LocalPods     LocalPods
	NodePortAddrs NodePortAddrs
	// OwnPods is the range of this node's Pods where LocalPods has those of other
	// nodes too, and it is known. A connection to a Service from LocalPods.Prefixes
	// that neither comes from OwnPods nor goes there is between other nodes. Its
	// source must be rewritten or the answer would bypass this node.
	OwnPods []netip.Prefix
	// LocalhostNodePorts serves NodePorts on the loopback address of the
	// family: see Settings.ServesLocalhost.
	LocalhostNodePorts bool
	// ServiceCIDRs are the ranges that cluster IPs are given from; an address
	// in them that no Service holds is dropped.
	ServiceCIDRs []netip.Prefix
	// RouteSources are the addresses that sources are rewritten to, in place of
	// those that masquerade takes: an address of the interface that a packet leaves
	// by. The first that fits a packet counts. Where none does, masquerade chooses.
	RouteSources []RouteSource
	// Bypass has the addresses and TCP ports at which processes of this node reach
	// the API server, although a Service has them too or a ServiceCIDR has the address.
	// Their packets pass as if that Service or ServiceCIDR did not exist.
	Bypass []netip.AddrPort
	// ResetStrays has TCP packets to Services reset that belong to no connection the
	// kernel knows, as after the end of their endpoint.
	ResetStrays bool
}

// BetweenNodes says whether a connection to a Service is one from a Pod of another
// node to an endpoint of another node. See OwnPods.
func (n *Node) BetweenNodes(client, endpoint netip.Addr) bool {
	return len(n.OwnPods) > 0 && AnyContains(n.LocalPods.Prefixes, client) && !AnyContains(n.OwnPods, client) && !AnyContains(n.OwnPods, endpoint)
}

// Plan is what this node must do in one IP family: the whole desired state. It
// belongs to the goroutine of the Loop; a Proxier must not keep it beyond Sync
// (the ServicePorts in it, being immutable, it may keep).
type Plan struct {
	Family   Family
	Node     Node
	Services map[ServicePortName]*ServicePort // by ServicePort.Name
}

// Names lists the Service ports, sorted.
func (p *Plan) Names() []ServicePortName {
	return slices.SortedFunc(maps.Keys(p.Services), ServicePortName.Compare)
}

// Check is what every Sync begins with: an error if ctx has ended, or if a mode's
// Proxier of a family was given another family's plan.
func (p *Plan) Check(ctx context.Context, mode string, f Family) error {
	if p.Family != f {
		return fmt.Errorf("mode %s: a plan for %s given to the proxier of %s", mode, p.Family, f)
	}
	return ctx.Err()
}

// Change names what differs between a Plan and the one last synced.
type Change struct {
	// All asks for a full write: nothing is known about the
	// kernel's state.
	All bool
	// Node says that Plan.Node changed.
	Node bool
	// Services that were added, replaced or (where Plan.Services lacks them)
	// removed. Each at most once.
	Services []ServicePortName
}

// Empty says that there is nothing to do.
func (c Change) Empty() bool { return !c.All && !c.Node && len(c.Services) == 0 }

// FlowOwner says who may answer flows to some frontends.
type FlowOwner struct {
	// Frontends are of protocol UDP, or TCP if there are Removed endpoints.
	Frontends []FrontendKey
	// Usable is empty if the Service has no endpoint left, and for frontends that
	// no Service has any more.
	Usable *EndpointSet
	// Removed are the only endpoints whose TCP connections end, unless they are Usable.
	Removed []netip.AddrPort
}

// RemovedEndpoints lists what one set has and the next lacks, in order. It is empty if
// one of them is nil.
func RemovedEndpoints(old, next *EndpointSet) (removed []netip.AddrPort) {
	if old == nil || next == nil || old == next {
		return nil
	}
	for _, e := range old.Endpoints {
		if !next.Contains(e.AddrPort) {
			removed = append(removed, e.AddrPort)
		}
	}
	return removed
}

// Removed lists the endpoints that no EndpointSlice of a Service port has any more, now
// that it is next. If one of the two is nil, there are none.
func (p *ServicePort) Removed(next *ServicePort) []netip.AddrPort {
	if p == nil || next == nil {
		return nil
	}
	return RemovedEndpoints(p.Listed, next.Listed)
}

// Keys are what packets to a Service port are matched by; none for nil.
func (p *ServicePort) Keys() []FrontendKey {
	if p == nil {
		return nil
	}
	keys := make([]FrontendKey, len(p.Frontends))
	for i := range p.Frontends {
		keys[i] = p.Frontends[i].Key(p.Name.Protocol)
	}
	return keys
}

// HealthCheck is the answer to a load balancer that asks this node about a Service
// (spec.healthCheckNodePort).
type HealthCheck struct {
	// Port is the TCP port on which it asks.
	Port uint16
	// LocalEndpoints counts the addresses of ready endpoints on this node, over
	// all ports of the Service.
	LocalEndpoints int
}

// NoEndpoints is the only empty set, so that two empty sets have one pointer.
var NoEndpoints = &EndpointSet{}

// AnyContains says whether one of the prefixes holds an address.
func AnyContains(prefixes []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}
