// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"signalbox/internal/netlab"
)

// exchange is traffic through every kind of frontend while what serves a node
// is exchanged. Each connection and each answer is accounted for, and each
// packet that was sent again: a connection that a gap only delays is found as
// well.
type exchange struct {
	*site
	running context.Context // ends with the traffic
	stop    context.CancelFunc
	streams sync.WaitGroup
	ways    []way         // also the control ways
	pace    time.Duration // between two new connections on a way

	mu     sync.Mutex     // guards what follows
	steps  []*step        // the last one is being done
	counts map[string]int // of what went well, by kind
	failed []string
	resent map[string]int // by servers, when the step began
	moved  chan struct{}  // closed and replaced with every success
	// relayEnds is step.relayEnds of the next step.
	relayEnds bool
}

// step is what is done for a while, and what was measured of the traffic that
// began in it.
type step struct {
	name  string
	began time.Time
	made  map[string]int // new TCP connections that went well, by way
	again sentAgain
	// relayEnds: kube-proxy replaces a relay. Endpoints of UDP flows are chosen
	// anew, and a datagram without an answer is asked again, once: kube-proxy
	// removes the relay's conntrack entries, and an answer on its way is lost.
	relayEnds  bool
	askedAgain map[string]int // by way
}

// sentAgain counts packets that were lost and sent again. The sender's kernel
// knows, and it does not depend on how fast the machine is.
type sentAgain struct {
	service map[string]int // by what it was, and the way to the Service
	control map[string]int // the same without a Service
}

// way is one way to the Service under test.
type way struct {
	name, from string
	target     netip.AddrPort // of TCP
	udp        netip.AddrPort
	// control ways lead to no Service and past the node that is tested: what is
	// lost there says how the machine itself does at the same moment.
	control bool
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
			ways = append(ways, newWay(name+" "+family, from, addr, tcp, udp))
		}
		add("cluster IP from a Pod", "pod-x", clusterIP(svc, v6), 80, 80)
		add("cluster IP from the node", "node1", clusterIP(svc, v6), 80, 80)
		add("node port", "client1", node, svc.Spec.Ports[0].NodePort, svc.Spec.Ports[1].NodePort)
		add("load-balancer IP", "client1", balancer, 80, 80)
	}
	return ways
}

func newWay(name, from string, addr netip.Addr, tcp, udp int32) way {
	return way{name: name, from: from, target: netip.AddrPortFrom(addr, uint16(tcp)), udp: netip.AddrPortFrom(addr, uint16(udp))}
}

// controlServer is asked on control ways. The node that is tested is not between
// it and its client.
const controlServer = "node2"

// controls is a control way for each way: the same client and server programs,
// as many questions.
func (s *site) controls(ways []way) []way {
	var controls []way
	for i, w := range ways {
		v6 := w.target.Addr().Is6()
		c := newWay(fmt.Sprintf("control %d %s", i, familyName(v6)), "client2", addrOf(s.lab.Host(controlServer), v6), netlab.ControlPort, netlab.ControlPort)
		c.control = true
		controls = append(controls, c)
	}
	return controls
}

// What the exchange asks for: in all 200 new TCP connections a second, and on
// each way one stream of TCP and one of UDP that is open from begin to end,
// others that are open for a while, and UDP clients that ask once.
const (
	newConnections = 200 // a second
	streamPause    = 40 * time.Millisecond
	streamLife     = 3 * time.Second
)

// catchUp bounds by how much new connections fall behind their pace and are
// made up for. More at once would be a flood, which loses packets of itself.
const catchUp = time.Second

// exchange starts the traffic, which goes on until it is ended. All ways must
// be open.
func (s *site) exchange(svc *corev1.Service) *exchange {
	s.Helper()
	return s.exchangeOn(s.ways(svc))
}

// exchangeOn starts traffic on ways that are all open.
func (s *site) exchangeOn(ways []way) *exchange {
	s.Helper()
	running, stop := context.WithCancel(s.Context())
	s.Cleanup(stop)
	e := &exchange{
		site: s, running: running, stop: stop, pace: time.Second * time.Duration(len(ways)) / newConnections,
		counts: map[string]int{}, moved: make(chan struct{}),
	}
	e.ways = slices.Concat(ways, s.controls(ways))
	e.next("the start")
	used := map[string]int{} // how many ways from a host, in a family
	for _, w := range e.ways {
		// Source ports of its own for each use, none of which the kernel gives
		// to anybody: what was sent before the Service existed cannot matter.
		client := fmt.Sprint(w.from, w.target.Addr().Is6())
		base := uint16(1024 + 3000*used[client])
		used[client]++
		e.streams.Go(func() { e.connect(w, base) })
		for j, network := range []string{"tcp", "udp"} {
			e.streams.Go(func() { e.lasting(w, network, base+2900+uint16(j)) })
			e.streams.Go(func() { e.passing(w, network, base+2910+uint16(40*j)) })
		}
		e.streams.Go(func() { e.ask1(w, base+2400) })
	}
	return e
}

