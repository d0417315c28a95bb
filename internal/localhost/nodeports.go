// SPDX-License-Identifier: Apache-2.0

// Package localhost serves TCP NodePorts on 127.0.0.1 and ::1 in modes whose
// rules cannot (KEP-6032): the kernel forwards nothing that comes from a loopback
// address unless route_localnet is set, and never in IPv6. It listens at each
// NodePort and relays the connections.
package localhost

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"signalbox/internal/tcprelay"
	"signalbox/internal/wait"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// RetryAfter is how long to wait before listening again at a NodePort that another
// program has.
const RetryAfter = 5 * time.Second

// mostConnections is how many connections the NodePorts of both IP families have
// together. Every process on the node can open them, and all have one client address. So
// the limit keeps memory, file descriptors and source ports for the rest of the node.
const mostConnections = 1024

// limits are for all NodePorts of the process.
var limits = sync.OnceValues(func() (*tcprelay.Limits, error) {
	process, err := tcprelay.ProcessLimits()
	if err != nil {
		return nil, err
	}
	return &tcprelay.Limits{Connections: tcprelay.Limit{Max: min(mostConnections, process.Connections.Max), Within: &process.Connections}}, nil
})

// NodePorts are the listeners of one IP family.
type NodePorts struct {
	family   plan.Family
	mode     string
	failures atomic.Uint64

	mu    sync.Mutex // guards what follows
	relay *tcprelay.TCP
	ns    *tcprelay.Namespace
	stop  context.CancelFunc
	ended chan struct{} // closed when the goroutine of retries has ended
	// serving says that NodePorts are wanted here.
	serving bool
	ports   map[plan.ServicePortName]*port
	// listed are those of plan.ServicePort, if removed endpoints count.
	listed map[plan.ServicePortName]*plan.EndpointSet
	// loggedProtocol: the log has the line about protocols other than TCP.
	loggedProtocol bool
}

// port is one NodePort.
type port struct {
	number   uint16
	choice   atomic.Pointer[tcprelay.Choice]
	listener *net.TCPListener // nil while there is none
	err      error            // why there is none
}

// New returns NodePorts that listen nowhere. Nothing is opened before the first
// Sync that asks for listeners.
func New(f plan.Family, mode string) *NodePorts {
	return &NodePorts{family: f, mode: mode, ports: map[plan.ServicePortName]*port{}, listed: map[plan.ServicePortName]*plan.EndpointSet{}}
}

// Sync opens and closes listeners as the plan wants, and looks only at what change
// names. It opens them in the network namespace of the calling thread. Where it
// cannot listen, it tries again, see Problem.
func (n *NodePorts) Sync(plan *plan.Plan, change plan.Change) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !plan.Node.LocalhostNodePorts {
		n.closeAll()
		return
	}
	names := change.Services
	if change.All || change.Node || !n.serving {
		names = n.allNames(plan)
	}
	n.serving = true
	for _, name := range names { // first, because a port may go from one Service to another
		if p := n.ports[name]; p != nil && p.number != numberOf(n.family, plan.Services[name]) {
			p.close()
			delete(n.ports, name)
		}
	}
	for _, name := range names {
		sp := plan.Services[name]
		n.logProtocol(sp)
		n.resetRemoved(name, sp)
		number := numberOf(n.family, sp)
		if number == 0 {
			continue
		}
		p := n.ports[name]
		if p == nil {
			p = &port{number: number}
			n.ports[name] = p
		}
		p.choice.Store(&tcprelay.Choice{Name: name, Affinity: sp.AffinityTimeout, Endpoints: nodePort(sp).External})
		if p.listener == nil {
			n.open(p)
		}
	}
}

// resetRemoved ends the connections to endpoints that were removed.
func (n *NodePorts) resetRemoved(name plan.ServicePortName, sp *plan.ServicePort) {
	before := n.listed[name]
	if sp == nil || sp.Listed == nil || nodePort(sp) == nil {
		delete(n.listed, name)
		return
	}
	n.listed[name] = sp.Listed
	if n.relay != nil {
		n.relay.Reset(name, plan.RemovedEndpoints(before, sp.Listed))
	}
}

