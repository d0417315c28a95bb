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
)

// relay takes captured connections and datagrams to endpoints, in one family.
type relay struct {
	family    proxier.Family
	ns        *tcprelay.Namespace
	listeners *listeners
	dialer    *dialer
	routes    *routes
	targets   targets
	idle      idleTimes
	linger    time.Duration // lastArrivals, but in tests
	counts    counters      // beside those of tcp
	tcp       *tcprelay.TCP

	ctx    context.Context
	cancel context.CancelFunc
	done   sync.WaitGroup // all goroutines
	// node is what the last plan said of this node.
	node atomic.Pointer[proxier.Node]
	// leaving says that listeners are open yet that nothing new comes to;
	// endLeaving closes them at once.
	leaving    atomic.Bool
	endLeaving func()
	flows      flowTable
}

// newRelay makes a relay for the network namespace of the calling thread.
func newRelay(f proxier.Family, r *routes) (*relay, error) {
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
		tcp:     tcp, idle: idleTimes{answerIdle, flowIdle}, linger: lastArrivals, endLeaving: func() {},
		flows: flowTable{open: map[flowKey]*flow{}},
	}
	re.node.Store(&proxier.Node{})
	re.ctx, re.cancel = context.WithCancel(context.Background())
	re.done.Go(re.maintain)
	return re, nil
}

// start opens the sockets that captured traffic arrives at, in the network
// namespace of the calling thread, unless they are open. It must know its
// targets by then: where another process relays already, some connections come
// here at once.
func (r *relay) start() error {
	if r.listeners != nil {
		return nil
	}
	r.endLeaving() // or the next to leave would not be the first of two
	l, err := listen(r.family)
	if err != nil {
		return err
	}
	r.listeners = l
	for o := range originCount {
		r.tcp.Accept(l.tcp[o], func(c *net.TCPConn) (tcprelay.Route, bool) { return r.route(o, c) })
		r.done.Go(func() { r.receiveAll(l, o) })
	}
	return nil
}

// lastArrivals is how long a relay that leaves the node to another still takes
// what the kernel had chosen it for: a connection whose handshake was not over,
// with a packet that is sent again, datagrams that wait, and the answers to those
// that were passed on.
const lastArrivals = 3 * time.Second

// standBy takes no more connections and UDP flows, until start is called again:
// another process relays, which would not get what arrives here. What has
// arrived, or is about to, is served.
func (r *relay) standBy() {
	r.routes.stopRestoring() // the other process may do without
	l := r.listeners
	if l == nil {
		return
	}
	r.listeners = nil
	if err := l.selectSecond(); err != nil {
		r.tcp.Log.Warn("what arrives may yet come to this relay though another serves; a few connections will be reset", "family", r.family.String(), "error", err)
	}
	ctx, cancel := context.WithCancel(r.ctx)
	gone := make(chan struct{})
	r.endLeaving = func() {
		cancel()
		<-gone
	}
	r.leaving.Store(true)
	r.done.Go(func() {
		defer close(gone)
		defer r.leaving.Store(false)
		wait.For(ctx, r.linger)
		cancel()
		l.close()
		r.flows.endAt(l)
	})
}

// close ends the relay and all that it has open.
func (r *relay) close() {
	r.routes.stopRestoring()
	if r.listeners != nil {
		r.listeners.close()
	}
	r.cancel()
	r.tcp.Close()
	r.flows.closeAll()
	r.done.Wait()
	r.ns.Close()
}

const (
	// restoreInterval is how long routes that another program removes may be missing.
	restoreInterval = time.Second
	// expiryInterval is how often expired entries are removed.
	expiryInterval = 10 * time.Second
)

// maintain does what the passing of time asks for.
func (r *relay) maintain() {
	restore, expiry := time.NewTicker(restoreInterval), time.NewTicker(expiryInterval)
	defer restore.Stop()
	defer expiry.Stop()
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-restore.C:
			if err := r.routes.restore(); err != nil {
				r.tcp.Log.Warn("missing routes cannot be added; connections from their clients' addresses may hang, or all; trying again every second",
					"family", r.family.String(), "error", err)
			}
		case now := <-expiry.C:
			r.targets.expire(now)
			r.tcp.Chooser.Expire(now)
			r.ns.Do(r.routes.readSourceMarks)
		}
	}
}

// route finds out where a connection of an origin goes.
func (r *relay) route(o origin, client *net.TCPConn) (tcprelay.Route, bool) {
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

// know takes the facts that later connections go by.
func (r *relay) know(n proxier.Node) { r.node.Store(&n) }

// sourceFor is the address that an endpoint is to see: the zero one stands for
// the node's. A client keeps its own where the plan says so, as far as the
// answers come back this way.
func (r *relay) sourceFor(t *target, o origin, client, endpoint netip.Addr) netip.Addr {
	if o == fromNode || t.masquerade&o.bit() != 0 || r.node.Load().BetweenNodes(client, endpoint) || !r.routes.onDifferentLinks(client, endpoint) {
		return netip.Addr{}
	}
	return client
}
