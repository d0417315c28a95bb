package netlab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// SCTP returns a *MissingError where the kernel has no SCTP sockets: then
// nobody in a lab answers over it.
func SCTP() error {
	fd, err := sctpSocket(unix.AF_INET)
	if err != nil {
		return &MissingError{"sctp", err}
	}
	return unix.Close(fd)
}

// sctpSettings make a client whose first packet is lost send it again after a
// second, as one of TCP does, and not after three.
var sctpSettings = [][2]string{{"net/sctp/rto_initial", "1000"}}

// sctpSocket makes a socket of the one-to-one style (RFC 6458, section 4), which
// works as one of TCP does; package net takes it for one.
func sctpSocket(family int) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	return fd, os.NewSyscallError("socket", err)
}

func listenSCTP(at netip.AddrPort) (net.Listener, error) {
	fd, err := boundSCTP(at)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	dup, err := unix.Dup(fd)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	f := os.NewFile(uintptr(dup), "sctp")
	defer f.Close()
	return net.FileListener(f)
}

func boundSCTP(at netip.AddrPort) (int, error) {
	family := unix.AF_INET
	if at.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := sctpSocket(family)
	if err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, sockaddr(at)); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("bind", err)
	}
	return fd, nil
}

func sockaddr(at netip.AddrPort) unix.Sockaddr {
	if at.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}
	}
	return &unix.SockaddrInet6{Addr: at.Addr().As16(), Port: int(at.Port())}
}

// dialSCTP connects from one address: a socket that is bound to none would offer
// the server all that its host has, as further ways to it.
func dialSCTP(ctx context.Context, source, target netip.AddrPort) (net.Conn, error) {
	if !source.Addr().IsValid() {
		from, err := sourceFor(target)
		if err != nil {
			return nil, err
		}
		source = netip.AddrPortFrom(from, 0)
	}
	fd, err := boundSCTP(source)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "sctp")
	defer f.Close()
	if err := unix.Connect(fd, sockaddr(target)); err != nil && err != unix.EINPROGRESS {
		return nil, os.NewSyscallError("connect", err)
	}
	if err := connected(ctx, f); err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	return net.FileConn(f)
}

// sourceFor is the address that the kernel would send from.
func sourceFor(target netip.AddrPort) (netip.Addr, error) {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(target))
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}

// connected waits until a socket is.
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
