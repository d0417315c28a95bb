// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"context"
	"errors"
	"math"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/tcprelay"
	"signalbox/internal/wait"
	"signalbox/proxier/plan"
)

// A UDP flow ends when neither side has sent anything for flowIdle, or for
// answerIdle if the client sent one datagram only. Conntrack has about the same
// timeouts.
const (
	answerIdle = 10 * time.Second
	flowIdle   = 120 * time.Second
)

// flowTries is how many endpoints are tried for one datagram.
const flowTries = 3

// maxDatagram is the largest that UDP can carry.
const maxDatagram = 65535

// datagrams are buffers for one datagram each.
var datagrams = sync.Pool{New: func() any { b := make([]byte, maxDatagram); return &b }}

// flowKey is one client at one frontend.
type flowKey struct {
	client        netip.AddrPort
	id            frontendID
	trafficSource trafficSource
	// at is the socket that its datagrams arrive at and answers leave from. After
	// a handover back, a relay has flows at old and new sockets.
	at *net.UDPConn
}

// flow is a client's connected socket to an endpoint.
type flow struct {
	key      flowKey
	target   *target // only for the traffic source's receiving goroutine
	endpoint netip.AddrPort
	socket   *net.UDPConn
	raw      syscall.RawConn // of socket
	sent     atomic.Int64    // datagrams of the client
	last     atomic.Int64    // when a datagram was sent or received last, in ns since clockStart, or flowOver
	refused  atomic.Bool     // the endpoint's port is closed
}

// clockStart is the zero of the times of flows. It has a monotonic clock reading: when the
// wall clock is set, flows keep their timeouts.
var clockStart = time.Now()

// flowOver in flow.last: the flow forwards no more datagrams.
const flowOver = math.MinInt64

// use postpones the flow's end; false if it has ended. Only after true may the
// caller write to the socket: so no datagram goes out by a flow that does not wait
// for the answer.
func (f *flow) use() bool {
	for {
		last := f.last.Load()
		if last == flowOver {
			return false
		}
		if f.last.CompareAndSwap(last, int64(time.Since(clockStart))) {
			return true
		}
	}
}

// ends is when the flow ends if no datagram is sent or received before.
func (f *flow) ends(idle idleTimes) time.Time {
	return clockStart.Add(time.Duration(f.last.Load()) + idle.of(f))
}

// expire ends the flow if it has been idle for long enough.
func (f *flow) expire(idle idleTimes) bool {
	last := f.last.Load()
	return time.Since(clockStart)-time.Duration(last) >= idle.of(f) && f.last.CompareAndSwap(last, flowOver)
}

// idleTimes are answerIdle and flowIdle, except in tests.
type idleTimes struct{ answer, flow time.Duration }

func (i idleTimes) of(f *flow) time.Duration {
	if f.sent.Load() > 1 {
		return i.flow
	}
	return i.answer
}

type flowTable struct {
	mu     sync.Mutex
	closed bool
	open   map[flowKey]*flow
}

func (ft *flowTable) find(k flowKey) *flow {
	ft.mu.Lock()
	defer ft.mu.Unlock()
	return ft.open[k]
}

func (ft *flowTable) add(f *flow) bool {
	ft.mu.Lock()
	defer ft.mu.Unlock()
	if ft.closed {
		return false
	}
	ft.open[f.key] = f
	return true
}

// remove removes the flow, unless another has replaced it.
func (ft *flowTable) remove(f *flow) {
	ft.mu.Lock()
	defer ft.mu.Unlock()
	if ft.open[f.key] == f {
		delete(ft.open, f.key)
	}
}

// endAt ends the flows of these sockets.
func (ft *flowTable) endAt(l *listeners) {
	ft.mu.Lock()
	defer ft.mu.Unlock()
	ft.end(func(k flowKey) bool { return l.udp[k.trafficSource] == k.at })
}

// closeAll ends all flows, and accepts none after.
func (ft *flowTable) closeAll() {
	ft.mu.Lock()
	defer ft.mu.Unlock()
	ft.closed = true
	ft.end(func(flowKey) bool { return true })
}

