// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"signalbox/internal/netlab"
	"signalbox/internal/nstest"
	"signalbox/ipvs/internal/kernel"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/proxier"

	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// eachFamily runs a test in a network namespace of its own for each family. It skips the test
// if the kernel has no IPVS. The kernel of the virtual machine has IPVS.
func eachFamily(t *testing.T, test func(t *testing.T, w world)) {
	for _, family := range plan.Families {
		t.Run(family.String(), func(t *testing.T) {
			nstest.Enter(t)
			if err := (Dataplane{}).Supported(family); err != nil {
				if os.Getenv("SIGNALBOX_VM_RELEASE") != "" {
					t.Fatal(err)
				}
				t.Skip(err)
			}
			lo, err := netlink.LinkByName("lo")
			if err == nil {
				err = netlink.LinkSetUp(lo)
			}
			if err != nil {
				t.Fatal(err)
			}
			w := world{family}
			give(t, lo, w.addr("192.0.2.200", "2001:db8::200"))
			test(t, w)
		})
	}
}

func give(t *testing.T, link netlink.Link, a netip.Addr) {
	t.Helper()
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	if err := netlab.AddAddr(nl, link, netip.PrefixFrom(a, a.BitLen())); err != nil {
		t.Fatal(err)
	}
}

func do(k ipvsClient, o kernel.Op) error { return k.Send([]kernel.Op{o}, func(kernel.Op) {}) }

// counting records the messages to IPVS.
type counting struct {
	ipvsClient
	mu  sync.Mutex // guards ops against the goroutine that ends what has drained
	ops []kernel.Op
}

func (c *counting) Send(ops []kernel.Op, done func(kernel.Op)) error {
	c.mu.Lock()
	c.ops = append(c.ops, ops...)
	c.mu.Unlock()
	return c.ipvsClient.Send(ops, done)
}

// take returns the messages since the last call, except those of drainOnce.
func (c *counting) take() []kernel.Op {
	c.mu.Lock()
	defer c.mu.Unlock()
	sent := slices.DeleteFunc(c.ops, func(o kernel.Op) bool { return o.Verb == kernel.RemoveDestination || o.Verb == kernel.RemoveServer })
	c.ops = nil
	return sent
}

func start(t testing.TB, family plan.Family, change func(*proxier.Options)) (*Proxier, *counting) {
	t.Helper()
	o := options(family)
	if change != nil {
		change(&o)
	}
	p, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	c := &counting{ipvsClient: p.ipvs}
	p.ipvs = c
	t.Cleanup(func() { p.Close() })
	return p, c
}

func syncAll(t testing.TB, p *Proxier, desired *plan.Plan) {
	t.Helper()
	if err := p.Sync(context.Background(), desired, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
}

func syncOne(t testing.TB, p *Proxier, desired *plan.Plan, sp *plan.ServicePort) {
	t.Helper()
	desired.Services[sp.Name] = sp
	if len(sp.Frontends) == 0 {
		delete(desired.Services, sp.Name)
	}
	if err := p.Sync(context.Background(), desired, plan.Change{Services: []plan.ServicePortName{sp.Name}}); err != nil {
		t.Fatal(err)
	}
}

// TestRestartWritesNothing checks that a second process writes nothing, and that a moved
// endpoint takes two messages.
func TestRestartWritesNothing(t *testing.T) {
	eachFamily(t, func(t *testing.T, w world) {
		plan := w.example()
		for i := range 50 {
			sp := conformance.FleetService(w.family, i+100, 10*i, 10)
			plan.Services[sp.Name] = sp
		}
		first, sent := start(t, w.family, nil)
		syncAll(t, first, plan)
		if n := len(sent.take()); n < 500 {
			t.Errorf("only %d messages made everything", n)
		}
		second, sent := start(t, w.family, nil)
		syncAll(t, second, plan)
		if ops := sent.take(); len(ops) != 0 {
			t.Errorf("the second process sent %v", ops)
		}
		syncOne(t, second, plan, conformance.FleetService(w.family, 100, 1, 10))
		if ops := sent.take(); len(ops) != 2 {
			t.Errorf("a moved endpoint took %v", ops)
		}
		checkKernel(t, second)
	})
}

// checkKernel compares the kernel with the state of the Proxier.
func checkKernel(t *testing.T, p *Proxier) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	read, _, err := p.read(&ruleset{}, &plan.Plan{})
	if err != nil {
		t.Fatal(err)
	}
	text := func(st *state) []string {
		var lines []string
		for key, s := range st.servers {
			lines = append(lines, fmt.Sprint(key, s.scheduler))
			for d, f := range s.dests {
				lines = append(lines, fmt.Sprint(key, d, f))
			}
		}
		for a := range st.onDevice {
			lines = append(lines, a.String())
		}
		slices.Sort(lines)
		return lines
	}
	if diff := cmp.Diff(text(read), text(p.state)); diff != "" {
		t.Errorf("-kernel +state:\n%s", diff)
	}
}

