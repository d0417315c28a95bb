// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os/exec"
	"slices"

	"github.com/vishvananda/netlink"
)

// hostSysctls make every host answer at once and always: ICMP errors are not
// rationed, IPv6 addresses need no waiting, no redirect changes a route behind
// the test's back.
var hostSysctls = [][2]string{
	{"net/ipv4/icmp_ratemask", "0"},
	{"net/ipv6/icmp/ratelimit", "0"},
	{"net/ipv6/icmp/ratemask", "\n"}, // no type: also frees it from the limit of the whole machine
	{"net/ipv4/conf/all/rp_filter", "0"},
	{"net/ipv4/conf/default/rp_filter", "0"},
	{"net/ipv4/conf/all/send_redirects", "0"},
	{"net/ipv4/conf/default/send_redirects", "0"},
	{"net/ipv4/conf/all/accept_redirects", "0"},
	{"net/ipv4/conf/default/accept_redirects", "0"},
	{"net/ipv4/conf/all/route_localnet", "0"},
	{"net/ipv6/conf/all/disable_ipv6", "0"},
	{"net/ipv6/conf/default/disable_ipv6", "0"},
	{"net/ipv6/conf/all/accept_dad", "0"},
	{"net/ipv6/conf/default/accept_dad", "0"},
	{"net/ipv6/conf/default/accept_ra", "0"},
	{"net/ipv6/conf/default/accept_redirects", "0"},
}

// forwarding comes before hostSysctls, as it resets some of them.
var forwarding = [][2]string{
	{"net/ipv4/ip_forward", "1"},
	{"net/ipv6/conf/all/forwarding", "1"},
}

var bridgeNetfilter = [][2]string{
	{"net/bridge/bridge-nf-call-iptables", "1"},
	{"net/bridge/bridge-nf-call-ip6tables", "1"},
}

// everywhere is the default route's destination.
var everywhere = prefixes("0.0.0.0/0", "::/0")

func (l *Lab) router() error {
	r, err := l.newHost("router", NodeNetwork.Nth(1), forwarding...)
	if err != nil {
		return err
	}
	if err := addBridge(r, "lan", NodeNetwork.at(r.Addr)); err != nil {
		return err
	}
	// What only passes the switch must not be filtered or tracked there.
	err = r.sysctls([][2]string{{"net/bridge/bridge-nf-call-iptables", "0"}, {"net/bridge/bridge-nf-call-ip6tables", "0"}})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // without br_netfilter nothing is
	}
	return err
}

func addBridge(h *Host, name string, addr PrefixPair) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	snooping := false // neighbour solicitations are multicast and must arrive
	if err := h.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
		return &MissingError{"bridge", fmt.Errorf("%s on %s: %w", name, h.Name, err)}
	}
	if err := h.up(name); err != nil {
		return err
	}
	for _, p := range addr.each() {
		if err := h.addr(name, p); err != nil {
			return err
		}
	}
	return nil
}

// plug connects the interface port to a bridge of the same host.
func plug(h *Host, port, bridge string) error {
	p, err := h.link(port)
	if err != nil {
		return err
	}
	b, err := h.link(bridge)
	if err != nil {
		return err
	}
	if err := h.nl.LinkSetMaster(p, b); err != nil {
		return fmt.Errorf("%s: plugging %s into %s: %w", h.Name, port, bridge, err)
	}
	return nil
}

func (l *Lab) nodes() error {
	r := l.hosts["router"]
	for i, name := range l.nodeNames() {
		n, err := l.newHost(name, NodeNetwork.Nth(11+i), forwarding...)
		if err != nil {
			return err
		}
		if err := l.connect(r, "lan-"+name, n, "eth0", 1500); err != nil {
			return err
		}
		if err := plug(r, "lan-"+name, "lan"); err != nil {
			return err
		}
		if err := attach(n, NodeNetwork.at(n.Addr), r.Addr); err != nil {
			return err
		}
		if l.options.PodLink == Bridged {
			if err := addBridge(n, "cni0", podNetworks[i].at(podNetworks[i].Nth(1))); err != nil {
				return err
			}
			if err := n.filterBridged(); err != nil {
				return err
			}
		}
	}
	return nil
}