// end ends flows by closing their sockets. The lock is held.
func (ft *flowTable) end(which func(flowKey) bool) {
	for k, f := range ft.open {
		if which(k) {
			delete(ft.open, k)
			f.socket.Close()
		}
	}
}

// receiveAll forwards the datagrams of a traffic source until the socket is closed.
func (r *relay) receiveAll(from *listeners, o trafficSource) {
	socket := from.udp[o]
	buffer, oob := make([]byte, maxDatagram), make([]byte, 128)
	overflow := uint32(0)
	for {
		n, oobn, _, client, err := socket.ReadMsgUDPAddrPort(buffer, oob)
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			r.tcp.Log.Warn("datagrams cannot be received; trying again", "family", r.family.String(), "error", err)
			if !wait.For(r.ctx, tcprelay.AcceptPause) {
				return
			}
			continue
		}
		a := readArrival(oob[:oobn])
		if more := int32(a.overflow - overflow); more > 0 {
			r.counts.lost.Add(uint64(more))
		}
		overflow = a.overflow
		if id, ok := idOf(r.family, a.at); ok {
			r.forward(flowKey{netip.AddrPortFrom(client.Addr().Unmap(), client.Port()), id, o, socket}, buffer[:n])
		}
	}
}

// forward sends a client's datagram to its flow's endpoint.
func (r *relay) forward(k flowKey, datagram []byte) {
	t := r.targets.find(k.id, false)
	if t == nil {
		r.tcp.Counts.NoEndpoint.Add(1)
		return
	}
	f := r.flows.find(k)
	if f != nil && !r.keeps(f, t) {
		r.end(f)
		f = nil
	}
	var tried []netip.AddrPort
	for range flowTries {
		if f == nil {
			var silent netip.AddrPort
			if f, silent = r.newFlow(k, t, tried); f == nil && !silent.IsValid() {
				return
			} else if f == nil {
				tried = append(tried, silent)
				continue
			}
		}
		err := net.ErrClosed
		if f.use() {
			err = f.write(datagram)
		}
		if err == nil {
			f.sent.Add(1)
			return
		}
		// The endpoint refused an earlier datagram, or the flow has just ended.
		if errors.Is(err, unix.ECONNREFUSED) {
			r.tcp.DialFailed(t.name, f.endpoint, err)
			tried = append(tried, f.endpoint)
		} else if !errors.Is(err, net.ErrClosed) {
			r.counts.lost.Add(1) // too large, or no room
			return
		}
		r.end(f)
		f = nil
	}
}

// write sends a datagram to the endpoint. The kernel may return an error about an
// earlier datagram, which was too large for the path for example. Then write tries
// again.
func (f *flow) write(datagram []byte) error {
	err := sendNow(f.raw, datagram, nil, nil)
	if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, net.ErrClosed) {
		err = sendNow(f.raw, datagram, nil, nil)
	}
	return err
}

// keeps says whether a flow may go on: its endpoint must still serve the Service.
func (r *relay) keeps(f *flow, t *target) bool {
	if f.refused.Load() {
		return false
	}
	if f.target == t {
		return true
	}
	if f.target.name != t.name || !t.usable.Contains(f.endpoint) && !t.endpoints(f.key.trafficSource).Contains(f.endpoint) {
		return false
	}
	f.target = t
	return true
}

// newFlow makes a flow to an endpoint that was not tried. If that fails, silent is
// the endpoint that could not be reached, or the zero value if another try is
// useless.
func (r *relay) newFlow(k flowKey, t *target, tried []netip.AddrPort) (made *flow, silent netip.AddrPort) {
	if !r.tcp.Limits.Flows.Acquire(&r.counts.flows) {
		r.tcp.Counts.Refused.Add(1)
		r.tcp.Log.Warn("the limit of UDP flows is reached; datagrams of new flows are dropped", "family", r.family.String(), "limit", r.tcp.Limits.Flows.Max)
		return nil, silent
	}
	f, silent := r.openFlow(k, t, tried)
	if f == nil || !r.flows.add(f) {
		if f != nil {
			f.socket.Close()
		}
		r.tcp.Limits.Flows.Release(&r.counts.flows)
		return nil, silent
	}
	r.counts.flowsMade.Add(1)
	r.done.Go(func() {
		defer r.tcp.Limits.Flows.Release(&r.counts.flows)
		r.answer(f)
	})
	return f, silent
}

