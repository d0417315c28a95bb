// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"encoding/binary"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/tcprelay"
	"signalbox/proxier/plan"
)

func TestFlowStaysAndMoves(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.echoUDP(0, 1)
		w.serve(0, 0, 0)
		// A connected socket hears only the address that it sent to.
		c := w.dialUDP(0)
		if got := w.askUDP(c); got != "0" {
			t.Fatalf("%q answered", got)
		}
		w.serve(0, 0, 0, 1)
		for range 10 {
			if got := w.askUDP(c); got != "0" {
				t.Fatalf("%q answered, though the flow's endpoint still serves", got)
			}
		}
		if n := w.p.relay.stats().FlowsMade; n != 1 {
			t.Errorf("%d flows were made, want 1", n)
		}
		w.serve(0, 0, 1)
		if got := w.askUDP(c); got != "1" {
			t.Errorf("%q answered, though it does not serve any more", got)
		}
		w.await("the end of the old flow", func() bool { return w.p.relay.stats().Flows == 1 })
	})
}

func TestFlowMovesFromRefusingEndpoint(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.echoUDP(1)
		w.serve(0, 0, 0, 1) // nobody is at 0
		for range 10 {
			if got := w.askUDP(w.dialUDP(0)); got != "1" {
				t.Fatalf("%q answered", got)
			}
		}
	})
}

// TestFlowMovesFromUnreachableEndpoint has an endpoint that nothing routes to.
// Each client says its first word once.
func TestFlowMovesFromUnreachableEndpoint(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.echoUDP(1)
		w.serve(0, 0, 1, 9)
		for range 20 {
			c := w.dialUDP(0)
			_, err := c.Write([]byte("?"))
			w.must(err)
			c.SetReadDeadline(time.Now().Add(hangTimeout))
			if _, err := c.Read(make([]byte, 1)); err != nil {
				t.Fatalf("the first datagram is not answered: %v", err)
			}
		}
	})
}

// TestFlowOutlivesTooLargePacket has a router say that a packet of a flow was too
// large (RFC 1191).
func TestFlowOutlivesTooLargePacket(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	w.echoUDP(0)
	w.serve(0, 0, 0)
	c := w.dialUDP(0)
	w.askUDP(c)
	router, err := net.Dial("ip4:icmp", w.endpoint(0).Addr().String())
	w.must(err)
	defer router.Close()
	flows := &w.p.relay.flows
	flows.mu.Lock()
	f := slices.Collect(maps.Values(flows.open))[0]
	flows.mu.Unlock()
	for range 20 {
		_, err := router.Write(fragmentationNeeded(f.socket.LocalAddr().(*net.UDPAddr).AddrPort(), f.endpoint))
		w.must(err)
		w.await("the error is read", func() bool { return !hasError(f.socket) })
		w.askUDP(c)
	}
	if n := w.p.relay.stats().FlowsMade; n != 1 {
		t.Errorf("%d flows were made, want the first to go on", n)
	}
	if n := w.p.relay.stats().Lost; n != 0 {
		t.Errorf("%d datagrams were lost", n)
	}
}

// hasError says whether an error waits at a socket, and leaves it there.
func hasError(c *net.UDPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	var poll []unix.PollFd
	err = raw.Control(func(fd uintptr) {
		poll = []unix.PollFd{{Fd: int32(fd)}}
		_, _ = unix.Poll(poll, 0) // without an answer there is no event
	})
	return err == nil && poll[0].Revents&unix.POLLERR != 0
}

// fragmentationNeeded is an ICMP message about a UDP packet.
func fragmentationNeeded(from, to netip.AddrPort) []byte {
	m := []byte{3, 4, 0, 0, 0, 0, 1400 >> 8, 1400 & 0xff}
	m = append(m, 0x45, 0, 0x05, 0xdc, 0, 0, 0x40, 0, 64, unix.IPPROTO_UDP, 0, 0)
	m = append(append(m, from.Addr().AsSlice()...), to.Addr().AsSlice()...)
	m = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(m, from.Port()), to.Port())
	m = append(m, 0x05, 0xc8, 0, 0)
	var sum uint32
	for i := 0; i < len(m); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(m[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(m[2:], ^uint16(sum))
	return m
}

func TestFlowAffinity(t *testing.T) {
	w := newWorld(t, 4)
	w.echoUDP(0, 1, 2)
	w.serve(0, time.Hour, 0, 1, 2)
	first := w.askUDP(w.dialUDP(0))
	for range 20 {
		if got := w.askUDP(w.dialUDP(0)); got != first {
			t.Fatalf("%q answered, %q did before", got, first)
		}
	}
}

func TestIdleFlowsEnd(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.p.relay.idle = idleTimes{answer: 50 * time.Millisecond, flow: time.Hour}
		w.echoUDP(0)
		w.serve(0, 0, 0)
		once, often := w.dialUDP(0), w.dialUDP(0)
		w.askUDP(often)
		w.askUDP(once)
		w.askUDP(often)
		w.await("the end of the flow that was one question", func() bool { return w.p.relay.stats().Flows <= 1 })
		if got := w.askUDP(once); got != "0" {
			t.Errorf("%q answered after the flow's end", got)
		}
	})
}

