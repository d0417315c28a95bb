// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// timeout bounds what is timed once.
const timeout = 5 * time.Second

// Latencies are the times that something took on two ways.
type Latencies struct{ Through, Direct []time.Duration }

// turns is how often something is timed on each way.
const turns = 2000

// warmUp is how many turns go first, untimed: neighbour entries, routes
// and caches are then as in an established network.
const warmUp = 50

// TakeTurns times what once does with each of two addresses.
func TakeTurns(ctx context.Context, once func(netip.AddrPort) (time.Duration, error), through, direct netip.AddrPort) (Latencies, error) {
	var l Latencies
	for i := range warmUp + turns {
		if err := ctx.Err(); err != nil {
			return l, err
		}
		// Who goes first changes, so that going second is no advantage.
		order := []netip.AddrPort{through, direct}
		if i%2 == 1 {
			slices.Reverse(order)
		}
		for _, to := range order {
			took, err := once(to)
			for errors.Is(err, unix.EINTR) { // a signal to this process; the time is of no use
				took, err = once(to)
			}
			if err != nil {
				return l, fmt.Errorf("connecting to %s: %w", to, err)
			}
			switch {
			case i < warmUp:
			case to == through:
				l.Through = append(l.Through, took)
			default:
				l.Direct = append(l.Direct, took)
			}
		}
	}
	return l, nil
}

// Connect times connect(2) of a TCP connection, and resets the connection.
func Connect(to netip.AddrPort) (time.Duration, error) {
	fd, at, err := open(unix.SOCK_STREAM, to)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	// A reset instead of a farewell leaves no socket in TIME-WAIT, of
	// which thousands would slow down the choice of a source port.
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return 0, err
	}
	began := time.Now()
	err = unix.Connect(fd, at)
	return time.Since(began), err
}

// Datagram times the first datagram of a UDP flow and its answer.
func Datagram(to netip.AddrPort) (time.Duration, error) {
	fd, at, err := open(unix.SOCK_DGRAM, to)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, at); err != nil {
		return 0, err
	}
	began := time.Now()
	if _, err := unix.Write(fd, []byte("first\n")); err != nil {
		return 0, err
	}
	_, err = unix.Read(fd, make([]byte, 512))
	return time.Since(began), err
}

// open makes a socket for plain system calls: the Go runtime's poller would add more than
// is to be measured.
func open(kind int, to netip.AddrPort) (fd int, at unix.Sockaddr, err error) {
	domain := unix.AF_INET6
	at = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	if to.Addr().Is4() {
		domain, at = unix.AF_INET, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	if fd, err = unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, nil, err
	}
	limit := unix.NsecToTimeval(timeout.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
	)
	if err != nil {
		unix.Close(fd)
	}
	return fd, at, err
}
