// SPDX-License-Identifier: Apache-2.0

package httpserve

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
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
	serveAt(t, socket, l, h)
	return socket.Addr().String()
}

func serveAt(t *testing.T, socket net.Listener, l *limits, h http.Handler) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- serve(t.Context(), socket, h, quiet, l) }()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
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
		t.Error("the oldest connection is still open")
	}
	if err := clients[19].get(); err != nil {
		t.Errorf("the last connection: %v", err)
	}
}

// A request whose body never comes occupies its connection for requestTimeout. The oldest
// such connection makes room for a new client.
func TestConnectionWithoutItsBodyMakesRoom(t *testing.T) {
	asked := make(chan struct{}, 1)
	address := serveWith(t, newLimits(4), http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked <- struct{}{} }))
	for n := range 4 {
		if _, err := io.WriteString(dial(t, n+1, address), "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		<-asked
	}
	if err := dial(t, 9, address).get(); err != nil {
		t.Error(err)
	}
}

// Root's local socket answers, whatever connections clients of the network have.
func TestUnixSocketHasNoLimit(t *testing.T) {
	socket, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	serveAt(t, socket, newLimits(1), hello())
	var clients []client
	for range 3 {
		c, err := net.Dial("unix", socket.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		clients = append(clients, client{c, bufio.NewReader(c)})
	}
	for i, c := range slices.Concat(clients, clients) {
		if err := c.get(); err != nil {
			t.Errorf("request %d: %v", i, err)
		}
	}
}

// The hosts of one IPv6 subnet are one client, because a host may have all its addresses.
func TestClient(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.1": "192.0.2.1/32", "::ffff:192.0.2.1": "192.0.2.1/32",
		"2001:db8:1:2:3::4": "2001:db8:1:2::/64", "fe80::1%eth0": "fe80::/64",
	} {
		at := net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(address), 1))
		if got := clientOf(at); got.String() != want {
			t.Errorf("%s is of client %v, not %s", address, got, want)
		}
	}
}

// One client cannot take what others need, and gets an answer on each new connection.
func TestConnectionsOfOneClient(t *testing.T) {
	l := newLimits(10 * perClient)
	address := serveWith(t, l, hello())
	servers := []string{address, serveWith(t, l, hello())}
	other := dial(t, 2, address)
	if err := other.get(); err != nil {
		t.Fatal(err)
	}
	for n := range perClient + 10 {
		if err := dial(t, 1, servers[n%2]).get(); err != nil {
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
