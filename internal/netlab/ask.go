// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Answer is what a server said about a connection.
type Answer struct {
	// Server is the name of the host that answered.
	Server string
	// At is the address and port at which the server was reached.
	At netip.AddrPort
	// Seen is the source address and port that the server saw.
	Seen netip.AddrPort
}

// String returns for example "pod-a (10.244.1.10:8080), which saw
// 198.51.100.10:41234".
func (a Answer) String() string {
	return fmt.Sprintf("%s (%s), which saw %s", a.Server, a.At, a.Seen)
}

// Outcome sorts the errors of a connection attempt by what the network did.
type Outcome uint8

const (
	// Answered means no error.
	Answered Outcome = iota
	// Refused means that a TCP reset or ICMP port unreachable came back.
	Refused
	// Silent means that nothing came back in time.
	Silent
	// NotPermitted means that the host's own firewall dropped the datagram, and
	// sending it failed with EPERM. The kernel does not tell a TCP or SCTP socket.
	NotPermitted
	// Unreachable means that another ICMP error came back, for example of a
	// routing loop or a missing route.
	Unreachable
	// Broken means that an open connection was reset.
	Broken
	// Ended means that the server ended an open connection.
	Ended
	// Failed means that the attempt itself went wrong; nothing can be concluded.
	Failed
)

// String returns the word for messages.
func (o Outcome) String() string {
	return [...]string{"answered", "refused", "silent", "not permitted", "unreachable", "broken", "ended", "failed"}[o]
}

// OutcomeOf sorts an error of Open, Ask or Conn.Ask.
func OutcomeOf(err error) Outcome {
	switch {
	case err == nil:
		return Answered
	case errors.Is(err, syscall.ECONNREFUSED):
		return Refused
	case errors.Is(err, syscall.EPERM):
		return NotPermitted
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled),
		errors.Is(err, syscall.ETIMEDOUT):
		return Silent
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EACCES),
		errors.Is(err, syscall.ENOPROTOOPT), errors.Is(err, syscall.EPROTO):
		return Unreachable
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return Broken
	case errors.Is(err, errEnded):
		return Ended
	}
	return Failed
}

var errEnded = errors.New("the connection ended")

// Conn is a TCP or SCTP connection or a UDP flow (one source port) from a host.
type Conn struct {
	conn    net.Conn
	in      *bufio.Reader
	network string
	lab     *Lab
}

var questions atomic.Uint64

func newToken() string { return fmt.Sprintf("q%d", questions.Add(1)) }

// Open connects to an address and port from a host. network is "tcp", "udp" or
// "sctp"; source may be the zero AddrPort, or have port 0. A UDP flow sends nothing
// before its first Ask, and has a FreshPort.
func (h *Host) Open(ctx context.Context, network string, source, target netip.AddrPort) (*Conn, error) {
	c, err := h.dial(ctx, network, source, target)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.Name, err)
	}
	return &Conn{conn: c, in: bufio.NewReader(c), network: network, lab: h.lab}, nil
}

func (h *Host) dial(ctx context.Context, network string, source, target netip.AddrPort) (net.Conn, error) {
	switch {
	case network != "udp":
		return h.dialStream(ctx, network, source, target)
	case source.Port() != 0:
		return h.dialUDP(ctx, source, target)
	}
	for {
		c, err := h.dialUDP(ctx, netip.AddrPortFrom(source.Addr(), FreshPort()), target)
		if !errors.Is(err, unix.EADDRINUSE) || ctx.Err() != nil {
			return c, err
		}
	}
}

func (h *Host) dialUDP(ctx context.Context, source, target netip.AddrPort) (c net.Conn, err error) {
	d := net.Dialer{Control: reportErrors, LocalAddr: net.UDPAddrFromAddrPort(source)}
	err = h.makeSocket(func() error {
		// With a literal address the socket is made on this thread, so inside the host.
		c, err = d.DialContext(ctx, "udp", target.String())
		return err
	})
	return c, err
}

