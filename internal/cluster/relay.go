// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// Relay carries TCP connections to the API server from where only its listener
// is: a host of a lab, whose network knows nothing of the machine's loopback
// interface. TLS goes through it unread. It is a load balancer in front of the
// API server, and its failures are a load balancer's: see Cut.
type Relay struct {
	listen func() (net.Listener, error)
	target string

	accepted atomic.Int64
	answered countWriter // what the API server sent

	mu       sync.Mutex
	listener net.Listener          // nil while cut
	conns    map[net.Conn]struct{} // both sides of every connection
	carriers sync.WaitGroup        // goroutines
}

// NewRelay starts a Relay to target. listen makes the listener, again after
// each Cut, and decides in which network namespace that is.
func NewRelay(target string, listen func() (net.Listener, error)) (*Relay, error) {
	r := &Relay{listen: listen, target: target, conns: map[net.Conn]struct{}{}}
	return r, r.Restore()
}

// Restore accepts connections again.
func (r *Relay) Restore() error {
	l, err := r.listen()
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.listener = l
	r.carriers.Go(func() { r.accept(l) })
	return nil
}

// Cut ends every connection and refuses new ones. It returns when nothing is
// carried any more.
func (r *Relay) Cut() {
	r.mu.Lock()
	if r.listener != nil {
		r.listener.Close()
		r.listener = nil
	}
	for c := range r.conns {
		c.Close()
	}
	r.mu.Unlock()
	r.carriers.Wait()
}

// Addr is where the Relay listens, as HOST:PORT.
func (r *Relay) Addr() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.listener.Addr().String()
}

// Accepted counts the connections that reached the Relay, whether or not the
// API server was there to take them.
func (r *Relay) Accepted() int { return int(r.accepted.Load()) }

// Answered counts the bytes that the API server has sent through the Relay, encrypted as
// they were.
func (r *Relay) Answered() int64 { return r.answered.Load() }

// countWriter counts what is written to it.
type countWriter struct{ atomic.Int64 }

func (c *countWriter) Write(b []byte) (int, error) {
	c.Add(int64(len(b)))
	return len(b), nil
}

func (r *Relay) accept(l net.Listener) {
	for {
		client, err := l.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				l.Close()
			}
			return
		}
		r.accepted.Add(1)
		r.carriers.Go(func() { r.carry(client) })
	}
}

// carry refuses the client, by closing its connection, where the API server
// refuses the Relay.
func (r *Relay) carry(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", r.target)
	if err != nil {
		return
	}
	defer server.Close()
	if !r.add(client, server) {
		return
	}
	defer r.remove(client, server)
	var both sync.WaitGroup
	answers := io.TeeReader(server, &r.answered)
	for to, from := range map[net.Conn]io.Reader{client: answers, server: client} {
		both.Go(func() {
			_, _ = io.Copy(to, from)
			// Whichever side ends first ends both: nothing that talks to an
			// API server half-closes.
			client.Close()
			server.Close()
		})
	}
	both.Wait()
}

// add returns false where the Relay has been cut since the client came.
func (r *Relay) add(conns ...net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.listener == nil {
		return false
	}
	for _, c := range conns {
		r.conns[c] = struct{}{}
	}
	return true
}

func (r *Relay) remove(conns ...net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range conns {
		delete(r.conns, c)
	}
}
