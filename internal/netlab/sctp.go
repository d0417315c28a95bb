// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// SCTP returns a *MissingError where the kernel has no SCTP sockets: then
// nobody in a lab answers over it.
func SCTP() error {
	fd, err := streamSocket("sctp", unix.AF_INET)
	if err != nil {
		return &MissingError{"sctp", err}
	}
	return unix.Close(fd)
}

// sctpSettings make a client whose first packet is lost send it again after a
// second, as one of TCP does, and not after three.
var sctpSettings = [][2]string{{"net/sctp/rto_initial", "1000"}}

func listenSCTP(at netip.AddrPort) (net.Listener, error) {
	fd, err := streamSocket("sctp", familyOf(at))
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, sockaddr(at)); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
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

// sourceFor is the address that the kernel would send from.
func sourceFor(target netip.AddrPort) (netip.Addr, error) {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(target))
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}