// reportErrors makes a UDP socket report every ICMP error that comes back, not
// only port unreachable.
func reportErrors(network, _ string, c syscall.RawConn) error {
	level, option := unix.SOL_IP, unix.IP_RECVERR
	if network == "udp6" {
		level, option = unix.SOL_IPV6, unix.IPV6_RECVERR
	}
	var err error
	return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, 1) }), err)
}

// Ask opens a connection, asks once and closes it.
func (h *Host) Ask(ctx context.Context, network string, source, target netip.AddrPort) (Answer, error) {
	c, err := h.Open(ctx, network, source, target)
	if err != nil {
		return Answer{}, err
	}
	defer c.Close()
	return c.Ask(ctx)
}

// AskAndReset is Ask for those who ask without a pause. A TCP connection ends with a reset,
// which leaves no socket in TIME-WAIT. Such a socket keeps its source port for a minute.
// Once most ports are taken, each connect(2) searches milliseconds for a free one.
func (h *Host) AskAndReset(ctx context.Context, network string, target netip.AddrPort) (Answer, error) {
	c, err := h.Open(ctx, network, netip.AddrPort{}, target)
	if err != nil {
		return Answer{}, err
	}
	defer c.Close()
	if tcp, ok := c.conn.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	return c.Ask(ctx)
}

// Local is the connection's own address and port, before any translation.
func (c *Conn) Local() netip.AddrPort {
	a, _ := netip.ParseAddrPort(c.conn.LocalAddr().String())
	return a
}

// Ask sends one question on the connection and waits for its answer. Answers to
// earlier questions are passed over.
func (c *Conn) Ask(ctx context.Context) (Answer, error) {
	deadline, _ := ctx.Deadline() // the zero time is none
	c.conn.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	token := newToken()
	if _, err := fmt.Fprintln(c.conn, token); err != nil {
		return Answer{}, fmt.Errorf("asking: %w", err)
	}
	for {
		line, err := c.in.ReadString('\n')
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errEnded
			}
			return Answer{}, fmt.Errorf("waiting for an answer%s: %w", c.sent(), err)
		}
		words := strings.Fields(line)
		if len(words) != 4 {
			return Answer{}, fmt.Errorf("strange answer %q", line)
		}
		if words[0] != token {
			continue
		}
		at, err1 := netip.ParseAddrPort(words[2])
		seen, err2 := netip.ParseAddrPort(words[3])
		if err := errors.Join(err1, err2); err != nil {
			return Answer{}, fmt.Errorf("strange answer %q: %w", line, err)
		}
		return Answer{Server: words[1], At: unmap(at), Seen: unmap(seen)}, nil
	}
}

// Close ends the connection.
func (c *Conn) Close() error { return c.conn.Close() }

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

func isClosed(err error) bool { return errors.Is(err, net.ErrClosed) }

// Resent is how many segments this host has sent again on a TCP connection because
// they were lost, its SYN included (TCP_INFO, tcpi_total_retrans). A segment that the
// other host reports as got twice (DSACK, tcpi_dsack_dups) was late and does not count.
// For other protocols it is 0.
func (c *Conn) Resent() (int, error) {
	info, err := c.info()
	if info == nil {
		return 0, err
	}
	return int(info.Total_retrans) - int(info.Dsack_dups), nil
}

// info is nil for other protocols than TCP.
func (c *Conn) info() (info *unix.TCPInfo, err error) {
	tcp, ok := c.conn.(*net.TCPConn)
	if !ok {
		return nil, nil
	}
	raw, err := tcp.SyscallConn()
	if err == nil {
		var asked error
		err = raw.Control(func(fd uintptr) { info, asked = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
		err = errors.Join(err, asked)
	}
	if err != nil {
		return nil, fmt.Errorf("TCP_INFO of the connection from %s: %w", c.Local(), err)
	}
	return info, nil
}

// sent says which of the own segments the other host has, for errors.
func (c *Conn) sent() string {
	info, err := c.info()
	if info == nil || err != nil {
		return ""
	}
	return fmt.Sprintf(" (from %s: %d segments without acknowledgement, %d sent again)", c.Local(), info.Unacked, info.Total_retrans)
}