func (r *relay) openFlow(k flowKey, t *target, tried []netip.AddrPort) (opened *flow, silent netip.AddrPort) {
	at, ok := r.tcp.Chooser.Choose(t.choice(k.trafficSource), k.client.Addr(), tried, time.Now())
	if !ok {
		r.tcp.Counts.NoEndpoint.Add(1)
		return nil, netip.AddrPort{}
	}
	source := r.sourceFor(t, k.trafficSource, k.client.Addr(), at.Addr())
	c, err := r.dialer.dial(context.Background(), "udp", source, at)
	if err != nil {
		r.tcp.DialFailed(t.name, at, err)
		return nil, at
	}
	if source.IsValid() {
		r.counts.transparent.Add(1)
	}
	f := &flow{key: k, target: t, endpoint: at, socket: c.(*net.UDPConn)}
	if f.raw, err = f.socket.SyscallConn(); err != nil {
		r.counts.lost.Add(1)
		f.socket.Close()
		return nil, netip.AddrPort{}
	}
	f.last.Store(int64(time.Since(clockStart))) // before expire can look at it
	return f, netip.AddrPort{}
}

// end ends a flow; its goroutine sees the closed socket.
func (r *relay) end(f *flow) {
	r.flows.remove(f)
	f.socket.Close()
}

// answer sends the endpoint's datagrams to the client, from the address that the
// client sent to, until the flow ends.
func (r *relay) answer(f *flow) {
	defer r.end(f)
	back, err := f.key.at.SyscallConn()
	if err != nil {
		return
	}
	to, err := sockaddr(f.key.client)
	if err != nil {
		r.tcp.Log.Warn("a client's flow cannot be answered and ends", "client", f.key.client.String(), "error", err)
		return
	}
	from := sourceControl(f.key.id.addr(r.family))
	for {
		f.socket.SetReadDeadline(f.ends(r.idle))
		buffer, n, err := receive(f.raw)
		switch {
		case err == nil:
			f.use()
			r.tcp.Chooser.Answered(tcprelay.Peer{Protocol: plan.UDP, At: f.endpoint})
			if err := sendNow(back, (*buffer)[:n], from, to); err != nil {
				r.counts.lost.Add(1)
			}
			datagrams.Put(buffer)
		case errors.Is(err, os.ErrDeadlineExceeded):
			if f.expire(r.idle) {
				return
			}
		case errors.Is(err, unix.ECONNREFUSED):
			r.tcp.Chooser.Failed(tcprelay.Peer{Protocol: plan.UDP, At: f.endpoint}, time.Now())
			f.refused.Store(true)
			return
		case errors.Is(err, net.ErrClosed):
			return
		default:
			// The error concerns one packet, which was too large for the path for
			// example. The pause is for an error that stays.
			if !wait.For(r.ctx, tcprelay.AcceptPause) {
				return
			}
		}
	}
}

// receive waits for a datagram. It gets a buffer only when there is one: a waiting
// flow needs no buffer.
func receive(raw syscall.RawConn) (buffer *[]byte, n int, err error) {
	waitErr := raw.Read(func(fd uintptr) bool {
		buffer = datagrams.Get().(*[]byte)
		n, _, err = unix.Recvfrom(int(fd), *buffer, unix.MSG_DONTWAIT)
		if err == nil {
			return true
		}
		datagrams.Put(buffer)
		return err != unix.EAGAIN && err != unix.EINTR
	})
	if waitErr != nil {
		return nil, 0, waitErr
	}
	return buffer, n, err
}
