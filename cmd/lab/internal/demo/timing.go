package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// change moves the Service "moving" to another Pod, again and again, and
// measures from the moment at which the changed manifest appears until the
// first answer of the new Pod has arrived. It connects without a pause, so the
// result is too long by at most one connection.
func (t *trial) change(ctx context.Context, f *familyResult) error {
	c := t.cluster()
	at := moving.at(plan.ClusterIP, f.family, netip.Addr{})
	pods := []string{"pod-c", moving.pods[0]}
	for n := range t.cfg.Changes {
		to := pods[n%len(pods)]
		m := c.movingManifest(f.family, to)
		move, err := m.prepare(t.stagingDir(), t.sourceDir())
		if err != nil {
			return err
		}
		began := time.Now()
		if err := move(); err != nil {
			return err
		}
		fails, err := t.awaitAnswerOf(ctx, to, at)
		if err != nil {
			return err
		}
		f.changes = append(f.changes, time.Since(began))
		f.changeFails = append(f.changeFails, fails...)
	}
	t.out.changes(f)
	return nil
}

// awaitAnswerOf connects until the named Pod answers. fails names what nobody
// answered meanwhile: a change must not cost a connection.
func (t *trial) awaitAnswerOf(ctx context.Context, pod string, at netip.AddrPort) (fails []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	for {
		a, err := t.ask(ctx, clientPod, "tcp", at, answerTimeout)
		switch {
		case err == nil && a.Server == pod:
			return fails, nil
		case ctx.Err() != nil:
			return fails, fmt.Errorf("expected %s to answer at %s within %v of the changed manifest: %w", pod, at, answerTimeout, t.alive(ctx))
		case err != nil:
			fails = append(fails, fmt.Sprintf("expected every connection to %s to be answered while the endpoint moves to %s: %v", at, pod, err))
		}
		if err := t.alive(ctx); err != nil {
			return fails, err
		}
	}
}

// latencies are the times that connect(2) took.
type latencies struct{ through, direct []time.Duration }

// connects is how many connections are timed through a ClusterIP, and as many beside
// them straight to the Pod.
const connects = 2000

// warmUp is how many connections go first, untimed: neighbour entries, routes
// and caches are then as in an established network.
const warmUp = 50

// timeConnects measures from a Pod how long connect(2) takes to the cluster IP
// of a Service with one Pod and to that Pod itself, taking turns, so that both
// meet the same machine.
func (t *trial) timeConnects(ctx context.Context, f *familyResult) error {
	through := single.at(plan.ClusterIP, f.family, netip.Addr{})
	direct := netip.AddrPortFrom(ofPair(t.lab.Host(single.pods[0]).Addr, f.family), podPort)
	err := t.lab.Host(clientPod).Do(func() error {
		return recovered(func() (err error) {
			f.connects, err = takeTurns(ctx, through, direct)
			return err
		})
	})
	if err != nil {
		return err
	}
	t.out.connects(f)
	return nil
}

// takeTurns times connections to each of two addresses.
func takeTurns(ctx context.Context, through, direct netip.AddrPort) (latencies, error) {
	var l latencies
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
				l.through = append(l.through, took)
			default:
				l.direct = append(l.direct, took)
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
	limit := unix.NsecToTimeval(answerTimeout.Nanoseconds())
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
