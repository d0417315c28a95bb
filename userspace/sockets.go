package userspace

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

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

// The time after which the peer of a silent connection is asked whether it
// still lives, and how long it may be silent then. Sockets that are accepted
// have this from the one that listens.
const (
	keepAliveIdle     = 2 * time.Minute
	keepAliveInterval = 30 * time.Second
	keepAliveCount    = 4
)

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

func (l *listeners) open(f proxier.Family) error {
	any, suffix := "0.0.0.0", "4"
	if f == proxier.IPv6 {
		any, suffix = "::", "6"
	}
	config := net.ListenConfig{KeepAlive: -1, Control: control(listenOptions(f))}
	config.SetMultipathTCP(false)
	for o := range originCount {
		at := net.JoinHostPort(any, strconv.Itoa(int(l.ports.of(o))))
		tcp, err := config.Listen(context.Background(), "tcp"+suffix, at)
		if err != nil {
			return err
		}
		l.tcp[o] = tcp.(*net.TCPListener)
		udp, err := config.ListenPacket(context.Background(), "udp"+suffix, at)
		if err != nil {
			return err
		}
		l.udp[o] = udp.(*net.UDPConn)
		// Datagrams wait here while a flow is made for one of them.
		if err := l.udp[o].SetReadBuffer(udpBuffer); err != nil {
			return err
		}
	}
	return nil
}

// udpBuffer is how many bytes of datagrams may wait.
const udpBuffer = 4 << 20

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

// keepAlive makes dead peers known. There is no TCP_USER_TIMEOUT: it would also
// end connections to a living peer that has stopped to read for so long.
var keepAlive = onlyFor("tcp",
	intOption(unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
	intOption(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(keepAliveIdle/time.Second)),
	intOption(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(keepAliveInterval/time.Second)),
	intOption(unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAliveCount),
)

func listenOptions(f proxier.Family) []option {
	options := []option{intOption(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1), keepAlive}
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
	ns          *namespace
	own         func(string, string, syscall.RawConn) error
	transparent func(string, string, syscall.RawConn) error
	ports       foreignPorts
}

// newDialer makes a dialer for the network namespace of the calling thread, ns.
func newDialer(f proxier.Family, ns *namespace) *dialer {
	return &dialer{
		ns: ns, own: control(dialOptions(f, false)), transparent: control(dialOptions(f, true)),
		ports: newForeignPorts(),
	}
}

// dial connects from the given address, or with the zero one from the node's.
func (d *dialer) dial(ctx context.Context, network string, from netip.Addr, to netip.AddrPort) (conn net.Conn, err error) {
	e := d.ns.do(func() {
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
