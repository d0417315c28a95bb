// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// opening limits how many threads make sockets inside hosts at once. None of them waits
// for the network.
var opening = make(chan struct{}, 2*runtime.NumCPU())

// makeSocket runs fn, which makes a socket, inside the host.
func (h *Host) makeSocket(fn func() error) error {
	opening <- struct{}{}
	defer func() { <-opening }()
	return h.Do(fn)
}

// dialStream connects over TCP or SCTP. The wait for the other side holds no thread, so
// thousands of connections can wait at once.
func (h *Host) dialStream(ctx context.Context, network string, source, target netip.AddrPort) (net.Conn, error) {
	var f *os.File
	err := h.makeSocket(func() (err error) {
		f, err = connecting(network, source, target)
		return err
	})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := connected(ctx, f); err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	// FileConn turns keepalives on. The net package uses TCPConn for SCTP, too.
	return c, c.(*net.TCPConn).SetKeepAlive(false)
}

// connecting makes a socket and begins to connect it. SCTP connects from one address: a
// socket without one would offer all addresses of its host to the server.
func connecting(network string, source, target netip.AddrPort) (*os.File, error) {
	if network == "sctp" && !source.Addr().IsValid() {
		from, err := sourceFor(target)
		if err != nil {
			return nil, err
		}
		source = netip.AddrPortFrom(from, 0)
	}
	fd, err := streamSocket(network, familyOf(target))
	if err != nil {
		return nil, err
	}
	if source.Addr().IsValid() {
		err = os.NewSyscallError("bind", unix.Bind(fd, sockaddr(source)))
	}
	if err == nil {
		err = os.NewSyscallError("connect", unix.Connect(fd, sockaddr(target)))
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), network), nil
}

// streamSocket makes a socket of TCP, or of SCTP in the one-to-one style (RFC 6458,
// section 4), which works as one of TCP does.
func streamSocket(network string, family int) (int, error) {
	protocol := unix.IPPROTO_TCP
	if network == "sctp" {
		protocol = unix.IPPROTO_SCTP
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
	return fd, os.NewSyscallError("socket", err)
}

func familyOf(a netip.AddrPort) int {
	if a.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(at netip.AddrPort) unix.Sockaddr {
	if at.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}
	}
	return &unix.SockaddrInet6{Addr: at.Addr().As16(), Port: int(at.Port())}
}

// connected waits until a socket is. It asks for SO_ERROR before it waits: Linux wakes
// nobody for an ICMP error that arrives while connect(2) still runs, and sends another
// SYN a second later.
func connected(ctx context.Context, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	deadline, _ := ctx.Deadline() // the zero time is none
	if err := f.SetWriteDeadline(deadline); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	var failed error
	err = raw.Write(func(fd uintptr) bool {
		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		switch {
		case err != nil:
			failed = err
		case code != 0:
			failed = syscall.Errno(code)
		default:
			_, err := unix.Getpeername(int(fd))
			return err == nil
		}
		return true
	})
	if failed != nil {
		return failed
	}
	return err
}
