// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"signalbox/internal/tcprelay"
	"signalbox/node"
	"signalbox/proxier/plan"
)

// ports are the relay's ports, one for each traffic source, from this number on.
type ports uint16

func (p ports) of(o trafficSource) uint16 { return uint16(p) + uint16(o) }

// firstPorts are tried first. They lie below the ports that the kernel gives to
// connections and outside of those for NodePorts. A relay that starts while
// another ends takes the same ones, so that UDP flows that the kernel knows go
// on.
const firstPorts ports = 10361

// portTries is how many groups of ports are tried.
const portTries = 32

// listeners are the sockets that redirected traffic arrives at.
type listeners struct {
	ports ports
	tcp   [trafficSourceCount]*net.TCPListener
	udp   [trafficSourceCount]*net.UDPConn
}

func (l *listeners) close() {
	for o := range trafficSourceCount {
		if l.tcp[o] != nil {
			tcprelay.CloseListener(l.tcp[o])
		}
		if l.udp[o] != nil {
			l.udp[o].Close()
		}
	}
}

// listen opens the sockets in the network namespace of the calling thread.
func listen(f plan.Family) (*listeners, error) {
	var err error
	for n := range portTries {
		l := &listeners{ports: firstPorts + ports(n)*ports(trafficSourceCount)}
		if err = l.open(f); err == nil {
			return l, nil
		}
		l.close()
		if !errors.Is(err, unix.EADDRINUSE) {
			break
		}
	}
	return nil, fmt.Errorf("listen for redirected traffic: %w", err)
}

func (l *listeners) open(f plan.Family) (err error) {
	for o := range trafficSourceCount {
		at := netip.AddrPortFrom(plan.Unspecified(f), l.ports.of(o))
		if l.tcp[o], err = tcprelay.ListenTCP(at); err != nil {
			return err
		}
		if l.udp[o], err = tcprelay.ListenUDP(at, udpOptions(f)...); err != nil {
			return err
		}
	}
	return l.selectAny()
}

// secondSocket is a program that has the kernel choose the second of the sockets
// that share a port (SO_ATTACH_REUSEPORT_CBPF, Linux 4.6). It keeps them in the
// order in which they were opened. Where there is no second, any is chosen as if
// there were no program.
var secondSocket = []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 1}}

// selectSecond has the kernel give new packets to the sockets of a relay that was
// started later. What arrived before can still be read from these sockets.
func (l *listeners) selectSecond() error {
	program := &unix.SockFprog{Len: uint16(len(secondSocket)), Filter: &secondSocket[0]}
	return l.each(func(fd int) error {
		return os.NewSyscallError("setsockopt", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, program))
	})
}

// selectAny removes the program of an earlier relay, which stays with the port.
func (l *listeners) selectAny() error {
	return l.each(func(fd int) error {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return os.NewSyscallError("setsockopt", err)
	})
}

// each calls fn for all sockets, up to the first error.
func (l *listeners) each(fn func(fd int) error) error {
	for o := range trafficSourceCount {
		for _, s := range []syscall.Conn{l.tcp[o], l.udp[o]} {
			raw, err := s.SyscallConn()
			if err != nil {
				return err
			}
			if err := tcprelay.Control(raw, fn); err != nil {
				return err
			}
		}
	}
	return nil
}

// udpOptions are those of the sockets that datagrams arrive at.
func udpOptions(f plan.Family) []tcprelay.SocketOption {
	options := []tcprelay.SocketOption{
		tcprelay.IntOption(unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1),
		bufferOption(unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, arrivalBuffer),
		bufferOption(unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, answerBuffer),
	}
	if f == plan.IPv6 {
		// Freebind lets answers leave from addresses that are on no device.
		return append(options, tcprelay.IntOption(unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1),
			tcprelay.IntOption(unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1))
	}
	return append(options, tcprelay.IntOption(unix.IPPROTO_IP, unix.IP_PKTINFO, 1))
}

// dialer opens connections to endpoints.
type dialer struct {
	ns      *tcprelay.Namespace
	sources sourcePorts
	own     []tcprelay.SocketOption // from the node's address
	// transparentUDP and transparentTCP are for connections from their client's address.
	transparentUDP, transparentTCP []tcprelay.SocketOption
}

