// SPDX-License-Identifier: Apache-2.0

package httpserve

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// serveWith serves with the limits on loopback until the test ends.
func serveWith(t *testing.T, l *limits, h http.Handler) (address string) {
	t.Helper()
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- serve(t.Context(), socket, h, quiet, l) }()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return socket.Addr().String()
}

// client is one connection that stays open between requests.
type client struct {
	net.Conn
	answers *bufio.Reader
}

// dial connects from 127.0.0.N.
func dial(t *testing.T, n int, address string) client {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(n))}}
	c, err := d.DialContext(t.Context(), "tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return client{c, bufio.NewReader(c)}
}

func (c client) get() error {
	if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
		return err
	}
	resp, err := http.ReadResponse(c.answers, nil)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func (l *limits) open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.conns)
}

// Clients that keep connections open cost each other theirs, and no new client its answer.
func TestConnectionsInAll(t *testing.T) {
	l := newLimits(8)
	address := serveWith(t, l, hello())
	var clients []client
	for n := range 20 {
		c := dial(t, n+1, address)
		if err := c.get(); err != nil {
			t.Fatalf("client %d: %v", n, err)
		}
		clients = append(clients, c)
	}
	if n := l.open(); n > 8 {
		t.Errorf("%d connections are open", n)
	}
	if err := clients[0].get(); err == nil {
		t.Error("the connection that has waited longest is still open")
	}
	if err := clients[19].get(); err != nil {
		t.Errorf("the last connection: %v", err)
	}
}

// A connection that is answered stays. A connection without any request goes first.
func TestConnectionsThatAreAnsweredStay(t *testing.T) {
	release, asked := make(chan struct{}), make(chan struct{}, 2)
	address := serveWith(t, newLimits(2), http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		asked <- struct{}{}
		<-release
	}))
	slow := []chan error{make(chan error, 1), make(chan error, 1)}
	dial(t, 3, address) // says nothing
	for i, done := range slow {
		c := dial(t, i+1, address)
		go func() { done <- c.get() }()
		<-asked
	}
	if err := dial(t, 4, address).get(); err == nil {
		t.Error("a third connection is answered")
	}
	close(release)
	for _, done := range slow {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// One client cannot take what others need, and gets an answer on each new connection.
func TestConnectionsOfOneClient(t *testing.T) {
	l := newLimits(10 * perClient)
	address := serveWith(t, l, hello())
	other := dial(t, 2, address)
	if err := other.get(); err != nil {
		t.Fatal(err)
	}
	for n := range perClient + 10 {
		if err := dial(t, 1, address).get(); err != nil {
			t.Errorf("connection %d: %v", n, err)
		}
	}
	if n := l.open(); n > perClient+1 {
		t.Errorf("%d connections are open", n)
	}
	if err := other.get(); err != nil {
		t.Errorf("another client: %v", err)
	}
}

// A connection that ends makes room.
func TestClosedConnectionMakesRoom(t *testing.T) {
	l := newLimits(100)
	address := serveWith(t, l, hello())
	c := dial(t, 1, address)
	if err := c.get(); err != nil {
		t.Fatal(err)
	}
	c.Close()
	for l.open() > 0 {
		time.Sleep(time.Millisecond) // until the server has seen the end
	}
}

// A request with a large body is refused before the body is read.
func TestLargeBody(t *testing.T) {
	address := serveWith(t, newLimits(10), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.ReadAll(r.Body); err != nil {
			http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
		}
	}))
	resp, err := http.Post("http://"+address, "text/plain", strings.NewReader(strings.Repeat("x", maxBody+1)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("the answer is %s", resp.Status)
	}
}
