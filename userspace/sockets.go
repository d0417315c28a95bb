package userspace

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/tcprelay"
	"signalbox/proxier"
)

// ports are the relay's ports, one for each origin, from this number on.
type ports uint16

func (p ports) of(o origin) uint16 { return uint16(p) + uint16(o) }

// firstPorts are tried first. They lie below the ports that the kernel gives to
// connections and outside of those for NodePorts. A relay that starts while
// another ends takes the same ones, so that UDP flows that the kernel knows go
// on.
const firstPorts ports = 10361

// portTries is how many groups of ports are tried.
const portTries = 32

// listeners are the sockets that captured traffic arrives at.
type listeners struct {
	ports ports
	tcp   [originCount]*net.TCPListener
	udp   [originCount]*net.UDPConn
}

func (l *listeners) close() {
	for o := range originCount {
		if l.tcp[o] != nil {
			l.tcp[o].Close()
		}
		if l.udp[o] != nil {
			l.udp[o].Close()
		}
	}
}

// listen opens the sockets in the network namespace of the calling thread.
func listen(f proxier.Family) (*listeners, error) {
	var err error
	for n := range portTries {
		l := &listeners{ports: firstPorts + ports(n)*ports(originCount)}
		if err = l.open(f); err == nil {
			return l, nil
		}
		l.close()
		if !errors.Is(err, unix.EADDRINUSE) {
			break
		}
	}
	return nil, fmt.Errorf("listen for captured traffic: %w", err)
}

func (l *listeners) open(f proxier.Family) (err error) {
	for o := range originCount {
		if l.tcp[o], err = listenTCP(f, l.ports.of(o)); err != nil {
			return err
		}
		if l.udp[o], err = listenUDP(f, l.ports.of(o)); err != nil {
			return err
		}
	}
	return l.share()
}

// secondSocket is a program that has the kernel choose the second of the sockets
// that share a port (SO_ATTACH_REUSEPORT_CBPF, Linux 4.6). It keeps them in the
// order in which they were opened. Where there is no second, any is chosen as if
// there were no program.
var secondSocket = []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 1}}

// leave has the kernel lead what arrives from now on to the sockets of a relay
// that was started later. What arrived before can be taken from these yet. With no
// such relay what arrives still comes here.
func (l *listeners) leave() error {
	program := &unix.SockFprog{Len: uint16(len(secondSocket)), Filter: &secondSocket[0]}
	return l.each(func(fd int) error {
		return syscallError("setsockopt", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, program))
	})
}

// share undoes what the leave of an earlier relay has left with the port.
func (l *listeners) share() error {
	return l.each(func(fd int) error {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return syscallError("setsockopt", err)
	})
}

// each does something to all sockets, up to the first error.
func (l *listeners) each(do func(fd int) error) error {
	for o := range originCount {
		for _, s := range []syscall.Conn{l.tcp[o], l.udp[o]} {
			raw, err := s.SyscallConn()
			if err != nil {
				return err
			}
			var failed error
			if err := raw.Control(func(fd uintptr) { failed = do(int(fd)) }); err != nil || failed != nil {
				return errors.Join(err, failed)
			}
		}
	}
	return nil
}

func listenTCP(f proxier.Family, port uint16) (*net.TCPListener, error) {
	config, network, at := listenConfig(f, "tcp", port)
	l, err := config.Listen(context.Background(), network, at)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

func listenUDP(f proxier.Family, port uint16) (*net.UDPConn, error) {
	config, network, at := listenConfig(f, "udp", port)
	c, err := config.ListenPacket(context.Background(), network, at)
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

func listenConfig(f proxier.Family, protocol string, port uint16) (config net.ListenConfig, network, at string) {
	config = net.ListenConfig{KeepAlive: -1, Control: control(listenOptions(f))}
	config.SetMultipathTCP(false)
	any, suffix := netip.IPv4Unspecified(), "4"
	if f == proxier.IPv6 {
		any, suffix = netip.IPv6Unspecified(), "6"
	}
	return config, protocol + suffix, netip.AddrPortFrom(any, port).String()
}

// option sets one socket option; network is "tcp4" or the like.
type option func(network string, fd int) error

func control(options []option) func(string, string, syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) {
			for _, set := range options {
				if failed = set(network, int(fd)); failed != nil {
					return
				}
			}
		})
		return errors.Join(err, failed)
	}
}