func (w *way) at(network string) netip.AddrPort {
	if network == "udp" {
		return w.udp
	}
	return w.target
}

// moment is when something began.
type moment struct {
	step *step
	at   time.Time
}

func (e *exchange) now() moment {
	e.mu.Lock()
	defer e.mu.Unlock()
	return moment{e.steps[len(e.steps)-1], time.Now()}
}

// stream is a connection on a way.
type stream struct {
	*netlab.Conn
	way   way
	udp   bool
	again int // what was sent again until now
}

// givenUp is after how long what the network swallows counts as failed. It is no
// measure of speed: a packet that is lost is counted when it is sent again, and
// without load or with it the next try of TCP comes after a second.
const givenUp = time.Minute

// answersAgain is how soon a datagram has an answer in a step in which a relay
// ends, and how soon after it was asked again.
const answersAgain = time.Second

// open opens a connection on the way.
func (e *exchange) open(w way, network string, port uint16) (*stream, error) {
	begun := e.now()
	from, target := e.lab.Host(w.from), w.at(network)
	ctx, cancel := context.WithTimeout(e.Context(), givenUp)
	defer cancel()
	c, err := from.Open(ctx, network, netip.AddrPortFrom(addrOf(from, target.Addr().Is6()), port), target)
	if err != nil {
		return nil, err
	}
	s := &stream{Conn: c, way: w, udp: network == "udp"}
	if err := e.count(begun, "SYN", s); err != nil {
		c.Close()
		return nil, err
	}
	return s, nil
}

// answer asks on a connection.
func (e *exchange) answer(s *stream) (netlab.Answer, error) {
	begun := e.now()
	if begun.step.relayEnds && s.udp && !s.way.control {
		a, err := e.askSoon(s)
		if netlab.OutcomeOf(err) != netlab.Silent {
			return a, err
		}
		e.mu.Lock()
		begun.step.askedAgain[s.way.name]++
		e.mu.Unlock()
		if a, err = e.askSoon(s); err != nil {
			err = fmt.Errorf("asked again: %w", err)
		}
		return a, err
	}
	ctx, cancel := context.WithTimeout(e.Context(), givenUp)
	defer cancel()
	a, err := s.Ask(ctx)
	return a, errors.Join(err, e.count(begun, "question", s))
}

// askSoon asks, and gives the question up when a later one, which passes by the
// node, has been answered: on a machine that stalls a second proves nothing.
func (e *exchange) askSoon(s *stream) (netlab.Answer, error) {
	ctx, cancel := context.WithTimeout(e.Context(), givenUp)
	defer cancel()
	later := time.AfterFunc(answersAgain, func() {
		v6 := s.way.udp.Addr().Is6()
		target := netip.AddrPortFrom(addrOf(e.lab.Host(controlServer), v6), netlab.ControlPort)
		if _, err := e.lab.Host("client2").Ask(ctx, "udp", netip.AddrPort{}, target); err == nil {
			cancel()
		}
	})
	defer later.Stop()
	return s.Ask(ctx)
}

