// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// PodLink is how Pods are connected to their node.
type PodLink uint8

const (
	// Routed gives every Pod a link of its own to the node: all its packets
	// are routed, also those to a Pod beside it.
	Routed PodLink = iota
	// Bridged plugs the Pods of a node into a bridge, cni0, whose ports have
	// hairpin mode on and whose packets go through netfilter's IP hooks
	// (br_netfilter), as the bridge CNI plugin sets it up.
	Bridged
)

// Underlay is how the Pods of one node reach those of another.
type Underlay uint8

const (
	// HostGateway routes a node's Pods by the node itself.
	HostGateway Underlay = iota
	// VXLAN carries packets between the nodes in a tunnel, device flannel.1.
	VXLAN
)

// PodSpec is one Pod of a lab.
type PodSpec struct {
	// Name is at most 10 bytes long, as it becomes part of an interface name.
	Name string
	// Node is "node1", "node2" or "node3".
	Node string
}

// DefaultPods is what Options.Pods nil stands for. pod-x is meant to be a
// client only.
var DefaultPods = []PodSpec{
	{"pod-a", "node1"}, {"pod-b", "node1"}, {"pod-x", "node1"},
	{"pod-c", "node2"}, {"pod-d", "node2"},
}

// nodeNames lists the nodes that a lab may have. The first two are always there,
// the third where a Pod is on it.
var nodeNames = []string{"node1", "node2", "node3"}

func (l *Lab) nodeNames() []string {
	if slices.ContainsFunc(l.options.Pods, func(p PodSpec) bool { return p.Node == nodeNames[2] }) {
		return nodeNames
	}
	return nodeNames[:2]
}

// Options says how a lab is built.
type Options struct {
	PodLink  PodLink
	Underlay Underlay
	// Pods may be nil for DefaultPods; at most 200.
	Pods []PodSpec
	// Ports are the TCP, UDP and SCTP ports on which Pods and nodes answer; nil for
	// 8080 and 8081. ControlPort is always answered, too.
	Ports []uint16
}

// ControlPort answers on every Pod and node, and no Service should use it: a
// connection there tells whether the network itself works.
const ControlPort = 7

// SilentPort takes UDP datagrams on every Pod and node and answers none: see
// Conn.Tell.
const SilentPort = 514

// Lab is a network of hosts. It is made by New and ends with Close.
type Lab struct {
	hosts map[string]*Host
	home  netns.NsHandle // the namespace of the process
	// namespaces is held while a thread moves to a namespace, and while Close closes them.
	namespaces sync.RWMutex
	options    Options
	servers    []server
	told       told
}

// New builds a lab. A kernel that cannot build it is reported as a
// *MissingError.
func New(o Options) (*Lab, error) {
	if o.Pods == nil {
		o.Pods = DefaultPods
	}
	if o.Ports == nil {
		o.Ports = []uint16{8080, 8081}
	}
	l, err := empty(o)
	if err != nil {
		return nil, err
	}
	for _, step := range []func() error{l.router, l.nodes, l.clients, l.pods, l.underlay, l.routeVIPs, l.serve} {
		if err := step(); err != nil {
			l.Close()
			return nil, err
		}
	}
	return l, nil
}

// Lone builds a lab of one host that is connected to nothing.
func Lone(name string) (*Lab, error) {
	l, err := empty(Options{})
	if err != nil {
		return nil, err
	}
	if _, err := l.newHost(name, Pair{}); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func empty(o Options) (*Lab, error) {
	home, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("the process's network namespace: %w", err)
	}
	return &Lab{hosts: map[string]*Host{}, home: home, options: o}, nil
}

// Host returns a host by its name, or nil: router, the nodes, client1, client2
// and the Pods.
func (l *Lab) Host(name string) *Host { return l.hosts[name] }

// Hosts returns every host, sorted by name.
func (l *Lab) Hosts() []*Host {
	var hs []*Host
	for _, name := range slices.Sorted(maps.Keys(l.hosts)) {
		hs = append(hs, l.hosts[name])
	}
	return hs
}

// Close ends the servers and lets go of the namespaces, which the kernel then
// takes apart. Connections still open keep theirs until they are closed. Functions that
// still run inside a host go on; no new one can enter it.
func (l *Lab) Close() error {
	for _, s := range l.servers {
		s.close()
	}
	l.namespaces.Lock()
	defer l.namespaces.Unlock()
	for _, h := range l.hosts {
		h.close()
	}
	l.hosts = nil
	return l.home.Close()
}

// enter moves the calling thread to a namespace of the lab. After Close it is an error:
// the descriptor's number may belong to another file by then.
func (l *Lab) enter(ns *netns.NsHandle) error {
	l.namespaces.RLock()
	defer l.namespaces.RUnlock()
	if !ns.IsOpen() {
		return errClosed
	}
	return netns.Set(*ns)
}

// RouteVIP makes clients reach the addresses of a range by the named node.
func (l *Lab) RouteVIP(p netip.Prefix, node string) error {
	n := l.hosts[node]
	if n == nil {
		return fmt.Errorf("the lab has no host %s", node)
	}
	return l.hosts["router"].route(p, "lan", of(n.Addr, p.Addr()))
}

// NodePodNetwork is the range of Pod addresses of one node, as in spec.podCIDRs.
func NodePodNetwork(node string) PrefixPair {
	return podNetworks[max(0, slices.Index(nodeNames, node))]
}

// of picks the address of the same family as like.
func of(p Pair, like netip.Addr) netip.Addr {
	if like.Is4() {
		return p.V4
	}
	return p.V6
}

func (l *Lab) newHost(name string, addr Pair, settings ...[2]string) (*Host, error) {
	h, err := newHost(l, name, addr)
	if err != nil {
		return nil, err
	}
	l.hosts[name] = h
	return h, h.sysctls(append(settings, hostSysctls...))
}

// connect makes a veth pair between two hosts and sets both ends up.
func (l *Lab) connect(a *Host, aName string, b *Host, bName string, mtu int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = aName, mtu
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: bName, PeerNamespace: netlink.NsFd(int(b.ns)), PeerMTU: uint32(mtu)}
	if err := a.nl.LinkAdd(veth); err != nil {
		return &MissingError{"veth", fmt.Errorf("%s to %s: %w", a.Name, b.Name, err)}
	}
	if err := a.up(aName); err != nil {
		return err
	}
	return b.up(bName)
}

// GiveRange makes a Pod with a routed link answer at every address of a range: its own
// listeners at no certain address do.
func (l *Lab) GiveRange(p netip.Prefix, pod string) error {
	spec := l.options.Pods[slices.IndexFunc(l.options.Pods, func(s PodSpec) bool { return s.Name == pod })]
	if err := l.hosts[spec.Node].route(p, "veth-"+pod, of(l.hosts[pod].Addr, p.Addr())); err != nil {
		return err
	}
	if err := l.RouteVIP(p, spec.Node); err != nil {
		return err
	}
	lo, err := l.hosts[pod].link("lo")
	if err != nil {
		return err
	}
	local := &netlink.Route{Dst: ipNet(p), LinkIndex: lo.Attrs().Index, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST}
	if err := l.hosts[pod].nl.RouteReplace(local); err != nil {
		return fmt.Errorf("%s: making %s local: %w", pod, p, err)
	}
	return nil
}
