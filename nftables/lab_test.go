// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"signalbox/internal/netlab"
	"signalbox/internal/nstest"
	"signalbox/proxier/plan"
)

// lab is a node (the test's own namespace) with four Pods, a client outside and
// a default route, each on a link of its own.
type lab struct {
	t      testing.TB
	family plan.Family
	node   netns.NsHandle
	pods   []*peer
	client *peer
}

// peer is a host at the other end of one of the node's links.
type peer struct {
	name     string
	ns       netns.NsHandle
	addr     netip.Addr // the peer's
	nodeAddr netip.Addr // the node's on that link
}

// podPort is where every Pod answers, over TCP and UDP.
const podPort = 8080

// clientAddrs is how many addresses the client has, from client.addr on.
const clientAddrs = 8

func newLab(t testing.TB, f plan.Family) *lab {
	l := &lab{t: t, family: f, node: nstest.Enter(t)}
	forwarding := "/proc/sys/net/ipv4/ip_forward"
	if f == plan.IPv6 {
		forwarding = "/proc/sys/net/ipv6/conf/all/forwarding"
	}
	if err := os.WriteFile(forwarding, []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}
	l.must(netlink.LinkSetUp(l.link("lo")))
	for i := range 4 {
		p := l.connect(fmt.Sprintf("pod%d", i+1), i+1, 1)
		l.serve(p)
		l.pods = append(l.pods, p)
	}
	l.client = l.connect("client", 100, clientAddrs)
	// What nobody takes leaves by a link of its own: sent back to the client it
	// would draw redirects, which use up the client's allowance of ICMP errors.
	uplink := l.connect("uplink", 101, 1)
	l.must(netlink.RouteAdd(&netlink.Route{Gw: uplink.addr.AsSlice()}))
	l.settle()
	return l
}

// settle waits until the node has noticed that every link is up, which takes up to
// a second. Around that moment an IPv6 packet from an address of a link was, in one
// lab of ten, not one of the node's to "fib saddr type local".
func (l *lab) settle() {
	l.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	notUp := func(link netlink.Link) bool {
		return link.Type() == "veth" && link.Attrs().OperState != netlink.OperUp
	}
	for {
		links, err := netlink.LinkList()
		l.must(err)
		if !slices.ContainsFunc(links, notUp) {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			l.t.Fatal("a link does not come up")
		}
	}
}

// eachFamily runs a test in a lab of each family.
func eachFamily(t *testing.T, test func(t *testing.T, l *lab)) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) { test(t, newLab(t, f)) })
	}
}

func (l *lab) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) link(name string) netlink.Link {
	link, err := netlink.LinkByName(name)
	l.must(err)
	return link
}

// addr is host number host on link number net.
func (l *lab) addr(net, host int) netip.Addr {
	if l.family == plan.IPv6 {
		return netip.MustParseAddr(fmt.Sprintf("fd00:0:0:%x::%x", net, host))
	}
	return netip.MustParseAddr(fmt.Sprintf("10.0.%d.%d", net, host))
}

// podPrefix holds the Pods' links and not the client's.
func (l *lab) podPrefix() netip.Prefix {
	if l.family == plan.IPv6 {
		return netip.PrefixFrom(l.addr(0, 0), 60)
	}
	return netip.PrefixFrom(l.addr(0, 0), 20)
}

// vip is a virtual address outside of all links.
func (l *lab) vip(n int) netip.Addr {
	if l.family == plan.IPv6 {
		return netip.MustParseAddr(fmt.Sprintf("fd00:96::%x", n))
	}
	return netip.MustParseAddr(fmt.Sprintf("172.30.0.%d", n))
}

func (l *lab) vips() netip.Prefix {
	if l.family == plan.IPv6 {
		return netip.MustParsePrefix("fd00:96::/112")
	}
	return netip.MustParsePrefix("172.30.0.0/16")
}

// connect makes a namespace with a link to the node.
func (l *lab) connect(name string, net, addrs int) *peer {
	ns, err := netns.New() // and enters it
	l.must(err)
	l.must(netns.Set(l.node))
	l.t.Cleanup(func() { ns.Close() })
	p := &peer{name: name, ns: ns, addr: l.addr(net, 2), nodeAddr: l.addr(net, 1)}
	l.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}))
	l.up(name, p.nodeAddr)
	l.inside(p, func() {
		l.must(netlink.LinkSetUp(l.link("lo")))
		a := p.addr
		for range addrs {
			l.up("eth0", a)
			a = a.Next()
		}
		l.must(netlink.RouteAdd(&netlink.Route{Gw: p.nodeAddr.AsSlice()}))
	})
	return p
}

func (l *lab) up(name string, a netip.Addr) {
	bits := 24
	if l.family == plan.IPv6 {
		bits = 64
	}
	link := l.link(name)
	l.must(netlink.LinkSetUp(link))
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	l.must(err)
	defer nl.Close()
	l.must(netlab.AddAddr(nl, link, netip.PrefixFrom(a, bits)))
}

// inside runs f in the peer's namespace, on the test's own thread.
func (l *lab) inside(p *peer, f func()) {
	l.must(netns.Set(p.ns))
	defer func() { l.must(netns.Set(l.node)) }()
	f()
}

