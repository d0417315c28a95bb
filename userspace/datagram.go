// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"signalbox/internal/tcprelay"
	"signalbox/proxier/plan"
)

// sendNow sends a datagram, to the socket's peer if to is nil. It fails with EAGAIN
// where the socket's buffer is full: a slow device must not delay the other flows.
func sendNow(socket syscall.RawConn, datagram, oob []byte, to unix.Sockaddr) (err error) {
	waitErr := socket.Write(func(fd uintptr) bool {
		for {
			if _, err = unix.SendmsgN(int(fd), datagram, oob, to, unix.MSG_DONTWAIT); err != unix.EINTR {
				return true
			}
		}
	})
	if waitErr != nil {
		return waitErr
	}
	return err
}

// sockaddr is an address as sendNow takes it.
func sockaddr(a netip.AddrPort) (unix.Sockaddr, error) {
	if addr := a.Addr(); addr.Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: addr.As4()}, nil
	}
	link, err := linkOf(a.Addr().Zone())
	if err != nil {
		return nil, err
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16(), ZoneId: link}, nil
}

// linkOf is the number of a zone of IPv6, which Go calls by its device's name.
func linkOf(zone string) (uint32, error) {
	if zone == "" {
		return 0, nil
	}
	if number, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(number), nil
	}
	device, err := net.InterfaceByName(zone)
	if err != nil {
		return 0, fmt.Errorf("zone %q: %w", zone, err)
	}
	return uint32(device.Index), nil
}

// arrival is what the kernel reports about a received datagram.
type arrival struct {
	at netip.Addr // its destination; the zero Addr if the kernel does not report it
	// overflow counts the datagrams that the socket had no room for so far,
	// modulo 2^32.
	overflow uint32
}

func readArrival(oob []byte) (a arrival) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return a
	}
	for _, m := range messages {
		switch kind := [2]int32{m.Header.Level, m.Header.Type}; {
		case kind == [2]int32{unix.IPPROTO_IP, unix.IP_PKTINFO} && len(m.Data) >= unix.SizeofInet4Pktinfo:
			a.at, _ = netip.AddrFromSlice(m.Data[8:12])
		case kind == [2]int32{unix.IPPROTO_IPV6, unix.IPV6_PKTINFO} && len(m.Data) >= unix.SizeofInet6Pktinfo:
			a.at, _ = netip.AddrFromSlice(m.Data[:16])
		case kind == [2]int32{unix.SOL_SOCKET, unix.SO_RXQ_OVFL} && len(m.Data) >= 4:
			a.overflow = binary.NativeEndian.Uint32(m.Data)
		}
	}
	return a
}

// sourceControl is the control message that sets a datagram's source address.
func sourceControl(a netip.Addr) []byte {
	level, kind, data := unix.IPPROTO_IP, unix.IP_PKTINFO, make([]byte, unix.SizeofInet4Pktinfo)
	if plan.FamilyOf(a) == plan.IPv6 {
		level, kind, data = unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, make([]byte, unix.SizeofInet6Pktinfo)
		copy(data, a.AsSlice())
	} else {
		copy(data[4:], a.AsSlice())
	}
	oob := make([]byte, unix.CmsgSpace(len(data)))
	binary.NativeEndian.PutUint64(oob, uint64(unix.CmsgLen(len(data))))
	binary.NativeEndian.PutUint32(oob[8:], uint32(level))
	binary.NativeEndian.PutUint32(oob[12:], uint32(kind))
	copy(oob[unix.CmsgLen(0):], data)
	return oob
}

// The buffers of the sockets that all clients share, in bytes. Datagrams arrive
// while the relay makes a flow for one of them. Answers wait for slow devices, whose
// own queues (a thousand packets by default) must be full earlier than this buffer.
const (
	arrivalBuffer = 4 << 20
	answerBuffer  = 32 << 20
)

// bufferOption sets a buffer's size, beyond net.core.rmem_max and wmem_max where
// this process may.
func bufferOption(force, within, size int) tcprelay.SocketOption {
	return func(fd int) error {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size)
		if errors.Is(err, unix.EPERM) {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, within, size)
		}
		return os.NewSyscallError("setsockopt", err)
	}
}