// allNames lists the Service ports of the plan and those that have a listener.
func (n *NodePorts) allNames(desired *plan.Plan) []plan.ServicePortName {
	names := make([]plan.ServicePortName, 0, len(desired.Services))
	for name := range desired.Services {
		names = append(names, name)
	}
	for name := range n.ports {
		if desired.Services[name] == nil {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, plan.ServicePortName.Compare)
	return names
}

// nodePort is a Service port's NodePort, or nil.
func nodePort(sp *plan.ServicePort) *plan.Frontend {
	if sp == nil {
		return nil
	}
	i := slices.IndexFunc(sp.Frontends, func(f plan.Frontend) bool { return f.Kind == plan.NodePort })
	if i < 0 {
		return nil
	}
	return &sp.Frontends[i]
}

// numberOf is the NodePort to listen at, or 0 for none. As with kube-proxy,
// connections on loopback count as external traffic. The kernel refuses them at a
// port without endpoints, because nothing listens there.
func numberOf(f plan.Family, sp *plan.ServicePort) uint16 {
	fe := nodePort(sp)
	if fe == nil || sp.Name.Protocol != plan.TCP || fe.External.Len() == 0 || slices.Contains(fe.Bypass, plan.Localhost(f)) {
		return 0
	}
	if fe.Sources != nil && !plan.AnyContains(fe.Sources, plan.Localhost(f)) {
		return 0
	}
	return fe.Port
}

// logProtocol logs once that only TCP is served.
func (n *NodePorts) logProtocol(sp *plan.ServicePort) {
	if n.loggedProtocol || nodePort(sp) == nil || sp.Name.Protocol == plan.TCP {
		return
	}
	n.loggedProtocol = true
	slog.Warn(n.mode+": NodePorts of UDP and SCTP are refused on loopback, because the relay there carries TCP alone; the mode userspace serves UDP there",
		"address", plan.Localhost(n.family).String(), "first", sp.Name.String(), "protocol", sp.Name.Protocol.String())
}

// open listens at a port. The lock is held, and the thread is in the namespace.
func (n *NodePorts) open(p *port) {
	err := n.start()
	if err == nil {
		p.listener, err = tcprelay.ListenTCP(p.at(n.family))
	}
	p.err = err
	if err != nil {
		n.failures.Add(1)
		return
	}
	n.relay.Accept(p.listener, func(*net.TCPConn) (tcprelay.Route, bool) {
		return tcprelay.Route{Choice: *p.choice.Load(), Dial: n.dial}, true
	})
}

// start makes the relay where there is none yet.
func (n *NodePorts) start() error {
	if n.relay != nil {
		return nil
	}
	limits, err := limits()
	if err != nil {
		return err
	}
	ns, err := tcprelay.CurrentNamespace()
	if err != nil {
		return err
	}
	relay, err := tcprelay.New(n.family, n.mode)
	if err != nil {
		ns.Close()
		return err
	}
	relay.Limits = limits
	ctx, cancel := context.WithCancel(context.Background())
	n.relay, n.ns, n.stop, n.ended = relay, ns, cancel, make(chan struct{})
	go func() {
		defer close(n.ended)
		for wait.For(ctx, RetryAfter) {
			relay.Chooser.Expire(time.Now())
			n.retry()
		}
	}()
	return nil
}

// retry tries to listen where it failed before.
func (n *NodePorts) retry() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for name, p := range n.ports {
		if p.listener != nil {
			continue
		}
		if err := n.ns.Do(func() { n.open(p) }); err != nil {
			p.err = err
		}
		if p.listener != nil {
			slog.Info(n.mode+": a NodePort is served on loopback now", "service", name.String(), "address", p.at(n.family).String())
		}
	}
}

func (n *NodePorts) dial(ctx context.Context, at netip.AddrPort) (net.Conn, error) {
	return n.ns.Dial(ctx, "tcp", netip.AddrPort{}, at)
}

// Problem is why a Service port is not served on loopback though it should be. It has
// the form of proxier.Proxier's.
func (n *NodePorts) Problem(name plan.ServicePortName) (plan.Problem, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := n.ports[name]
	if p == nil || p.err == nil {
		return plan.Problem{}, false
	}
	return plan.Problem{Kind: "Service", Object: name.ServiceName.String(), Field: "spec.ports",
		Reason: fmt.Sprintf("NodePort %d is not served on loopback: %v; it is tried again every %v; end what listens there", p.number, p.err, RetryAfter)}, true
}

// Stats returns all but Refused.
func (n *NodePorts) Stats() proxier.LocalhostStats {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := proxier.LocalhostStats{Serving: n.serving, Failures: n.failures.Load()}
	for _, p := range n.ports {
		if p.listener != nil {
			s.Listeners++
		}
	}
	return s
}

// Relays says whether NodePorts are served here or relayed connections are open.
func (n *NodePorts) Relays() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.serving || n.relay != nil && n.relay.Counts.Connections.Load() > 0
}

// Pause closes the listeners until the next Sync, which must have change.All. Open
// connections go on.
func (n *NodePorts) Pause() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closeAll()
}

// Drain waits until no relayed connection is open, or ctx ends.
func (n *NodePorts) Drain(ctx context.Context) {
	n.mu.Lock()
	relay := n.relay
	n.mu.Unlock()
	if relay != nil {
		relay.Drain(ctx, nil)
	}
}

// Close ends all listeners and connections.
func (n *NodePorts) Close() {
	n.mu.Lock()
	n.closeAll()
	relay := n.relay
	n.mu.Unlock()
	if relay == nil {
		return
	}
	n.stop()
	<-n.ended
	relay.Close()
	n.ns.Close()
}

func (n *NodePorts) closeAll() {
	n.serving = false
	for name, p := range n.ports {
		p.close()
		delete(n.ports, name)
	}
}

func (p *port) close() {
	if p.listener != nil {
		tcprelay.CloseListener(p.listener)
	}
}

func (p *port) at(f plan.Family) netip.AddrPort {
	return netip.AddrPortFrom(plan.Localhost(f), p.number)
}