// serve answers every connection and datagram with the peer's name and the
// address that it came from.
func (l *lab) serve(p *peer) {
	answer := func(from net.Addr) []byte {
		return fmt.Appendf(nil, "%s %s\n", p.name, netip.MustParseAddrPort(from.String()).Addr())
	}
	l.inside(p, func() {
		tcp, err := net.Listen("tcp", netip.AddrPortFrom(p.addr, podPort).String())
		l.must(err)
		udp, err := net.ListenPacket("udp", netip.AddrPortFrom(p.addr, podPort).String())
		l.must(err)
		l.t.Cleanup(func() { tcp.Close(); udp.Close() })
		go func() {
			for {
				c, err := tcp.Accept()
				if err != nil {
					return
				}
				c.Write(answer(c.RemoteAddr()))
				c.Close()
			}
		}()
		go func() {
			for b := make([]byte, 16); ; {
				_, from, err := udp.ReadFrom(b)
				if err != nil {
					return
				}
				udp.WriteTo(answer(from), from)
			}
		}()
	})
}

// answer is who answered, and the source address that it saw.
type answer struct {
	name string
	from netip.Addr
}

var (
	errRefused = errors.New("refused")
	errSilence = errors.New("no answer")
)

// patience is how long an answer may take; silence is how long none must come
// for it to count as none.
const patience, silence = 20 * time.Second, 400 * time.Millisecond

// probe connects from a peer (nil: from the node) and returns the answer. The
// zero source is the peer's first address.
func (l *lab) probe(from *peer, source netip.Addr, proto plan.Protocol, to netip.AddrPort, wait time.Duration) (answer, error) {
	ns := l.node
	if from != nil {
		ns = from.ns
		if !source.IsValid() {
			source = from.addr
		}
	}
	type result struct {
		a   answer
		err error
	}
	done := make(chan result)
	go func() {
		// Not unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		var r result
		if r.err = netns.Set(ns); r.err == nil {
			r.a, r.err = connect(source, proto, to, wait)
		}
		// A machine under load may be late to answer neighbour discovery.
		for late := time.Now().Add(wait); errors.Is(r.err, syscall.EHOSTUNREACH) && time.Now().Before(late); {
			r.a, r.err = connect(source, proto, to, wait)
		}
		done <- r
	}()
	r := <-done
	return r.a, r.err
}

func connect(source netip.Addr, proto plan.Protocol, to netip.AddrPort, wait time.Duration) (answer, error) {
	d := net.Dialer{Timeout: wait}
	switch {
	case proto == plan.UDP:
		d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(source, netlab.FreshPort()))
	case source.IsValid():
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))
	}
	c, err := d.DialContext(context.Background(), proto.String(), to.String())
	if err != nil {
		return answer{}, outcome(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(wait))
	if proto == plan.UDP {
		c.Write([]byte("?"))
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return answer{}, outcome(err)
	}
	name, addr, _ := strings.Cut(strings.TrimSpace(line), " ")
	a, err := netip.ParseAddr(addr)
	return answer{name, a.Unmap()}, err
}

func outcome(err error) error {
	var timeout net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return errRefused
	case errors.As(err, &timeout) && timeout.Timeout():
		return errSilence
	}
	return err
}

// mustAnswer probes and expects an answer.
func (l *lab) mustAnswer(from *peer, proto plan.Protocol, to netip.AddrPort) answer {
	l.t.Helper()
	return l.mustAnswerFrom(from, netip.Addr{}, proto, to)
}

func (l *lab) mustAnswerFrom(from *peer, source netip.Addr, proto plan.Protocol, to netip.AddrPort) answer {
	l.t.Helper()
	a, err := l.probe(from, source, proto, to, patience)
	if err != nil {
		l.t.Fatalf("%s to %s: %v", proto, to, err)
	}
	return a
}

// mustFail probes and expects the error.
func (l *lab) mustFail(from *peer, proto plan.Protocol, to netip.AddrPort, want error) {
	l.t.Helper()
	wait := patience
	if want == errSilence {
		wait = silence
	}
	if a, err := l.probe(from, netip.Addr{}, proto, to, wait); !errors.Is(err, want) {
		l.t.Errorf("%s to %s: got %v and error %v, want %v", proto, to, a, err, want)
	}
}

// set is the endpoint set of the Pods of these numbers (from 1).
func (l *lab) set(pods ...int) *plan.EndpointSet {
	s := &plan.EndpointSet{}
	for _, n := range pods {
		s.Endpoints = append(s.Endpoints, plan.Endpoint{AddrPort: netip.AddrPortFrom(l.pods[n-1].addr, podPort), MayHairpin: true})
	}
	return s
}

// plan is a plan for the lab's node without Services.
func (l *lab) plan() *plan.Plan {
	return &plan.Plan{
		Family: l.family,
		Node: plan.Node{
			LocalPods:     plan.LocalPods{Prefixes: []netip.Prefix{l.podPrefix()}},
			NodePortAddrs: plan.NodePortAddrs{Addrs: []netip.Addr{l.client.nodeAddr}},
			ServiceCIDRs:  []netip.Prefix{l.vips()},
		},
		Services: map[plan.ServicePortName]*plan.ServicePort{},
	}
}

// put adds a Service port to the plan, or replaces it.
func put(desired *plan.Plan, name string, proto plan.Protocol, timeout time.Duration, frontends ...plan.Frontend) plan.ServicePortName {
	sp := &plan.ServicePort{
		Name:            plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "test", Name: name}, Protocol: proto},
		AffinityTimeout: timeout, Frontends: frontends,
	}
	desired.Services[sp.Name] = sp
	return sp.Name
}
