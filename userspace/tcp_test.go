// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/tcprelay"
	"signalbox/proxier/plan"
)

func TestEndIsPassedOnInEachDirection(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		heard := make(chan string, 1)
		w.listen(0, func(c *net.TCPConn) {
			b, _ := io.ReadAll(c) // ends only when the client's end has come through
			heard <- string(b)
			c.Write([]byte("answer after the end"))
			c.Close()
		})
		w.listen(1, func(c *net.TCPConn) {
			c.Write([]byte("and no more"))
			c.CloseWrite()
			b, _ := io.ReadAll(c)
			heard <- string(b)
			c.Close()
		})
		w.serve(0, 0, 0)
		w.serve(1, 0, 1)
		c := w.dial(0)
		c.Write([]byte("question"))
		c.CloseWrite()
		if b, err := io.ReadAll(c); err != nil || string(b) != "answer after the end" {
			t.Errorf("client heard %q, error %v", b, err)
		}
		if got := <-heard; got != "question" {
			t.Errorf("endpoint heard %q", got)
		}
		c = w.dial(1)
		if b, err := io.ReadAll(c); err != nil || string(b) != "and no more" {
			t.Errorf("client heard %q, error %v", b, err)
		}
		c.Write([]byte("still talking"))
		c.Close()
		if got := <-heard; got != "still talking" {
			t.Errorf("endpoint heard %q", got)
		}
		w.await("the end of both connections", func() bool { return w.p.relay.stats().Connections == 0 })
	})
}

func TestResetIsPassedOn(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.listen(0, func(c *net.TCPConn) {
			_, _ = c.Read(make([]byte, 1))
			c.SetLinger(0) // makes the end a reset
			c.Close()
		})
		w.serve(0, 0, 0)
		c := w.dial(0)
		c.Write([]byte("?"))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("got %v, want a reset: a regular end would make a cut answer look whole", err)
		}
	})
}

// TestBackPressure stops reading at one end: the other must come to a stand,
// with the bytes waiting in the kernel, and all of them arrive in the end.
func TestBackPressure(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	read := make(chan int64)
	w.listen(0, func(c *net.TCPConn) {
		<-read
		n, _ := io.Copy(io.Discard, c)
		read <- n
		c.Close()
	})
	w.serve(0, 0, 0)
	c := w.dial(0)
	var written int64
	// A busy machine blocks a write as well: only bytes in a pipe show that the
	// relay waits for the reader.
	deadline := time.Now().Add(time.Minute)
	for blocked := false; !blocked || fullPipes(t) == 0; {
		if time.Now().After(deadline) {
			t.Fatal("no bytes wait in a pipe: they are not spliced")
		}
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := c.Write(make([]byte, 1<<20))
		blocked = errors.Is(err, os.ErrDeadlineExceeded) && n == 0
		if written += int64(n); written > 256<<20 {
			t.Fatal("256 MiB were taken though nobody reads")
		}
	}
	read <- 0
	c.CloseWrite()
	if n := <-read; n != written {
		t.Errorf("%d bytes arrived, %d were written", n, written)
	}
}

func TestFailingEndpointIsReplacedAndPassedOver(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.echo(0)
		w.serve(0, 0, 0, 1, 2) // nobody listens at 1 and 2
		for range 100 {
			w.connect(0).Close()
		}
		s := w.p.relay.stats()
		// Each is tried UnhealthyAfter times, and once after each pause.
		if s.DialFailures < 2 || s.DialFailures > 2*(tcprelay.UnhealthyAfter+10) {
			t.Errorf("%d dials failed in 100 connections to three endpoints of which two are dead", s.DialFailures)
		}
		if s.NoEndpoint != 0 {
			t.Errorf("%d connections found no endpoint", s.NoEndpoint)
		}
		w.echo(1)
		deadline := time.Now().Add(2 * tcprelay.MaxUnhealthy)
		for {
			c := w.connect(0)
			c.Close()
			if c.server == "1\n" {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("an endpoint that answers again gets no connections")
			}
		}
	})
}

func TestNobodyAnswers(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	w.serve(0, 0, 0, 1, 2, 3)
	w.mustReset(0)
	if s := w.p.relay.stats(); s.DialFailures != tcprelay.DialTries || s.NoEndpoint != 1 {
		t.Errorf("%d dials for %d connections, want %d for 1", s.DialFailures, s.NoEndpoint, tcprelay.DialTries)
	}
}

func TestOpenConnectionsOutliveTheirEndpointAndService(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.echo(0, 1)
		w.serve(0, 0, 0)
		c := w.connect(0)
		w.serve(0, 0, 1)
		c.ask("the endpoint has left")
		for range 10 {
			if got := w.connect(0).server; got != "1\n" {
				t.Fatalf("a new connection went to %q", got)
			}
		}
		w.remove(0)
		c.ask("the Service is gone")
		if c, err := net.DialTimeout("tcp", w.vip(0).String(), time.Second); err == nil {
			c.Close()
			t.Error("a Service that is gone takes connections")
		}
	})
}

