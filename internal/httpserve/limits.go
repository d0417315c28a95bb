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
	// perClient is how many connections one client may have to all servers of a process.
	perClient = 64
	// mostConnections is how many all clients may have. They take at most a quarter of
	// the process's descriptors: the rest is for packets of Services.
	mostConnections   = 1024
	descriptorsForOne = 4
	fewestConnections = 16
	usualDescriptors  = 1024 // if the kernel does not tell the limit
)

// limits bounds the open TCP connections of several servers. When there are too many in
// all, or of one client, it closes the one whose state has not changed for the longest
// time. Also a request can be that old: its client may withhold the body, or not read the
// answer. Answers to honest clients take milliseconds, except profiles.
type limits struct {
	max int

	mu    sync.Mutex
	conns map[net.Conn]*conn
}

// conn is an open connection.
type conn struct {
	client  netip.Prefix
	changed time.Time // when it was accepted, or a request began or ended
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
	c, err := l.Listener.Accept()
	if err == nil {
		l.limits.admit(c)
	}
	return c, err
}

// admit makes room for a connection. Unix sockets have no limit: only root and the
// process's own user reach them.
func (l *limits) admit(c net.Conn) {
	at, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return
	}
	client := clientOf(at)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.makeRoom(perClient, func(c *conn) bool { return c.client == client })
	l.makeRoom(l.max, func(*conn) bool { return true })
	l.conns[c] = &conn{client, time.Now()}
}

// clientOf returns an IPv4 address, or an IPv6 subnet: a host can use each address of its
// subnet.
func clientOf(at *net.TCPAddr) netip.Prefix {
	addr := at.AddrPort().Addr().Unmap()
	bits := 64
	if addr.Is4() {
		bits = 32
	}
	client, _ := addr.Prefix(bits) // fails only for other lengths
	return client
}

// makeRoom closes the oldest connection if there are as many as allowed.
func (l *limits) makeRoom(allowed int, among func(*conn) bool) {
	var oldest net.Conn
	count := 0
	for c, state := range l.conns {
		if !among(state) {
			continue
		}
		count++
		if oldest == nil || state.changed.Before(l.conns[oldest].changed) {
			oldest = c
		}
	}
	if count >= allowed {
		delete(l.conns, oldest)
		oldest.Close()
	}
}

// follow has the form of http.Server.ConnState.
func (l *limits) follow(c net.Conn, state http.ConnState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := l.conns[c]
	switch {
	case at == nil: // it has no limit, or is closed to make room
	case state == http.StateClosed, state == http.StateHijacked:
		delete(l.conns, c)
	default:
		at.changed = time.Now()
	}
}
