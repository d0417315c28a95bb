// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"signalbox/internal/tcprelay"
	"signalbox/internal/wait"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// relay forwards redirected connections and datagrams to endpoints, in one family.
type relay struct {
	family       plan.Family
	ns           *tcprelay.Namespace
	listeners    *listeners
	dialer       *dialer
	routes       *routes
	targets      targets
	idle         idleTimes
	handoverTime time.Duration // the constant, except in tests
	counts       counters      // in addition to those of tcp
	tcp          *tcprelay.TCP

	ctx    context.Context
	cancel context.CancelFunc
	done   sync.WaitGroup // all goroutines
	// node is that of the last plan.
	node atomic.Pointer[plan.Node]
	// handingOver: old listeners are still open, and the kernel gives new packets
	// to another relay. endHandover closes these listeners at once.
	handingOver atomic.Bool
	endHandover func()
	flows       flowTable
}

// newRelay makes a relay for the network namespace of the calling thread.
func newRelay(f plan.Family, r *routes) (*relay, error) {
	tcp, err := tcprelay.New(f, Mode)
	if err != nil {
		return nil, err
	}
	ns, err := tcprelay.CurrentNamespace()
	if err != nil {
		return nil, err
	}
	re := &relay{
		family: f, ns: ns, dialer: newDialer(f, ns), routes: r,
		targets: targets{byID: map[frontendID]*target{}, gone: map[frontendID]goneTarget{}},
		tcp:     tcp, idle: idleTimes{answerIdle, flowIdle}, handoverTime: handoverTime, endHandover: func() {},
		flows: flowTable{open: map[flowKey]*flow{}},
	}
	re.node.Store(&plan.Node{})
	re.ctx, re.cancel = context.WithCancel(context.Background())
	re.done.Go(re.maintain)
	return re, nil
}

// start opens the sockets that redirected traffic arrives at, unless they are open.
// The calling thread must be in the relay's network namespace. The relay must have
// its targets before: where another process relays already, the kernel gives some
// connections to this one at once.
func (r *relay) start() error {
	if r.listeners != nil {
		return nil
	}
	r.endHandover() // selectSecond works with two sockets at a port, not with three
	l, err := listen(r.family)
	if err != nil {
		return err
	}
	r.listeners = l
	for o := range trafficSourceCount {
		r.tcp.Accept(l.tcp[o], func(c *net.TCPConn) (tcprelay.Route, bool) { return r.route(o, c) })
		r.done.Go(func() { r.receiveAll(l, o) })
	}
	return nil
}

// handoverTime is how long a relay serves, after another has taken over, what the
// kernel gave it before: connections in the middle of a handshake, a retransmission
// included, datagrams that wait, and answers to datagrams that it forwarded.
const handoverTime = 3 * time.Second

// pause gives new connections and UDP flows to the relay that took over, until
// start is called again. What has arrived is served for handoverTime.
func (r *relay) pause() {
	r.routes.stopRepairing() // the other process may do without
	l := r.listeners
	if l == nil {
		return
	}
	r.listeners = nil
	if err := l.selectSecond(); err != nil {
		r.tcp.Log.Warn("the kernel cannot give all new packets to the relay that took over; this relay resets a few connections", "family", r.family.String(), "error", err)
	}
	ctx, cancel := context.WithCancel(r.ctx)
	gone := make(chan struct{})
	r.endHandover = func() {
		cancel()
		<-gone
	}
	r.handingOver.Store(true)
	r.done.Go(func() {
		defer close(gone)
		defer r.handingOver.Store(false)
		wait.For(ctx, r.handoverTime)
		cancel()
		l.close()
		r.flows.endAt(l)
	})
}

// close ends the relay with its connections and flows.
func (r *relay) close() {
	r.routes.stopRepairing()
	if r.listeners != nil {
		r.listeners.close()
	}
	r.cancel()
	r.tcp.Close()
	r.flows.closeAll()
	r.done.Wait()
	r.ns.Close()
}

// expiryInterval is how often expired entries are removed.
const expiryInterval = 10 * time.Second

// maintain removes expired entries until the relay is closed.
func (r *relay) maintain() {
	for wait.For(r.ctx, expiryInterval) {
		now := time.Now()
		r.targets.expire(now)
		r.tcp.Chooser.Expire(now)
		_ = r.ns.Do(r.routes.readSourceMarks) // else the last reading counts
	}
}

// route finds out where a connection of a traffic source goes.
func (r *relay) route(o trafficSource, client *net.TCPConn) (tcprelay.Route, bool) {
	id, ok := idOf(r.family, client.LocalAddr().(*net.TCPAddr).AddrPort().Addr())
	if !ok {
		return tcprelay.Route{}, false
	}
	t := r.targets.find(id, true)
	if t == nil {
		return tcprelay.Route{}, false
	}
	peer := client.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	return tcprelay.Route{Choice: t.choice(o), Dial: func(ctx context.Context, at netip.AddrPort) (net.Conn, error) {
		source := r.sourceFor(t, o, peer, at.Addr())
		c, err := r.dialer.dial(ctx, "tcp", source, at)
		if err == nil && source.IsValid() {
			r.counts.transparent.Add(1)
		}
		return c, err
	}}, true
}

// reset ends the TCP connections to removed endpoints.
func (r *relay) reset(removed map[plan.ServicePortName][]netip.AddrPort) {
	for name, endpoints := range removed {
		if name.Protocol == plan.TCP {
			r.tcp.Reset(name, endpoints)
		}
	}
}

// setNode sets the node's facts for later connections.
func (r *relay) setNode(n plan.Node) { r.node.Store(&n) }

// sourceFor is the source address of a connection to an endpoint: the client's,
// where the plan keeps it and the answers pass through this node, or the zero one,
// which stands for the node's.
func (r *relay) sourceFor(t *target, o trafficSource, client, endpoint netip.Addr) netip.Addr {
	if o == fromNode || t.masquerade&o.bit() != 0 || r.node.Load().BetweenNodes(client, endpoint) || !r.routes.onDifferentLinks(client, endpoint) {
		return netip.Addr{}
	}
	return client
}

// Drain waits until the relay has no connection and no handover is in progress, or
// ctx ends. It still accepts connections: they arrive only while no other process has
// taken over the frontends. It does not wait for UDP flows: the rules of a successor
// send the client's next datagram elsewhere.
func (p *Proxier) Drain(ctx context.Context) {
	p.relay.tcp.Drain(ctx, p.relay.handingOver.Load)
}

// Relays is true as long as the relay exists.
func (p *Proxier) Relays() bool { return true }

// counters are the counts that the TCP relay does not have.
type counters struct {
	flows                        atomic.Int64
	flowsMade, lost, transparent atomic.Uint64
}

func (r *relay) stats() proxier.RelayStats {
	t, c, most := &r.tcp.Counts, &r.counts, r.tcp.Limits
	return proxier.RelayStats{
		Connections: t.Connections.Load(), Flows: c.flows.Load(),
		MaxConnections: most.Connections.Max, MaxFlows: most.Flows.Max,
		Accepted: t.Accepted.Load(), FlowsMade: c.flowsMade.Load(),
		DialFailures: t.DialFailures.Load(), NoEndpoint: t.NoEndpoint.Load(),
		Refused: t.Refused.Load(), AcceptFailures: t.AcceptFailures.Load(), Lost: c.lost.Load(), Transparent: c.transparent.Load(),
	}
}
