// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"signalbox/proxier/plan"
)

// TestLeavingSocketsKeepWhatArrived takes connections and datagrams from the
// sockets of two relays only after the first has left the ports to the second.
func TestLeavingSocketsKeepWhatArrived(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		open := func() *listeners {
			l, err := listen(w.family)
			w.must(err)
			t.Cleanup(l.close)
			return l
		}
		const each = 30
		first := open()
		w.arrive(first.ports, each)
		second := open()
		w.must(first.selectSecond())
		w.arrive(first.ports, each)
		w.take(second, each)
		w.take(first, each)
		first.close()
		third := open()
		w.arrive(third.ports, each)
		for _, l := range []*listeners{second, third} { // all 30 by chance: one in 2^30
			w.take(l, 1)
		}
	})
}

// arrive has connections and datagrams come to a relay's ports, without a rule.
func (w *world) arrive(at ports, n int) {
	w.t.Helper()
	to := netip.AddrPortFrom(w.endpoint(0).Addr(), at.of(fromNode)).String()
	for range n {
		for _, network := range []string{"tcp", "udp"} {
			c, err := net.DialTimeout(network, to, hangTimeout)
			w.must(err)
			w.t.Cleanup(func() { c.Close() })
			_, err = c.Write([]byte("?"))
			w.must(err)
		}
	}
}

// take takes as many of each from sockets.
func (w *world) take(l *listeners, n int) {
	w.t.Helper()
	deadline := time.Now().Add(hangTimeout)
	l.tcp[fromNode].SetDeadline(deadline)
	l.udp[fromNode].SetReadDeadline(deadline)
	for i := range n {
		c, err := l.tcp[fromNode].Accept()
		if err != nil {
			w.t.Fatalf("after %d connections of %d: %v", i, n, err)
		}
		c.Close()
		if _, _, err := l.udp[fromNode].ReadFrom(make([]byte, 1)); err != nil {
			w.t.Fatalf("after %d datagrams of %d: %v", i, n, err)
		}
	}
}

// TestQuestionIsAnsweredAfterPause checks that a paused relay delivers an answer
// that comes after another relay has taken over.
func TestQuestionIsAnsweredAfterPause(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		slow, err := net.ListenPacket("udp", w.endpoint(0).String())
		w.must(err)
		defer slow.Close()
		slow.SetDeadline(time.Now().Add(hangTimeout))
		w.p.relay.handoverTime = time.Hour
		w.serve(0, 0, 0)
		client := w.dialUDP(0)
		client.SetDeadline(time.Now().Add(hangTimeout))
		_, err = client.Write([]byte("?"))
		w.must(err)
		_, from, err := slow.ReadFrom(make([]byte, 1))
		w.must(err)
		w.must(w.proxier().Sync(t.Context(), w.plan, plan.Change{All: true}))
		w.p.Pause()
		_, err = slow.WriteTo([]byte("!"), from)
		w.must(err)
		if _, err := client.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
	})
}

// TestDrainWaitsForHandover checks that a paused relay closes its
// sockets and flows, and that Drain knows when.
func TestDrainWaitsForHandover(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		w.p.relay.handoverTime = 20 * time.Millisecond
		w.echoUDP(0)
		w.serve(0, 0, 0)
		w.askUDP(w.dialUDP(0))
		at := w.p.relay.listeners.ports
		w.p.Pause()
		w.p.Drain(context.Background())
		w.await("the end of the flow", func() bool { return w.p.relay.stats().Flows == 0 })
		// Without SO_REUSEPORT only one can have the port.
		c, err := net.ListenUDP("udp", &net.UDPAddr{Port: int(at.of(fromNode))})
		w.must(err)
		c.Close()
	})
}
