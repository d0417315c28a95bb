package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"signalbox/internal/netlab"
)

// exchange is traffic through every kind of frontend while what serves a node
// is exchanged. Each connection and each answer is accounted for.
type exchange struct {
	*site
	stop    context.CancelFunc
	streams sync.WaitGroup

	mu     sync.Mutex // guards what follows
	step   string     // what is being done
	began  time.Time
	counts map[string]int // of what went well, by kind
	late   map[string]int // connections that took a retransmission, by step
	failed []string
	moved  chan struct{} // closed and replaced with every success
	// relayEnds says that a relay is being replaced. It chose the endpoints of
	// the UDP flows through it, and they are chosen anew without it.
	relayEnds bool
}

// way is one way to the Service under test.
type way struct {
	name, from string
	target     netip.AddrPort // of TCP
	udp        netip.AddrPort
}

// ways lists how the Service of createBalanced is reached, in both families:
// its cluster IPs from a Pod and from the node, its node ports and
// load-balancer IPs from outside.
func (s *site) ways(svc *corev1.Service) []way {
	var ways []way
	for _, v6 := range []bool{false, true} {
		family, node, balancer := familyName(v6), addrOf(s.lab.Host("node1"), v6), balancerIPs.V4
		if v6 {
			balancer = balancerIPs.V6
		}
		add := func(name, from string, addr netip.Addr, tcp, udp int32) {
			ways = append(ways, way{name + " " + family, from, netip.AddrPortFrom(addr, uint16(tcp)), netip.AddrPortFrom(addr, uint16(udp))})
		}
		add("cluster IP from a Pod", "pod-x", clusterIP(svc, v6), 80, 80)
		add("cluster IP from the node", "node1", clusterIP(svc, v6), 80, 80)
		add("node port", "client1", node, svc.Spec.Ports[0].NodePort, svc.Spec.Ports[1].NodePort)
		add("load-balancer IP", "client1", balancer, 80, 80)
	}
	return ways
}

// What the exchange asks for: in all 200 new TCP connections a second, and on
// each way one stream of TCP and one of UDP that is open from begin to end,
// others that are open for a while, and UDP clients that ask once.
const (
	newConnections = 200 // a second
	streamPause    = 40 * time.Millisecond
	streamLife     = 3 * time.Second
)

// exchange starts the traffic, which goes on until it is ended. All ways must
// be open.
func (s *site) exchange(svc *corev1.Service) *exchange {
	s.Helper()
	ctx, cancel := context.WithCancel(s.Context())
	e := &exchange{site: s, stop: cancel, step: "the start", began: time.Now(), counts: map[string]int{}, late: map[string]int{}, moved: make(chan struct{})}
	s.Cleanup(cancel)
	ways := s.ways(svc)
	pause := time.Second * time.Duration(len(ways)) / newConnections
	for i, w := range ways {
		// Source ports of its own for each use, none of which the kernel gives
		// to anybody: what was sent before the Service existed cannot matter.
		base := uint16(1024 + 3000*i)
		e.streams.Go(func() { e.connect(ctx, w, base, pause) })
		for j, network := range []string{"tcp", "udp"} {
			e.streams.Go(func() { e.lasting(ctx, w, network, base+2900+uint16(j)) })
			e.streams.Go(func() { e.passing(ctx, w, network, base+2910+uint16(40*j)) })
		}
		e.streams.Go(func() { e.ask1(ctx, w, base+2400) })
	}
	return e
}

func (w *way) at(network string) netip.AddrPort {
	if network == "udp" {
		return w.udp
	}
	return w.target
}

// open opens a connection on the way. What the network answers late, a slow
// machine may have done; what it answers with an error is a failure.
func (e *exchange) open(ctx context.Context, w way, network string, port uint16) (*netlab.Conn, error) {
	from, target := e.lab.Host(w.from), w.at(network)
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return from.Open(ctx, network, netip.AddrPortFrom(addrOf(from, target.Addr().Is6()), port), target)
}

// answerPatience is after how long an answer counts as lost.
const answerPatience = 20 * time.Second

func answer(ctx context.Context, c *netlab.Conn) (netlab.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, answerPatience)
	defer cancel()
	return c.Ask(ctx)
}

// connect makes new connections, one every pause, each on a goroutine of its
// own: one that is slow does not hold up the next.
func (e *exchange) connect(ctx context.Context, w way, base uint16, pause time.Duration) {
	var open sync.WaitGroup
	defer open.Wait()
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for i := uint16(0); ; i = (i + 1) % 2400 {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		open.Go(func() {
			start := time.Now()
			c, err := e.open(ctx, w, "tcp", base+i)
			if err == nil {
				defer c.Close()
				_, err = answer(ctx, c)
			}
			e.note(ctx, "new TCP connections", w, start, err)
			if err == nil && c.Retransmitted() {
				e.noteLate(start)
			}
		})
	}
}