// TestOthersStay checks that virtual servers, addresses and tables of other software stay.
func TestOthersStay(t *testing.T) {
	eachFamily(t, func(t *testing.T, w world) {
		k, err := kernel.OpenIPVS(w.family)
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		foreign := []kernel.ServerKey{
			{Mark: 7}, {Mark: 0x8000_0001}, {Addr: w.addr("192.0.2.200", "2001:db8::200"), Port: 30443, Protocol: plan.TCP},
			{Addr: w.external(77), Port: 80, Protocol: plan.UDP},
		}
		dest := w.pods(99).Endpoints[0].AddrPort
		for _, key := range foreign {
			for _, o := range []kernel.Op{{Verb: kernel.AddServer, Key: key, Scheduler: "wlc"}, {Verb: kernel.AddDestination, Key: key, Destination: dest, Weight: 5}} {
				if err := do(k, o); err != nil {
					t.Fatal(err)
				}
			}
		}
		check := func(when string) {
			t.Helper()
			for _, key := range foreign {
				dests, err := k.Destinations(key)
				if err != nil || len(dests) != 1 || dests[0].Weight != 5 || dests[0].Addr != dest {
					t.Errorf("%s: %s has %v (%v)", when, key, dests, err)
				}
			}
		}
		p, _ := start(t, w.family, nil)
		syncAll(t, p, w.example())
		check("after a sync")
		syncAll(t, p, w.plan())
		p.drainOnce(time.Now().Add(2 * drainBound))
		check("without Services")
		p2, _ := start(t, w.family, nil)
		syncAll(t, p2, w.example())
		for range 2 { // the second time there is nothing
			if _, _, err := (Dataplane{}).Cleanup(w.family, false); err != nil {
				t.Fatal(err)
			}
		}
		check("after the cleanup")
		all, err := k.Servers()
		if err != nil || len(all) != len(foreign) {
			t.Errorf("left after the cleanup: %v (%v)", all, err)
		}
		if _, err := netlink.LinkByName(kernel.DeviceName); err == nil {
			t.Errorf("%s is left after the cleanup", kernel.DeviceName)
		}
		word := map[plan.Family]string{plan.IPv4: "ip", plan.IPv6: "ip6"}[w.family]
		if out := nstest.NFT(t, "", "list", "tables", word); strings.Contains(out, tableName) {
			t.Errorf("tables after the cleanup: %s", out)
		}
	})
}

// serve echoes data at a TCP port of the node.
func serve(t *testing.T, at netip.AddrPort) {
	t.Helper()
	l, err := net.Listen("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(c, c)
				c.Close()
			}()
		}
	}()
}

func dial(t *testing.T, to netip.AddrPort) (*net.TCPConn, error) {
	t.Helper()
	c, err := net.DialTimeout("tcp", to.String(), 30*time.Second)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn), nil
}

