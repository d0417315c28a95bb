// SPDX-License-Identifier: Apache-2.0

// Package tcprelay forwards TCP connections to the endpoints of Services, for the
// modes that serve some or all of them in this process. It also opens the sockets of
// these modes.
package tcprelay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/wait"
	"signalbox/proxier/plan"
)

const (
	// DialTries is how many endpoints are tried for one connection.
	DialTries = 4
	// dialTimeout is how long one of them may take to answer: long enough for the
	// retransmission of a lost SYN.
	dialTimeout = 3 * time.Second
	// AcceptPause is the wait after a failed accept. It doubles up to
	// longestAcceptPause.
	AcceptPause        = 5 * time.Millisecond
	longestAcceptPause = time.Second
)

// TCP relays connections of one IP family until it is closed.
type TCP struct {
	Family  plan.Family
	Chooser *Chooser
	// Limits are shared by all relays of the process.
	Limits *Limits
	Counts Counts
	Log    Log

	ctx    context.Context
	cancel context.CancelFunc
	done   sync.WaitGroup // all goroutines
	conns  connSet
}

// Counts count connections. All but the first only grow.
type Counts struct {
	Connections atomic.Int64 // open now
	Accepted    atomic.Uint64
	// DialFailures counts failed attempts to connect to an endpoint, NoEndpoint
	// connections without an endpoint.
	DialFailures, NoEndpoint atomic.Uint64
	Refused                  atomic.Uint64 // beyond the limits
	AcceptFailures           atomic.Uint64
}

// Drain waits until no connection is open and busy, if not nil, returns false, or ctx
// ends.
func (r *TCP) Drain(ctx context.Context, busy func() bool) {
	for r.Counts.Connections.Load() > 0 || busy != nil && busy() {
		if !wait.For(ctx, drainInterval) {
			return
		}
	}
}

const drainInterval = 50 * time.Millisecond

// Route is where a connection goes.
type Route struct {
	Choice
	// Dial connects to one of the endpoints.
	Dial func(ctx context.Context, endpoint netip.AddrPort) (net.Conn, error)
}

// New makes a relay that puts the mode's name before its log messages.
func New(f plan.Family, mode string) (*TCP, error) {
	most, err := ProcessLimits()
	if err != nil {
		return nil, err
	}
	r := &TCP{Family: f, Chooser: NewChooser(), Limits: most, Log: Log{Mode: mode}, conns: connSet{open: map[*conn]struct{}{}}}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r, nil
}

// Close ends the relay with all its connections. The caller must close the listeners
// first.
func (r *TCP) Close() {
	r.cancel()
	r.conns.closeAll()
	r.done.Wait()
}

// Reset ends the connections of a Service port to removed endpoints, which are sorted, with
// a reset to both sides.
func (r *TCP) Reset(service plan.ServicePortName, removed []netip.AddrPort) {
	if len(removed) == 0 {
		return
	}
	r.conns.mu.Lock()
	defer r.conns.mu.Unlock()
	for c := range r.conns.open {
		if c.endpoint == nil || c.service != service {
			continue
		}
		at := c.endpoint.RemoteAddr().(*net.TCPAddr).AddrPort()
		if _, found := slices.BinarySearchFunc(removed, netip.AddrPortFrom(at.Addr().Unmap(), at.Port()), netip.AddrPort.Compare); found {
			reset(c.client)
			reset(c.endpoint)
		}
	}
}

// Accept accepts and forwards the connections of a listener, in a goroutine, until
// the listener is closed. It resets connections for which route returns false.
func (r *TCP) Accept(l *net.TCPListener, route func(*net.TCPConn) (Route, bool)) {
	r.done.Go(func() { r.acceptAll(l, route) })
}

func (r *TCP) acceptAll(l *net.TCPListener, route func(*net.TCPConn) (Route, bool)) {
	delay := AcceptPause
	for {
		c, err := l.AcceptTCP()
		switch {
		case err == nil:
			delay = AcceptPause
			r.accept(c, route)
			continue
		case errors.Is(err, net.ErrClosed), errors.Is(err, unix.EINVAL): // closed, or shut down to be closed
			return
		}
		r.Counts.AcceptFailures.Add(1)
		r.Log.Warn("connections cannot be accepted; they wait", "family", r.Family.String(), "error", err)
		if !wait.For(r.ctx, delay) {
			return
		}
		delay = min(2*delay, longestAcceptPause)
	}
}