// newDialer makes a dialer for the network namespace of the calling thread, ns.
func newDialer(f plan.Family, ns *tcprelay.Namespace) *dialer {
	transparent := tcprelay.IntOption(unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1)
	if f == plan.IPv6 {
		transparent = tcprelay.IntOption(unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, 1)
	}
	d := &dialer{ns: ns, sources: readSourcePorts(), own: []tcprelay.SocketOption{tcprelay.IntOption(unix.SOL_SOCKET, unix.SO_PRIORITY, ownTraffic)}}
	d.transparentUDP = append(d.own[:1:1], transparent)
	// Connections to different endpoints may have the same port.
	d.transparentTCP = append(d.transparentUDP[:2:2], tcprelay.IntOption(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		tcprelay.IntOption(unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1))
	return d
}

// dial connects from a client's address, or with the zero one from the node's.
func (d *dialer) dial(ctx context.Context, protocol string, client netip.Addr, to netip.AddrPort) (net.Conn, error) {
	if !client.IsValid() {
		return d.ns.Dial(ctx, protocol, netip.AddrPort{}, to, d.own...)
	}
	for range sourcePortTries {
		conn, err := d.dialFrom(ctx, protocol, netip.AddrPortFrom(client, d.sources.any()), to)
		if !isPortTaken(err) {
			return conn, err
		}
	}
	return d.dialFrom(ctx, protocol, netip.AddrPortFrom(client, 0), to)
}

// dialFrom connects from an address that need not be this node's. With port 0
// the kernel chooses one.
func (d *dialer) dialFrom(ctx context.Context, protocol string, from, to netip.AddrPort) (net.Conn, error) {
	if protocol == "udp" {
		return d.ns.Dial(ctx, protocol, from, to, d.transparentUDP...)
	}
	return d.ns.Dial(ctx, protocol, from, to, d.transparentTCP...)
}

// Transparent connections take a source port between these, because the client may
// itself be connected to the same endpoint: from the same port the two would be one
// connection to everybody who sees the packets, and the relay's packets could end the
// client's. Clients use 32768 and above by default (net.ipv4.ip_local_port_range;
// other systems 49152 and above), NodePorts begin at 30000, and the relay's own ports
// lie below. IP_LOCAL_PORT_RANGE (Linux 6.3) allows only ports inside of
// ip_local_port_range.
const (
	firstSourcePort = 11000
	lastSourcePort  = 29999
)

// sourcePortTries is how many ports are tried before the kernel may choose any.
const sourcePortTries = 8

// sourcePorts are the ports to choose from.
type sourcePorts []uint16

// readSourcePorts leaves out net.ipv4.ip_local_reserved_ports, which is for IPv6 too.
func readSourcePorts() sourcePorts {
	reserved, err := node.Sysctl("net/ipv4/ip_local_reserved_ports")
	if err != nil {
		slog.Warn("userspace: net.ipv4.ip_local_reserved_ports cannot be read; connections to endpoints may take reserved ports", "error", err)
	}
	return sourcePortsWithout(reserved)
}

// sourcePortsWithout takes reserved ports in the notation of the sysctl: "80,100-120".
func sourcePortsWithout(reserved string) sourcePorts {
	isReserved := [1 << 16]bool{}
	for item := range strings.SplitSeq(reserved, ",") {
		var first, last uint16
		if n, _ := fmt.Sscanf(item, "%d-%d", &first, &last); n == 1 {
			last = first
		}
		for p := int(first); p <= int(last); p++ {
			isReserved[p] = true
		}
	}
	var list sourcePorts
	for p := uint16(firstSourcePort); p <= lastSourcePort; p++ {
		if !isReserved[p] {
			list = append(list, p)
		}
	}
	return list
}

// any is one of the ports, or 0, with which the kernel chooses, if there are none.
func (p sourcePorts) any() uint16 {
	if len(p) == 0 {
		return 0
	}
	return p[rand.IntN(len(p))]
}

// isPortTaken says whether a connection failed because of its source port.
func isPortTaken(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL)
}