// filterBridged has packets of bridges pass iptables. Not every machine has loaded the module.
func (h *Host) filterBridged() error {
	err := h.sysctls(bridgeNetfilter)
	if errors.Is(err, fs.ErrNotExist) {
		_ = exec.Command("modprobe", "br_netfilter").Run() // the second attempt says what is missing
		if err = h.sysctls(bridgeNetfilter); errors.Is(err, fs.ErrNotExist) {
			return &MissingError{"br_netfilter", err}
		}
	}
	return err
}

// attach gives eth0 its addresses and the default routes by the gateway.
func attach(h *Host, addrs PrefixPair, gateway Pair) error {
	for _, p := range addrs.each() {
		if err := h.addr("eth0", p); err != nil {
			return err
		}
	}
	for _, p := range everywhere.each() {
		if err := h.route(p, "eth0", of(gateway, p.Addr())); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) clients() error {
	r := l.hosts["router"]
	for i, network := range []PrefixPair{ClientNetwork, ClientNetwork2} {
		name := fmt.Sprintf("client%d", i+1)
		c, err := l.newHost(name, network.Nth(10))
		if err != nil {
			return err
		}
		if err := l.connect(r, "to-"+name, c, "eth0", 1500); err != nil {
			return err
		}
		gateway := network.Nth(1)
		for _, p := range network.at(gateway).each() {
			if err := r.addr("to-"+name, p); err != nil {
				return err
			}
		}
		if err := attach(c, network.at(c.Addr), gateway); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) pods() error {
	used := map[string]int{}
	mtu := 1500
	if l.options.Underlay == VXLAN {
		mtu = 1450 // leaves room for the tunnel's headers over IPv4
	}
	for _, spec := range l.options.Pods {
		node := l.hosts[spec.Node]
		if node == nil || !slices.Contains(nodeNames, spec.Node) {
			return fmt.Errorf("Pod %s: there is no node %q", spec.Name, spec.Node)
		}
		network := NodePodNetwork(spec.Node)
		pod, err := l.newHost(spec.Name, network.Nth(10+used[spec.Node]))
		if err != nil {
			return err
		}
		used[spec.Node]++
		if err := l.connect(node, "veth-"+spec.Name, pod, "eth0", mtu); err != nil {
			return err
		}
		join := joinRouted
		if l.options.PodLink == Bridged {
			join = joinBridge
		}
		if err := join(node, pod, network); err != nil {
			return err
		}
	}
	return nil
}

// joinBridge plugs a Pod into cni0. Hairpin mode lets the bridge send a Pod's
// own packet back to it, which it needs to reach itself through a Service.
func joinBridge(node, pod *Host, network PrefixPair) error {
	port := "veth-" + pod.Name
	if err := plug(node, port, "cni0"); err != nil {
		return err
	}
	p, err := node.link(port)
	if err != nil {
		return err
	}
	if err := node.nl.LinkSetHairpin(p, true); err != nil {
		return fmt.Errorf("%s: hairpin mode of %s: %w", node.Name, port, err)
	}
	return attach(pod, network.at(pod.Addr), network.Nth(1))
}

// joinRouted makes the node the Pod's gateway on the link between the two.
func joinRouted(node, pod *Host, network PrefixPair) error {
	gateway := network.Nth(1)
	for _, p := range gateway.host().each() {
		if err := node.addr("veth-"+pod.Name, p); err != nil {
			return err
		}
		if err := pod.route(p, "eth0", netip.Addr{}); err != nil {
			return err
		}
	}
	for _, p := range pod.Addr.host().each() {
		if err := node.route(p, "veth-"+pod.Name, netip.Addr{}); err != nil {
			return err
		}
	}
	return attach(pod, pod.Addr.host(), gateway)
}

func (l *Lab) underlay() error {
	names := l.nodeNames()
	if l.options.Underlay == VXLAN {
		for _, name := range names {
			if err := addTunnel(l.hosts[name], NodePodNetwork(name)); err != nil {
				return err
			}
		}
	}
	for _, from := range names {
		for _, to := range names {
			if from == to {
				continue
			}
			if err := l.joinNodes(l.hosts[from], l.hosts[to], NodePodNetwork(to)); err != nil {
				return err
			}
		}
	}
	return nil
}

// joinNodes teaches a node the way to the Pods of another.
func (l *Lab) joinNodes(n, peer *Host, network PrefixPair) error {
	if l.options.Underlay == VXLAN {
		return tunnelTo(n, peer, network)
	}
	for _, p := range network.each() {
		if err := n.route(p, "eth0", of(peer.Addr, p.Addr())); err != nil {
			return err
		}
	}
	return nil
}

const (
	tunnelName = "flannel.1"
	tunnelID   = 1
	tunnelPort = 8472 // what Linux used before 4789 was assigned, and flannel still does
)

// addTunnel makes a node's end of the overlay. Its address is the first of the
// node's Pod range, which is what the other end sees as the node's source
// address.
func addTunnel(n *Host, network PrefixPair) error {
	parent, err := n.link("eth0")
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = tunnelName
	attrs.HardwareAddr = tunnelMAC(n)
	v := &netlink.Vxlan{
		LinkAttrs: attrs, VxlanId: tunnelID, Port: tunnelPort,
		VtepDevIndex: parent.Attrs().Index, SrcAddr: n.Addr.V4.AsSlice(), Learning: false,
	}
	if err := n.nl.LinkAdd(v); err != nil {
		return &MissingError{"vxlan", fmt.Errorf("%s on %s: %w", tunnelName, n.Name, err)}
	}
	if err := n.up(tunnelName); err != nil {
		return err
	}
	for _, p := range network.Nth(0).host().each() {
		if err := n.addr(tunnelName, p); err != nil {
			return err
		}
	}
	return nil
}

// tunnelMAC derives the address of a node's end from its own, so that the other
// end can be told without asking.
func tunnelMAC(n *Host) net.HardwareAddr {
	v4 := n.Addr.V4.As4()
	return append(net.HardwareAddr{0x02, 0x42}, v4[:]...)
}

// tunnelTo tells a node all that it must know of the other's end: no address is
// learned or asked for on the overlay.
func tunnelTo(n, peer *Host, network PrefixPair) error {
	dev, err := n.link(tunnelName)
	if err != nil {
		return err
	}
	index, mac := dev.Attrs().Index, tunnelMAC(peer)
	end := network.Nth(0)
	entries := []*netlink.Neigh{
		{LinkIndex: index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT, IP: end.V4.AsSlice(), HardwareAddr: mac},
		{LinkIndex: index, Family: netlink.FAMILY_V6, State: netlink.NUD_PERMANENT, IP: end.V6.AsSlice(), HardwareAddr: mac},
		// Forwarding database: frames to this MAC go to the peer's own address.
		{LinkIndex: index, Family: bridgeFamily, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF, IP: peer.Addr.V4.AsSlice(), HardwareAddr: mac},
	}
	for _, e := range entries {
		if err := n.nl.NeighSet(e); err != nil {
			return fmt.Errorf("%s: neighbour %s on %s: %w", n.Name, e.IP, tunnelName, err)
		}
	}
	for _, p := range network.each() {
		if err := n.route(p, tunnelName, of(end, p.Addr())); err != nil {
			return err
		}
	}
	return nil
}

const bridgeFamily = 7 // AF_BRIDGE

// routeVIPs teaches the router where Pods and virtual IPs are. Pods are routed
// so that a direct connection can be compared with one through a Service, and
// so that a Pod's answer which bypassed the node is seen rather than lost.
func (l *Lab) routeVIPs() error {
	for _, node := range l.nodeNames() {
		for _, p := range NodePodNetwork(node).each() {
			if err := l.RouteVIP(p, node); err != nil {
				return err
			}
		}
	}
	for _, network := range []PrefixPair{ServiceNetwork, ServiceNetwork2, ExternalNetwork} {
		for _, p := range network.each() {
			if err := l.RouteVIP(p, "node1"); err != nil {
				return err
			}
		}
	}
	return nil
}
