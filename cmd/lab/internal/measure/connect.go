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

// connectTimeout bounds one connection that is timed.
const connectTimeout = 5 * time.Second

// Latencies are the times that connect(2) took.
type Latencies struct{ Through, Direct []time.Duration }

// connects is how many connections are timed through a ClusterIP, and as many beside
// them straight to the Pod.
const connects = 2000

// warmUp is how many connections go first, untimed: neighbour entries, routes
// and caches are then as in an established network.
const warmUp = 50

// TakeTurns times connections to each of two addresses.
func TakeTurns(ctx context.Context, through, direct netip.AddrPort) (Latencies, error) {
	var l Latencies
	for i := range warmUp + connects {
		if err := ctx.Err(); err != nil {
			return l, err
		}
		// Who goes first changes, so that going second is no advantage.
		order := []netip.AddrPort{through, direct}
		if i%2 == 1 {
			slices.Reverse(order)
		}
		for _, to := range order {
			took, err := timeConnect(to)
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

// timeConnect opens and resets one TCP connection with plain system calls: the
// Go runtime's poller would add more than is to be measured.
func timeConnect(to netip.AddrPort) (time.Duration, error) {
	domain, addr := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port()), Addr: as4(to.Addr())})
	if to.Addr().Is6() {
		domain, addr = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	limit := unix.NsecToTimeval(connectTimeout.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
		// A reset instead of a farewell leaves no socket in TIME-WAIT, of
		// which thousands would slow down the choice of a source port.
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
	)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	err = unix.Connect(fd, addr)
	took := time.Since(began)
	if errors.Is(err, unix.EINTR) {
		return timeConnect(to) // a signal to this process; the time is of no use
	}
	return took, err
}

func as4(a netip.Addr) [4]byte {
	if a.Is4() {
		return a.As4()
	}
	return [4]byte{}
}