// ask1 asks over UDP from a new port each time.
func (e *exchange) ask1(ctx context.Context, w way, base uint16) {
	for i := uint16(0); pause(ctx, streamPause); i = (i + 1) % 400 {
		start := time.Now()
		c, err := e.open(ctx, w, "udp", base+i)
		if err == nil {
			_, err = answer(ctx, c)
			c.Close()
		}
		e.note(ctx, "UDP questions from new ports", w, start, err)
	}
}

// lasting asks again and again on one connection, which one endpoint must
// answer to the end.
func (e *exchange) lasting(ctx context.Context, w way, network string, port uint16) {
	c, err := e.open(ctx, w, network, port)
	if err != nil {
		e.note(ctx, "open "+network+" streams", w, time.Now(), err)
		return
	}
	defer c.Close()
	e.converse(ctx, w, "answers on open "+network+" streams", c, time.Time{})
}

// passing holds streams that each last a while.
func (e *exchange) passing(ctx context.Context, w way, network string, base uint16) {
	for i := uint16(0); ctx.Err() == nil; i = (i + 1) % 40 {
		c, err := e.open(ctx, w, network, base+i)
		if err != nil {
			e.note(ctx, network+" streams for a while", w, time.Now(), err)
			pause(ctx, streamPause)
			continue
		}
		e.converse(ctx, w, "answers on "+network+" streams for a while", c, time.Now().Add(streamLife))
		c.Close()
	}
}

func (e *exchange) converse(ctx context.Context, w way, kind string, c *netlab.Conn, end time.Time) {
	server := ""
	for end.IsZero() || time.Now().Before(end) {
		start := time.Now()
		a, err := answer(ctx, c)
		if err == nil && server != "" && a.Server != server {
			err = e.hasMoved(kind, a.Server, server)
		}
		server = a.Server
		e.note(ctx, kind, w, start, err)
		if err != nil && netlab.OutcomeOf(err) != netlab.Silent || !pause(ctx, streamPause) {
			return
		}
	}
}

// hasMoved is what is wrong with another endpoint answering on a stream.
func (e *exchange) hasMoved(kind, now, before string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if strings.Contains(kind, "udp") && e.relayEnds {
		e.counts["UDP flows that got another endpoint"]++
		return nil
	}
	return fmt.Errorf("answered by %s, before by %s", now, before)
}

// losesRelay notes that a relay is replaced from now on.
func (e *exchange) losesRelay() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.relayEnds = true
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func (e *exchange) note(ctx context.Context, kind string, w way, start time.Time, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		e.failed = append(e.failed, fmt.Sprintf("%s after %v, during %s: %s, %s: %v",
			start.Format("15:04:05.000"), time.Since(start).Round(time.Millisecond), e.step, kind, w.name, err))
		return
	}
	e.counts[kind]++
	close(e.moved)
	e.moved = make(chan struct{})
}

func (e *exchange) noteLate(start time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.late[e.step]++
}

// does says what is being done from now on, and does it.
func (e *exchange) does(step string, do func()) {
	e.Helper()
	e.mu.Lock()
	before, took := e.step, time.Since(e.began)
	e.step, e.began = step, time.Now()
	e.mu.Unlock()
	e.Logf("%s: after %v of %s", step, took.Round(time.Millisecond), before)
	do()
	e.passes(newConnections)
}

// passes waits until n more new connections went well.
func (e *exchange) passes(n int) {
	e.Helper()
	const kind = "new TCP connections"
	first := -1
	for {
		e.mu.Lock()
		count, moved := e.counts[kind], e.moved
		e.mu.Unlock()
		if first < 0 {
			first = count
		}
		if count >= first+n {
			return
		}
		select {
		case <-moved:
		case <-e.Context().Done():
			e.Fatal("no connection comes through")
		case <-time.After(patience):
			e.end()
			e.Fatal("no connection comes through any more")
		}
	}
}

// end stops the traffic, and fails the test if anything was lost.
func (e *exchange) end() {
	e.Helper()
	e.stop()
	e.streams.Wait()
	e.mu.Lock()
	defer e.mu.Unlock()
	var counts []string
	for kind, n := range e.counts {
		counts = append(counts, fmt.Sprintf("%d %s", n, kind))
	}
	slices.Sort(counts)
	e.Logf("it went well for %s; %d failed", strings.Join(counts, ", "), len(e.failed))
	for step, n := range e.late {
		e.Logf("%d connections had to send something twice during %s", n, step)
	}
	for _, f := range e.failed[:min(len(e.failed), 20)] {
		e.Error(f)
	}
	if len(e.failed) > 0 {
		e.Errorf("%d failures in all", len(e.failed))
	}
}