func TestAffinity(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.echo(0, 1, 2)
		w.serve(0, time.Hour, 0, 1, 2)
		first := w.connect(0).server
		for range 20 {
			if got := w.connect(0).server; got != first {
				t.Fatalf("went to %q, was with %q", got, first)
			}
		}
		rest := map[string][]int{"0\n": {1, 2}, "1\n": {0, 2}, "2\n": {0, 1}}[first]
		w.serve(0, time.Hour, rest...)
		second := w.connect(0).server
		if second == first {
			t.Fatalf("still with %q, which is gone", first)
		}
		w.serve(0, time.Hour, 0, 1, 2)
		for range 20 {
			if got := w.connect(0).server; got != second {
				t.Fatalf("went to %q, was with %q", got, second)
			}
		}
	})
}

func TestConnectionLimit(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	if shared, err := tcprelay.ProcessLimits(); err != nil || w.p.relay.tcp.Limits != shared {
		t.Errorf("a relay has limits of its own (%v)", err)
	}
	w.p.relay.tcp.Limits = &tcprelay.Limits{Connections: tcprelay.Limit{Max: 2}}
	w.echo(0)
	w.serve(0, 0, 0)
	a, b := w.connect(0), w.connect(0)
	w.mustReset(0)
	if n := w.p.relay.stats().Refused; n != 1 {
		t.Errorf("%d connections were refused, want 1", n)
	}
	a.Close()
	w.await("the end of one connection", func() bool { return w.p.relay.stats().Connections == 1 })
	w.connect(0).ask("there is room again")
	b.ask("still here")
}

// TestNoFilesLeft lets accept fail with EMFILE: the connection waits.
func TestNoFilesLeft(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	w.echo(0)
	w.serve(0, 0, 0)
	var before unix.Rlimit
	w.must(unix.Getrlimit(unix.RLIMIT_NOFILE, &before))
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	w.must(err)
	f := os.NewFile(uintptr(fd), "client")
	defer f.Close()
	next, err := os.Open(os.DevNull)
	w.must(err)
	limit := before
	limit.Cur = uint64(next.Fd())
	next.Close()
	w.must(unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
	defer func() { w.must(unix.Setrlimit(unix.RLIMIT_NOFILE, &before)) }()
	// Earlier tests still close some. The relay must not get those.
	takeFree := func() {
		for {
			f, err := os.Open(os.DevNull)
			if err != nil {
				return
			}
			t.Cleanup(func() { f.Close() })
		}
	}
	takeFree()
	w.must(unix.Connect(fd, &unix.SockaddrInet4{Addr: w.vip(0).Addr().As4(), Port: 80}))
	w.await("a failed accept", func() bool {
		takeFree()
		return w.p.relay.stats().AcceptFailures > 1
	})
	w.must(unix.Setrlimit(unix.RLIMIT_NOFILE, &before))
	w.must(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(hangTimeout / time.Second)}))
	b := make([]byte, 2)
	if n, err := unix.Read(fd, b); err != nil || string(b[:n]) != "0\n" {
		t.Errorf("the connection that waited got %d bytes, %q, error %v", n, b, err)
	}
}

// TestTakeover starts a relay while another is at work, and then ends that.
func TestTakeover(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.echo(0, 1)
		w.echoUDP(0, 1)
		w.serve(0, 0, 0)
		u := w.dialUDP(0)
		w.askUDP(u)
		old, id := w.p, w.p.state.ids
		w.p = w.proxier()
		w.connect(0).ask("the new one listens, the old one serves")
		w.serve(0, 0, 1)
		for k, n := range w.p.state.ids {
			if id[k] != n {
				t.Errorf("%s has number %d, had %d", k, n, id[k])
			}
		}
		w.must(old.Close())
		for range 10 {
			if got := w.connect(0).server; got != "1\n" {
				t.Errorf("after the old one's end a connection went to %q", got)
			}
		}
		if got := w.askUDP(u); got != "1" {
			t.Errorf("the UDP client was answered by %q", got)
		}
	})
}

// TestPause checks that a paused relay gets no new connections and flows.
func TestPause(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.echo(0)
		w.echoUDP(0)
		w.serve(0, 0, 0)
		first, second := w.p, w.proxier()
		open, flow := w.connect(0), w.dialUDP(0)
		w.askUDP(flow)
		for _, turn := range []struct{ active, paused *Proxier }{{second, first}, {first, second}} {
			w.must(turn.active.Sync(t.Context(), w.plan, plan.Change{All: true}))
			turn.paused.Pause()
			activeBefore, pausedBefore := turn.active.relay.stats(), turn.paused.relay.stats()
			for range 30 {
				w.connect(0).ask("hello")
				w.askUDP(w.dialUDP(0))
			}
			w.askUDP(flow)
			open.ask("still here")
			if n := turn.paused.relay.stats(); n.Accepted != pausedBefore.Accepted || n.FlowsMade != pausedBefore.FlowsMade {
				t.Errorf("the paused relay has %+v, had %+v", n, pausedBefore)
			}
			if n := turn.active.relay.stats(); n.Accepted != activeBefore.Accepted+30 || n.FlowsMade < activeBefore.FlowsMade+30 {
				t.Errorf("the active relay has %+v, had %+v", n, activeBefore)
			}
		}
	})
}

func TestRelayPortsAreHidden(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.sync()
		for o := range trafficSourceCount {
			at := w.endpoint(0).Addr()
			c, err := net.DialTimeout("tcp", net.JoinHostPort(at.String(), "1036"+string('1'+rune(o))), hangTimeout)
			if !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("port for traffic from %s: %v, want refused", o, err)
			}
			if c != nil {
				c.Close()
			}
		}
	})
}