// count notes what has been sent again on a connection since it was last looked
// at.
func (e *exchange) count(begun moment, what string, s *stream) error {
	n, err := s.Resent()
	if err != nil || n == s.again {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if n > s.again {
		begun.step.again.on(s.way.control)[what+", "+s.way.name] += n - s.again
	}
	s.again = n
	return nil
}

func (a *sentAgain) on(control bool) map[string]int {
	if control {
		return a.control
	}
	return a.service
}

// connect makes new connections at the exchange's pace, each on a goroutine of
// its own: one that is slow does not hold up the next.
func (e *exchange) connect(w way, base uint16) {
	var open sync.WaitGroup
	defer open.Wait()
	due := time.Now()
	for i := uint16(0); pause(e.running, time.Until(due)); i = (i + 1) % 2400 {
		due = due.Add(e.pace)
		if earliest := time.Now().Add(-catchUp); due.Before(earliest) {
			due = earliest
		}
		open.Go(func() {
			begun := e.now()
			c, err := e.open(w, "tcp", base+i)
			if err == nil {
				defer c.Close()
				_, err = e.answer(c)
			}
			e.note("new TCP connections", w, begun, err)
			if err == nil {
				e.made(w, begun)
			}
		})
	}
}

// ask1 asks over UDP from a new port each time.
func (e *exchange) ask1(w way, base uint16) {
	for i := uint16(0); pause(e.running, streamPause); i = (i + 1) % 400 {
		begun := e.now()
		c, err := e.open(w, "udp", base+i)
		if err == nil {
			_, err = e.answer(c)
			c.Close()
		}
		e.note("UDP questions from new ports", w, begun, err)
	}
}

// lasting asks again and again on one connection, which one endpoint must
// answer to the end.
func (e *exchange) lasting(w way, network string, port uint16) {
	begun := e.now()
	c, err := e.open(w, network, port)
	if err != nil {
		e.note("open "+network+" streams", w, begun, err)
		return
	}
	defer c.Close()
	e.converse("answers on open "+network+" streams", c, time.Time{})
}

// passing holds streams that each last a while.
func (e *exchange) passing(w way, network string, base uint16) {
	for i := uint16(0); e.running.Err() == nil; i = (i + 1) % 40 {
		begun := e.now()
		c, err := e.open(w, network, base+i)
		if err != nil {
			e.note(network+" streams for a while", w, begun, err)
			pause(e.running, streamPause)
			continue
		}
		e.converse("answers on "+network+" streams for a while", c, time.Now().Add(streamLife))
		c.Close()
	}
}

func (e *exchange) converse(kind string, c *stream, end time.Time) {
	server := ""
	for end.IsZero() || time.Now().Before(end) {
		begun := e.now()
		a, err := e.answer(c)
		if err == nil && server != "" && a.Server != server {
			err = e.hasMoved(begun, c, a.Server, server)
		}
		server = a.Server
		e.note(kind, c.way, begun, err)
		if err != nil && netlab.OutcomeOf(err) != netlab.Silent || !pause(e.running, streamPause) {
			return
		}
	}
}

// hasMoved is what is wrong with another endpoint answering on a stream.
func (e *exchange) hasMoved(begun moment, c *stream, now, before string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c.udp && begun.step.relayEnds {
		e.counts["UDP flows that got another endpoint"]++
		return nil
	}
	return fmt.Errorf("answered by %s, before by %s", now, before)
}

// losesRelay notes that kube-proxy replaces a relay in the next step.
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

func (e *exchange) note(kind string, w way, begun moment, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.Context().Err() != nil {
		return
	}
	if err != nil {
		e.failed = append(e.failed, fmt.Sprintf("%s after %v, during %s: %s, %s: %v",
			begun.at.Format("15:04:05.000"), time.Since(begun.at).Round(time.Millisecond), begun.step.name, kind, w.name, err))
		return
	}
	e.counts[kind]++
}

// made counts a new connection for the step in which it began.
func (e *exchange) made(w way, begun moment) {
	e.mu.Lock()
	defer e.mu.Unlock()
	begun.step.made[w.name]++
	close(e.moved)
	e.moved = make(chan struct{})
}

// next begins a step, and books what servers have sent again on the one before.
func (e *exchange) next(name string) *step {
	e.Helper()
	resent := e.resentByServers()
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.steps) > 0 {
		last := e.steps[len(e.steps)-1]
		for server, n := range resent {
			if more := n - e.resent[server]; more > 0 {
				last.again.on(server == controlServer)["answer of "+server] += more
			}
		}
	}
	s := &step{
		name: name, began: time.Now(), made: map[string]int{}, again: sentAgain{service: map[string]int{}, control: map[string]int{}},
		relayEnds: e.relayEnds, askedAgain: map[string]int{},
	}
	e.steps, e.resent, e.relayEnds = append(e.steps, s), resent, false
	return s
}

// resentByServers is how many TCP segments each server has sent again: of an
// answer that is lost the client's kernel need not know. A segment that the client
// got twice was late and not lost, as on a machine that stood still for a moment: the
// client reports it (DSACK, RFC 2883), and it does not count.
func (e *exchange) resentByServers() map[string]int {
	e.Helper()
	resent := map[string]int{}
	for _, name := range []string{controlServer, "pod-a", "pod-b", "pod-c", "pod-d"} {
		e.must(e.lab.Host(name).Do(func() error {
			fs, err := procfs.NewDefaultFS()
			if err != nil {
				return err
			}
			// The calling thread's network namespace.
			thread, err := fs.Thread(unix.Getpid(), unix.Gettid())
			if err != nil {
				return err
			}
			counters, err := thread.Snmp()
			if err != nil {
				return err
			}
			if counters.Tcp.RetransSegs == nil {
				return errors.New("the kernel counts no RetransSegs")
			}
			duplicates, err := thread.Netstat()
			if err != nil {
				return err
			}
			if duplicates.TCPDSACKRecv == nil {
				return errors.New("the kernel counts no TCPDSACKRecv")
			}
			resent[name] = int(*counters.Tcp.RetransSegs) - int(*duplicates.TCPDSACKRecv)
			return nil
		}))
	}
	return resent
}