func echoes(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// TestOnlyServicesAtVirtualAddresses checks that a daemon of the node that listens on all
// addresses is not reachable at virtual addresses. The exception is the health check of a load
// balancer.
func TestOnlyServicesAtVirtualAddresses(t *testing.T) {
	eachFamily(t, func(t *testing.T, w world) {
		serve(t, netip.AddrPortFrom(w.addr("0.0.0.0", "::"), 22))
		serve(t, netip.AddrPortFrom(w.addr("0.0.0.0", "::"), 32000))
		own := w.addr("192.0.2.200", "2001:db8::200")
		desired := w.example()
		own80 := w.service("own", plan.TCP, nil, plan.Frontend{Kind: plan.ExternalIP, Addr: own, Port: 80, Internal: w.pods(1), External: w.pods(1)})
		desired.Services[own80.Name] = own80
		p, _ := start(t, w.family, nil)
		syncAll(t, p, desired)
		for to, open := range map[netip.AddrPort]bool{
			netip.AddrPortFrom(w.vip(1), 22):         false,
			netip.AddrPortFrom(w.vip(2), 32000):      false,
			netip.AddrPortFrom(w.external(1), 22):    false,
			netip.AddrPortFrom(w.external(1), 32000): true,
			netip.AddrPortFrom(own, 22):              true, // an external IP that is the node's own
			netip.AddrPortFrom(own, 32000):           true,
		} {
			c, err := dial(t, to)
			if err == nil {
				err = echoes(c)
			}
			switch {
			case open && err != nil:
				t.Errorf("%s: %v", to, err)
			case !open && !errors.Is(err, syscall.ECONNREFUSED):
				t.Errorf("%s is not refused: %v", to, err)
			}
		}
	})
}

// TestDrain checks that a connection survives when its endpoint leaves the Service and when the
// Service is deleted. Afterwards nothing stays.
func TestDrain(t *testing.T) {
	eachFamily(t, func(t *testing.T, w world) {
		own := w.addr("192.0.2.200", "2001:db8::200")
		serve(t, netip.AddrPortFrom(own, 8080))
		here := &plan.EndpointSet{Endpoints: []plan.Endpoint{{AddrPort: netip.AddrPortFrom(own, 8080)}}}
		web := func(set *plan.EndpointSet) *plan.ServicePort {
			return w.service("web", plan.TCP, set, clusterIP(w.vip(1), 80, set))
		}
		desired := w.plan(web(here))
		p, _ := start(t, w.family, nil)
		syncAll(t, p, desired)
		to := netip.AddrPortFrom(w.vip(1), 80)
		open := func() *net.TCPConn {
			t.Helper()
			c, err := dial(t, to)
			if err == nil {
				err = echoes(c)
			}
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		c := open()
		syncOne(t, p, desired, web(w.pods(5)))
		if err := echoes(c); err != nil {
			t.Errorf("its endpoint has left the Service: %v", err)
		}
		syncOne(t, p, desired, &plan.ServicePort{Name: web(nil).Name})
		if err := echoes(c); err != nil {
			t.Errorf("the Service is gone: %v", err)
		}
		if _, err := dial(t, to); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a new connection to the Service that is gone: %v", err)
		}
		// The Service comes back before the connection has ended.
		syncOne(t, p, desired, web(here))
		second := open()
		if err := echoes(c); err != nil {
			t.Errorf("the Service is back: %v", err)
		}
		syncOne(t, p, desired, &plan.ServicePort{Name: web(nil).Name})
		checkKernel(t, p)
		// IPVS forgets a connection sooner after a reset.
		for _, conn := range []*net.TCPConn{c, second} {
			conn.SetLinger(0)
			conn.Close()
		}
		waitFor(t, "nothing to be left", func() bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			return len(p.state.servers) == 0 && len(p.state.onDevice) == 0 && len(p.state.draining) == 0
		})
		checkKernel(t, p)
		// The Service loses its endpoints before it goes.
		syncOne(t, p, desired, web(here))
		c = open()
		syncOne(t, p, desired, web(w.pods()))
		syncOne(t, p, desired, &plan.ServicePort{Name: web(nil).Name})
		p.drainOnce(time.Now())
		if err := echoes(c); err != nil {
			t.Errorf("the Service had no endpoints when it went: %v", err)
		}
		syncOne(t, p, desired, web(here))
		// The bound ends a connection.
		syncOne(t, p, desired, web(here))
		c = open()
		syncOne(t, p, desired, &plan.ServicePort{Name: web(nil).Name})
		if err := echoes(c); err != nil {
			t.Errorf("before the bound has passed: %v", err)
		}
		p.drainOnce(time.Now().Add(drainBound + time.Minute))
		if p.state == nil || len(p.state.servers) != 0 || len(p.state.onDevice) != 0 {
			t.Errorf("left after the bound: %+v", p.state)
		}
		checkKernel(t, p)
	})
}

