package userspace

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"signalbox/internal/wait"
	"signalbox/proxier"
)

const (
	// dialTries is how many endpoints are tried for one connection.
	dialTries = 4
	// dialTimeout is how long one of them may take to answer: long enough for
	// a SYN that got lost to be sent again.
	dialTimeout = 3 * time.Second
	// acceptPause is the wait after a failed accept. It doubles up to
	// longestAcceptPause.
	acceptPause        = 5 * time.Millisecond
	longestAcceptPause = time.Second
)

// acceptAll takes the connections of an origin until the relay is closed.
func (r *relay) acceptAll(from *listeners, o origin) {
	l := from.tcp[o]
	delay := acceptPause
	for {
		c, err := l.AcceptTCP()
		switch {
		case err == nil:
			delay = acceptPause
			if from.inherited {
				c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: keepAliveIdle, Interval: keepAliveInterval, Count: keepAliveCount})
			}
			r.accept(o, c)
			continue
		case errors.Is(err, net.ErrClosed):
			return
		}
		r.counts.acceptFailures.Add(1)
		r.log.warn("connections cannot be accepted; they wait", "family", r.family.String(), "error", err)
		if !wait.For(r.ctx, delay) {
			return
		}
		delay = min(2*delay, longestAcceptPause)
	}
}

func (r *relay) accept(o origin, c *net.TCPConn) {
	if !r.limits.connections.enter(&r.counts.connections) {
		r.counts.refused.Add(1)
		r.log.warn("as many connections are open as may be; more are refused", "family", r.family.String(), "limit", r.limits.connections.most)
		reset(c)
		return
	}
	r.done.Go(func() {
		defer r.limits.connections.leave(&r.counts.connections)
		r.serve(o, c)
	})
}

// serve relays one connection until both sides have ended.
func (r *relay) serve(o origin, client *net.TCPConn) {
	pair := &conn{client: client}
	if !r.conns.add(pair) {
		reset(client)
		return
	}
	defer r.conns.remove(pair)
	at := client.LocalAddr().(*net.TCPAddr).AddrPort().Addr()
	id, ok := idOf(r.family, at)
	if !ok {
		reset(client)
		return
	}
	t := r.targets.find(id, true)
	if t == nil {
		r.counts.noEndpoint.Add(1)
		reset(client)
		return
	}
	endpoint := r.connect(t, o, client.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
	if endpoint == nil {
		r.counts.noEndpoint.Add(1)
		reset(client)
		return
	}
	if !r.conns.complete(pair, endpoint) {
		reset(endpoint)
		reset(client)
		return
	}
	r.counts.accepted.Add(1)
	pair.relay()
}

// connect reaches an endpoint for a client, and tries others where one does
// not answer.
func (r *relay) connect(t *target, o origin, client netip.Addr) *net.TCPConn {
	var tried []netip.AddrPort
	set := t.endpoints(o)
	for range dialTries {
		at, ok := r.chooser.choose(t, set, client, tried, time.Now())
		if !ok {
			break
		}
		source := r.sourceFor(t, o, client, at.Addr())
		ctx, cancel := context.WithTimeout(r.ctx, dialTimeout)
		c, err := r.dialer.dial(ctx, "tcp", source, at)
		cancel()
		if err == nil {
			r.chooser.health.answered(peer{proxier.TCP, at})
			if source.IsValid() {
				r.counts.transparent.Add(1)
			}
			return c.(*net.TCPConn)
		}
		if r.ctx.Err() != nil {
			return nil
		}
		r.dialFailed(t, at, err)
		tried = append(tried, at)
	}
	return nil
}

func (r *relay) dialFailed(t *target, at netip.AddrPort, err error) {
	r.counts.dialFailures.Add(1)
	if isShortage(err) {
		r.log.warn("endpoints cannot be connected to", "family", r.family.String(), "error", err)
		return
	}
	r.chooser.health.failed(peer{t.name.Protocol, at}, time.Now())
	r.log.warnOf(t.name, "an endpoint does not answer", "endpoint", at.String(), "error", err)
}

// conn is a client's connection and the one to its endpoint.
type conn struct {
	client, endpoint *net.TCPConn
}

// relay moves bytes in both directions. Between two TCP sockets ReadFrom has
// the kernel do it (splice), and takes no more from one side than the other
// takes. The end of one direction is passed on and leaves the other open; that
// of the second one goes with the close.
func (c *conn) relay() {
	var both sync.WaitGroup
	var ended atomic.Bool
	move := func(to, from *net.TCPConn) {
		if _, err := to.ReadFrom(from); err != nil {
			// One side broke off; so does the other, and what is on its way
			// is lost, as it would be without a relay.
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

// reset ends a connection in a way that the peer cannot take for a regular end.
func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

// connSet holds the open connections, so that they can be ended.
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
func (s *connSet) complete(c *conn, endpoint *net.TCPConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.endpoint = endpoint
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