// does says what is being done from now on, and does it. Each way must have as
// many new connections as are to be made on it in that time, and then those of
// another second.
func (e *exchange) does(name string, do func()) {
	e.Helper()
	s := e.next(name)
	do()
	took := time.Since(s.began)
	e.waitFor(s, int((took+time.Second)/e.pace))
	e.mu.Lock()
	defer e.mu.Unlock()
	all, fewest := 0, 0
	for i, w := range e.ways {
		if n := s.made[w.name]; !w.control {
			all += n
			if i == 0 || n < fewest {
				fewest = n
			}
		}
	}
	e.Logf("%s: %d new connections while it took %v and until %v, at least %d on each way",
		name, all, took.Round(time.Millisecond), time.Since(s.began).Round(time.Millisecond), fewest)
}

// passes waits until n more new connections went well, on each way its share.
func (e *exchange) passes(n int) {
	e.Helper()
	s := e.now().step
	e.mu.Lock()
	most := 0
	for _, made := range s.made {
		most = max(most, made)
	}
	e.mu.Unlock()
	e.waitFor(s, most+int(time.Duration(n)*time.Second/time.Duration(newConnections)/e.pace))
}

// waitFor waits until so many new connections of a step went well on each way.
// A way that is dead does not get there, however well the others do.
func (e *exchange) waitFor(s *step, share int) {
	e.Helper()
	var slowest string
	var made int
	var dead <-chan time.Time
	for {
		e.mu.Lock()
		name, n, moved := e.slowest(s)
		e.mu.Unlock()
		if n >= share {
			return
		}
		if dead == nil || name != slowest || n != made {
			slowest, made, dead = name, n, time.After(hangTimeout)
		}
		select {
		case <-moved:
		case <-e.Context().Done():
			e.Fatalf("%s: only %d of %d new connections in %s", name, n, share, s.name)
		case <-dead:
			e.end()
			e.Fatalf("%s: %d of %d new connections in %s, and no more for %v", name, n, share, s.name, hangTimeout)
		}
	}
}

// slowest is the way with the fewest new connections in a step, how many they
// are, and what is closed with the next one. e.mu is held.
func (e *exchange) slowest(s *step) (name string, made int, moved <-chan struct{}) {
	for i, w := range e.ways {
		if n := s.made[w.name]; i == 0 || n < made {
			name, made = w.name, n
		}
	}
	return name, made, e.moved
}

// explained is how many packets may be sent again to a Service for one that is
// on the control ways in the same step: there are as many packets there, but
// chance has it that a stall of the machine meets more of one kind. Where the
// control ways lose nothing, nor may the others.
const explained = 3

// faults ends the traffic, and says what was wrong. It waits for what is open:
// a packet that is lost at the end counts as well.
func (e *exchange) faults() []string {
	e.Helper()
	e.stop()
	e.streams.Wait()
	e.next("the end")
	e.mu.Lock()
	defer e.mu.Unlock()
	faults := slices.Clone(e.failed)
	for _, s := range e.steps {
		service, control := sum(s.again.service), sum(s.again.control)
		if service+control > 0 {
			e.Logf("%s: sent again to the Service %v, on the control ways %v", s.name, s.again.service, s.again.control)
		}
		if s.relayEnds {
			e.Logf("%s: %d datagrams were asked again: %v", s.name, sum(s.askedAgain), s.askedAgain)
		}
		if service > explained*control {
			faults = append(faults, fmt.Sprintf("during %s: %d packets were lost and sent again, and %d where there is no Service: %v",
				s.name, service, control, s.again.service))
		}
	}
	return faults
}

func sum(counts map[string]int) (n int) {
	for _, c := range counts {
		n += c
	}
	return n
}

// end stops the traffic, and fails the test if anything was lost.
func (e *exchange) end() {
	e.Helper()
	faults := e.faults()
	var counts []string
	for kind, n := range e.counts {
		counts = append(counts, fmt.Sprintf("%d %s", n, kind))
	}
	slices.Sort(counts)
	e.Logf("it went well for %s, a half of them on control ways; %d failed", strings.Join(counts, ", "), len(e.failed))
	for _, f := range faults[:min(len(faults), 20)] {
		e.Error(f)
	}
	if len(faults) > 0 {
		e.Errorf("%d faults in all", len(faults))
	}
}