// TestDrainUDP checks that a flow survives when its endpoint leaves the Service but still
// answers, until the bound. An endpoint that no longer answers is removed immediately.
func TestDrainUDP(t *testing.T) {
	eachFamily(t, func(t *testing.T, w world) {
		own := w.addr("192.0.2.200", "2001:db8::200")
		server, err := net.ListenPacket("udp", netip.AddrPortFrom(own, 8080).String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { server.Close() })
		go echoPackets(server)
		here := &plan.EndpointSet{Endpoints: []plan.Endpoint{{AddrPort: netip.AddrPortFrom(own, 8080)}}}
		dns := func(set, serving *plan.EndpointSet) *plan.ServicePort {
			return w.service("dns", plan.UDP, serving, clusterIP(w.vip(1), 53, set))
		}
		desired := w.plan(dns(here, here))
		p, _ := start(t, w.family, nil)
		syncAll(t, p, desired)
		key := kernel.ServerKey{Addr: w.vip(1), Port: 53, Protocol: plan.UDP}
		weight := func() int {
			t.Helper()
			dests, err := p.ipvs.Destinations(key)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range dests {
				if d.Addr == here.Endpoints[0].AddrPort {
					return d.Weight
				}
			}
			return -1
		}
		open := func() net.Conn {
			t.Helper()
			c, err := net.Dial("udp", netip.AddrPortFrom(w.vip(1), 53).String())
			if err == nil {
				t.Cleanup(func() { c.Close() })
				err = echoes(c)
			}
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		c := open()
		syncOne(t, p, desired, dns(w.pods(5), here))
		if err := echoes(c); err != nil || weight() != 0 {
			t.Errorf("its endpoint terminates and still answers: weight %d, %v", weight(), err)
		}
		syncOne(t, p, desired, dns(w.pods(5), w.pods(5)))
		if weight() != -1 {
			t.Errorf("its endpoint answers no more, and has the weight %d", weight())
		}
		syncOne(t, p, desired, dns(here, here))
		open()
		syncOne(t, p, desired, dns(w.pods(5), here))
		p.drainOnce(time.Now().Add(drainBound + time.Minute))
		if weight() != -1 {
			t.Errorf("after the bound its endpoint has the weight %d", weight())
		}
	})
}

func echoPackets(server net.PacketConn) {
	buf := make([]byte, 64)
	for {
		n, from, err := server.ReadFrom(buf)
		if err != nil {
			return
		}
		server.WriteTo(buf[:n], from)
	}
}

func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Minute); !done(); {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
		poll := time.NewTimer(50 * time.Millisecond)
		<-poll.C
	}
}

// TestRepair checks that a full write restores what other software has removed.
func TestRepair(t *testing.T) {
	eachFamily(t, func(t *testing.T, w world) {
		p, sent := start(t, w.family, nil)
		plan := w.example()
		syncAll(t, p, plan)
		p.mu.Lock()
		before := p.state
		p.mu.Unlock()
		if _, _, err := (Dataplane{}).Cleanup(w.family, false); err != nil { // somebody's idea of an empty node
			t.Fatal(err)
		}
		sent.take()
		syncAll(t, p, plan)
		if n := len(sent.take()); n == 0 || len(before.servers) != len(p.state.servers) {
			t.Errorf("%d messages made %d servers of %d", n, len(p.state.servers), len(before.servers))
		}
		checkKernel(t, p)
	})
}
