// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// Inside runs a function where connections begin, for example on a host of a lab.
type Inside func(func() error) error

// Here is Inside for connections that begin where the process is.
func Here(do func() error) error { return do() }

// pieces are large: with small ones, reading at the endpoint takes longest.
const pieces = 256 << 10

// Bulk returns how many bytes a second so many connections carry to a server that
// discards them.
func Bulk(inside Inside, to netip.AddrPort, connections int, d time.Duration) (float64, error) {
	began := time.Now()
	sent, err := together(inside, connections, func() (n int64, err error) {
		c, err := dial(to, d+timeout)
		if err != nil {
			return 0, err
		}
		defer c.Close()
		for piece := make([]byte, pieces); n == 0 || time.Since(began) < d; {
			m, err := c.Write(piece)
			if n += int64(m); err != nil {
				return n, err
			}
		}
		// Bytes count when they have arrived, which the end shows.
		c.(*net.TCPConn).CloseWrite()
		return n, awaitEnd(c)
	})
	return float64(sent) / time.Since(began).Seconds(), err
}

// NewConnections returns how many connections a second so many clients make one after
// the other, to a server that ends each. Who ends first keeps the connection's ports for
// a minute. It is the server: clients and relays would soon look for free ones more than
// anything else.
func NewConnections(inside Inside, to netip.AddrPort, clients int, d time.Duration) (float64, error) {
	began := time.Now()
	made, err := together(inside, clients, func() (n int64, err error) {
		for n == 0 || time.Since(began) < d {
			c, err := dial(to, timeout)
			if err != nil {
				return n, err
			}
			err = awaitEnd(c)
			c.Close()
			if err != nil {
				return n, err
			}
			n++
		}
		return n, nil
	})
	return float64(made) / time.Since(began).Seconds(), err
}

// together adds up what so many clients count at the same time.
func together(inside Inside, clients int, count func() (int64, error)) (int64, error) {
	var group errgroup.Group
	var sum atomic.Int64
	for range clients {
		group.Go(func() error {
			return inside(func() error {
				n, err := count()
				sum.Add(n)
				return err
			})
		})
	}
	err := group.Wait()
	return sum.Load(), err
}

// dial connects, for at most so long in all.
func dial(to netip.AddrPort, limit time.Duration) (net.Conn, error) {
	c, err := net.DialTimeout("tcp", to.String(), timeout)
	if err == nil {
		c.SetDeadline(time.Now().Add(limit))
	}
	return c, err
}

func awaitEnd(c net.Conn) error {
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("the server did not end the connection, but sent %d bytes (%v)", n, err)
	}
	return nil
}

// Discard is the server of Bulk.
func Discard(c net.Conn) {
	defer c.Close()
	for piece := make([]byte, pieces); ; {
		if _, err := c.Read(piece); err != nil {
			return
		}
	}
}

// End is the server of NewConnections.
func End(c net.Conn) { c.Close() }
