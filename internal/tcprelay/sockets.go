// SPDX-License-Identifier: Apache-2.0

package tcprelay

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// KeepAlive detects dead peers of silent connections. There is no
// TCP_USER_TIMEOUT: it would also end connections to a living peer that has
// stopped to read for so long.
var KeepAlive = net.KeepAliveConfig{Enable: true, Idle: 2 * time.Minute, Interval: 30 * time.Second, Count: 4}

// SocketOption sets an option of a socket that is not bound yet.
type SocketOption func(fd int) error

// IntOption is an option whose value is an int.
func IntOption(level, name, value int) SocketOption {
	return func(fd int) error {
		return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, level, name, value))
	}
}

// reusePort lets a process that this one replaces, or that replaces this one,
// listen at the same port.
var reusePort = IntOption(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)

func control(options []SocketOption) func(string, string, syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		return Control(c, func(fd int) error {
			for _, set := range options {
				if err := set(fd); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

// Control calls fn with a socket's file descriptor.
func Control(c syscall.RawConn, fn func(fd int) error) error {
	var failed error
	err := c.Control(func(fd uintptr) { failed = fn(int(fd)) })
	return errors.Join(err, failed)
}

// networkOf makes Go open a socket of the address's own family, also where the
// address is unspecified.
func networkOf(protocol string, a netip.Addr) string {
	if a.Is4() {
		return protocol + "4"
	}
	return protocol + "6"
}

// ListenTCP listens in the network namespace of the calling thread. Multipath TCP,
// the default of Go for listeners, is off: a redirected connection has one path.
func ListenTCP(at netip.AddrPort) (*net.TCPListener, error) {
	c := net.ListenConfig{KeepAliveConfig: KeepAlive, Control: control([]SocketOption{reusePort})}
	c.SetMultipathTCP(false)
	l, err := c.Listen(context.Background(), networkOf("tcp", at.Addr()), at.String())
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// ListenUDP opens a UDP socket in the network namespace of the calling thread.
func ListenUDP(at netip.AddrPort, options ...SocketOption) (*net.UDPConn, error) {
	c := net.ListenConfig{Control: control(append(options, reusePort))}
	conn, err := c.ListenPacket(context.Background(), networkOf("udp", at.Addr()), at.String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.UDPConn), nil
}

// CloseListener has the kernel refuse connections from now on. Close alone does not,
// while a child process that was forked and has not executed its program holds the socket.
func CloseListener(l *net.TCPListener) {
	if raw, err := l.SyscallConn(); err == nil {
		_ = Control(raw, func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) })
	}
	l.Close()
}

// Dial connects to an endpoint, by "tcp" or "udp". The zero from leaves the source
// address to the kernel, the port 0 the source port.
func (n *Namespace) Dial(ctx context.Context, protocol string, from, to netip.AddrPort, options ...SocketOption) (conn net.Conn, err error) {
	d := net.Dialer{KeepAliveConfig: KeepAlive, Control: control(options)}
	d.SetMultipathTCP(false)
	switch {
	case from.IsValid() && protocol == "udp":
		d.LocalAddr = net.UDPAddrFromAddrPort(from)
	case from.IsValid():
		d.LocalAddr = net.TCPAddrFromAddrPort(from)
	}
	nsErr := n.Do(func() { conn, err = d.DialContext(ctx, protocol, to.String()) })
	return conn, cmp.Or(nsErr, err)
}
