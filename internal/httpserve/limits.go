// SPDX-License-Identifier: Apache-2.0

package httpserve

import (
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// perClient is how many connections one address may have to one server.
	perClient = 64
	// mostConnections is how many all servers of a process have together. They take at
	// most a quarter of the process's descriptors: the rest is for packets of Services.
	mostConnections   = 1024
	descriptorsForOne = 4
	fewestConnections = 16
	usualDescriptors  = 1024 // if the kernel does not tell the limit
)

// limits bounds the open connections of several servers. When there are too many in all,
// or of one client, it closes the one that has waited longest for a request.
type limits struct {
	max int

	mu    sync.Mutex
	conns map[net.Conn]*conn
}

// conn is an open connection.
type conn struct {
	server  net.Listener
	client  netip.Addr
	waiting time.Time // for a request since then; zero while it is answered
}

// shared is for all servers of the process, which share its descriptors.
var shared = sync.OnceValue(func() *limits {
	descriptors := unix.Rlimit{Cur: usualDescriptors}
	_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &descriptors)
	return newLimits(int(max(fewestConnections, min(mostConnections, descriptors.Cur/descriptorsForOne))))
})

func newLimits(most int) *limits { return &limits{max: most, conns: map[net.Conn]*conn{}} }

// listener accepts the connections that its limits admit.
type listener struct {
	net.Listener
	limits *limits
}

func (l listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil || l.limits.admit(l.Listener, c) {
			return c, err
		}
		c.Close()
	}
}

// admit makes room for a connection, and returns false if there is none.
func (l *limits) admit(server net.Listener, c net.Conn) bool {
	client := clientOf(c)
	l.mu.Lock()
	defer l.mu.Unlock()
	own := func(c *conn) bool { return c.server == server && c.client == client }
	if l.count(own) >= perClient && !l.closeLongestWaiting(own) {
		return false
	}
	if len(l.conns) >= l.max && !l.closeLongestWaiting(func(*conn) bool { return true }) {
		return false
	}
	l.conns[c] = &conn{server, client, time.Now()}
	return true
}

func clientOf(c net.Conn) netip.Addr {
	if at, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		return at.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

func (l *limits) count(among func(*conn) bool) (n int) {
	for _, c := range l.conns {
		if among(c) {
			n++
		}
	}
	return n
}

// closeLongestWaiting returns false if none waits among the connections.
func (l *limits) closeLongestWaiting(among func(*conn) bool) bool {
	var longest net.Conn
	for c, state := range l.conns {
		if !state.waiting.IsZero() && among(state) && (longest == nil || state.waiting.Before(l.conns[longest].waiting)) {
			longest = c
		}
	}
	if longest == nil {
		return false
	}
	delete(l.conns, longest)
	longest.Close()
	return true
}

// follow has the form of http.Server.ConnState.
func (l *limits) follow(c net.Conn, state http.ConnState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := l.conns[c]
	switch {
	case at == nil: // closed to make room
	case state == http.StateActive:
		at.waiting = time.Time{}
	case state == http.StateIdle:
		at.waiting = time.Now()
	case state == http.StateClosed, state == http.StateHijacked:
		delete(l.conns, c)
	}
}