func intOption(level, name, value int) option {
	return func(_ string, fd int) error {
		return syscallError("setsockopt", unix.SetsockoptInt(fd, level, name, value))
	}
}

func syscallError(call string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", call, err)
	}
	return nil
}

func onlyFor(protocol string, options ...option) option {
	return func(network string, fd int) error {
		if network[:3] != protocol {
			return nil
		}
		for _, set := range options {
			if err := set(network, fd); err != nil {
				return err
			}
		}
		return nil
	}
}

// keepAlive makes dead peers known, also of sockets that are accepted. There is no
// TCP_USER_TIMEOUT: it would also end connections to a living peer that has stopped
// to read for so long.
var keepAlive = onlyFor("tcp",
	intOption(unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
	intOption(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(tcprelay.KeepAlive.Idle/time.Second)),
	intOption(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(tcprelay.KeepAlive.Interval/time.Second)),
	intOption(unix.IPPROTO_TCP, unix.TCP_KEEPCNT, tcprelay.KeepAlive.Count),
)

func listenOptions(f proxier.Family) []option {
	options := []option{intOption(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1), keepAlive, onlyFor("udp",
		intOption(unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1),
		bufferOption(unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, arrivalBuffer),
		bufferOption(unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, answerBuffer))}
	if f == proxier.IPv6 {
		// Freebind lets answers leave from addresses that are on no device.
		return append(options, onlyFor("udp",
			intOption(unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1), intOption(unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)))
	}
	return append(options, onlyFor("udp", intOption(unix.IPPROTO_IP, unix.IP_PKTINFO, 1)))
}

// dialOptions are those of connections to endpoints; a transparent one bears
// its client's address.
func dialOptions(f proxier.Family, transparent bool) []option {
	options := []option{intOption(unix.SOL_SOCKET, unix.SO_PRIORITY, ownTraffic), keepAlive}
	if !transparent {
		return options
	}
	foreign := intOption(unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1)
	if f == proxier.IPv6 {
		foreign = intOption(unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, 1)
	}
	return append(options, foreign, onlyFor("tcp",
		// Connections to different endpoints may have the same port.
		intOption(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), intOption(unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)))
}

// dialer opens connections to endpoints.
type dialer struct {
	ns          *tcprelay.Namespace
	own         func(string, string, syscall.RawConn) error
	transparent func(string, string, syscall.RawConn) error
	ports       foreignPorts
}

// newDialer makes a dialer for the network namespace of the calling thread, ns.
func newDialer(f proxier.Family, ns *tcprelay.Namespace) *dialer {
	return &dialer{
		ns: ns, own: control(dialOptions(f, false)), transparent: control(dialOptions(f, true)),
		ports: newForeignPorts(),
	}
}

// dial connects from the given address, or with the zero one from the node's.
func (d *dialer) dial(ctx context.Context, network string, from netip.Addr, to netip.AddrPort) (conn net.Conn, err error) {
	e := d.ns.Do(func() {
		if from.IsValid() {
			conn, err = d.dialAs(ctx, network, from, to)
			return
		}
		nd := net.Dialer{KeepAlive: -1, Control: d.own}
		nd.SetMultipathTCP(false)
		conn, err = nd.DialContext(ctx, network, to.String())
	})
	return conn, cmp.Or(e, err)
}

// dialAs connects from a client's address.
func (d *dialer) dialAs(ctx context.Context, network string, client netip.Addr, to netip.AddrPort) (net.Conn, error) {
	for range foreignPortTries {
		conn, err := d.dialFrom(ctx, network, netip.AddrPortFrom(client, d.ports.any()), to)
		if !isPortTaken(err) {
			return conn, err
		}
	}
	return d.dialFrom(ctx, network, netip.AddrPortFrom(client, 0), to)
}

// dialFrom connects from an address that need not be this node's. With port 0
// the kernel chooses one.
func (d *dialer) dialFrom(ctx context.Context, network string, from, to netip.AddrPort) (net.Conn, error) {
	nd := net.Dialer{KeepAlive: -1, Control: d.transparent}
	nd.SetMultipathTCP(false)
	nd.LocalAddr = net.TCPAddrFromAddrPort(from)
	if network == "udp" {
		nd.LocalAddr = net.UDPAddrFromAddrPort(from)
	}
	return nd.DialContext(ctx, network, to.String())
}