func TestFlowLimit(t *testing.T) {
	w := newWorld(t, 4)
	w.p.relay.tcp.Limits = &tcprelay.Limits{Flows: tcprelay.Limit{Max: 1}}
	w.echoUDP(0)
	w.serve(0, 0, 0)
	first := w.dialUDP(0)
	w.askUDP(first)
	second := w.dialUDP(0)
	second.Write([]byte("?"))
	w.await("a refused datagram", func() bool { return w.p.relay.stats().Refused == 1 })
	if got := w.askUDP(first); got != "0" {
		t.Errorf("%q answered the flow that was there", got)
	}
}

// TestLargeDatagram sends what fits into no packet.
func TestLargeDatagram(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		size := make(chan int, 1)
		c, err := net.ListenPacket("udp", w.endpoint(0).String())
		w.must(err)
		defer c.Close()
		go func() {
			b := make([]byte, maxDatagram)
			for {
				n, from, err := c.ReadFrom(b)
				if err != nil {
					return
				}
				select {
				case size <- n:
				default:
				}
				c.WriteTo(b[:n], from)
			}
		}()
		w.serve(0, 0, 0)
		u := w.dialUDP(0)
		b := make([]byte, 60000)
		if _, err := u.Write(b); err != nil {
			t.Fatal(err)
		}
		if n := <-size; n != len(b) {
			t.Errorf("endpoint got %d bytes of %d", n, len(b))
		}
		u.SetReadDeadline(time.Now().Add(hangTimeout))
		if n, err := u.Read(make([]byte, maxDatagram)); n != len(b) || err != nil {
			t.Errorf("client got %d bytes of %d, error %v", n, len(b), err)
		}
	})
}

// TestFlowBeginsAlive makes a flow as forward does. Its goroutine may be the
// first to run, and must not find the flow's time to be over.
func TestFlowBeginsAlive(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.echoUDP(0)
		w.serve(0, 0, 0)
		r := w.p.relay
		for range 100 {
			k := flowKey{w.endpoint(3), 0, fromNode, r.listeners.udp[fromNode]}
			for id := range r.targets.byID {
				k.id = id
			}
			f, _ := r.newFlow(k, r.targets.find(k.id, false), nil)
			if left := time.Until(f.ends(r.idle)); left < answerIdle/2 {
				t.Fatalf("a new flow has %v left of %v", left, answerIdle)
			}
			r.end(f)
		}
	})
}

// TestFlowIsUsedOrExpires tries both orders of a datagram and the end of the
// idle time.
func TestFlowIsUsedOrExpires(t *testing.T) {
	over := idleTimes{}
	f := &flow{}
	if !f.expire(over) {
		t.Fatal("a flow whose time is over does not expire")
	}
	if f.use() {
		t.Error("a flow that has expired takes a datagram, whose answer nobody waits for")
	}
	f = &flow{}
	if !f.use() {
		t.Fatal("a flow that has not expired takes no datagram")
	}
	if f.expire(idleTimes{answerIdle, flowIdle}) {
		t.Error("a flow expired just after a datagram")
	}
	if end := f.ends(idleTimes{answerIdle, flowIdle}); !strings.Contains(end.String(), " m=") { // the monotonic reading
		t.Error("a clock that is set changes when a flow ends")
	}
}

// TestExpiredFlowIsReplaced sends a datagram into a flow between its end and
// its removal.
func TestExpiredFlowIsReplaced(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	w.echoUDP(0)
	w.serve(0, 0, 0)
	c := w.dialUDP(0)
	w.askUDP(c)
	flows := &w.p.relay.flows
	flows.mu.Lock()
	for _, f := range flows.open {
		if !f.expire(idleTimes{}) {
			t.Error("the flow does not expire")
		}
	}
	flows.mu.Unlock()
	if got := w.askUDP(c); got != "0" {
		t.Errorf("%q answered", got)
	}
	if n := w.p.relay.stats().FlowsMade; n != 2 {
		t.Errorf("%d flows were made, want a second one in place of the first", n)
	}
}