func (r *TCP) accept(c *net.TCPConn, route func(*net.TCPConn) (Route, bool)) {
	if !r.Limits.Connections.Acquire(&r.Counts.Connections) {
		r.Counts.Refused.Add(1)
		r.Log.Warn("the limit of connections is reached; new ones are reset", "family", r.Family.String(), "limit", r.Limits.Connections.Max)
		reset(c)
		return
	}
	r.done.Go(func() {
		defer r.Limits.Connections.Release(&r.Counts.Connections)
		r.serve(c, route)
	})
}

// serve relays one connection until both sides have ended.
func (r *TCP) serve(client *net.TCPConn, route func(*net.TCPConn) (Route, bool)) {
	pair := &conn{client: client}
	if !r.conns.add(pair) {
		reset(client)
		return
	}
	defer r.conns.remove(pair)
	to, ok := route(client)
	var endpoint *net.TCPConn
	if ok {
		endpoint = r.connect(to, client.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
	}
	if endpoint == nil {
		r.Counts.NoEndpoint.Add(1)
		reset(client)
		return
	}
	if !r.conns.complete(pair, endpoint, to.Name) {
		reset(endpoint)
		reset(client)
		return
	}
	r.Counts.Accepted.Add(1)
	pair.relay()
}

// connect reaches an endpoint for a client, and tries others where one does
// not answer.
func (r *TCP) connect(to Route, client netip.Addr) *net.TCPConn {
	var tried []netip.AddrPort
	for range DialTries {
		at, ok := r.Chooser.Choose(to.Choice, client, tried, time.Now())
		if !ok {
			break
		}
		ctx, cancel := context.WithTimeout(r.ctx, dialTimeout)
		c, err := to.Dial(ctx, at)
		cancel()
		if err == nil {
			r.Chooser.Answered(Peer{plan.TCP, at})
			return c.(*net.TCPConn)
		}
		if r.ctx.Err() != nil {
			return nil
		}
		r.DialFailed(to.Name, at, err)
		tried = append(tried, at)
	}
	return nil
}

// DialFailed records that an endpoint of a Service port could not be reached.
func (r *TCP) DialFailed(service plan.ServicePortName, at netip.AddrPort, err error) {
	r.Counts.DialFailures.Add(1)
	if isShortage(err) {
		r.Log.Warn("this node lacks ports, memory or file descriptors to connect to endpoints; trying other endpoints", "family", r.Family.String(), "error", err)
		return
	}
	r.Chooser.Failed(Peer{service.Protocol, at}, time.Now())
	r.Log.WarnOf(service, "an endpoint does not answer; trying other endpoints", "endpoint", at.String(), "error", err)
}

// isShortage says whether this node lacked something, and the endpoint did not fail.
func isShortage(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.EADDRNOTAVAIL, unix.EADDRINUSE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// conn is a client's connection and the one to its endpoint.
type conn struct {
	client, endpoint *net.TCPConn
	service          plan.ServicePortName
}

// relay moves bytes in both directions. Between two TCP sockets ReadFrom lets the
// kernel do it (splice), and reads no more from one side than the other side takes.
// The end of one direction leaves the other open. The end of the second closes both.
func (c *conn) relay() {
	var both sync.WaitGroup
	var ended atomic.Bool
	move := func(to, from *net.TCPConn) {
		if _, err := to.ReadFrom(from); err != nil {
			// One side failed, so the other is reset. Bytes under way are lost, as
			// they would be without a relay.
			reset(to)
			reset(from)
		}
		if !ended.Swap(true) {
			to.CloseWrite()
		}
	}
	both.Go(func() { move(c.client, c.endpoint) })
	move(c.endpoint, c.client)
	both.Wait()
	c.client.Close()
	c.endpoint.Close()
}

// reset ends a connection with RST, which the peer does not mistake for a regular end.
func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

// connSet holds the open connections for Close.
type connSet struct {
	mu     sync.Mutex
	closed bool
	open   map[*conn]struct{}
}

func (s *connSet) add(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.open[c] = struct{}{}
	return true
}

// complete adds the endpoint's side.
func (s *connSet) complete(c *conn, endpoint *net.TCPConn, service plan.ServicePortName) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.endpoint, c.service = endpoint, service
	return !s.closed
}

func (s *connSet) remove(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
}

func (s *connSet) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for c := range s.open {
		reset(c.client)
		if c.endpoint != nil {
			reset(c.endpoint)
		}
	}
}
