// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/internal/netlab"
	"signalbox/proxier/plan"
)

// loneHost gives the namespace an address, a default route that leads nowhere,
// and servers at that address which answer with their port.
func loneHost(t *testing.T, family plan.Family, ports ...uint16) netip.Addr {
	t.Helper()
	host, route, bits := nodeAddr(family), "0.0.0.0/0", family.HostBits()
	if family == plan.IPv6 {
		route = "::/0"
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "out"}, PeerName: "away"}
	must(t, netlink.LinkAdd(veth))
	for _, name := range []string{"lo", "out", "away"} {
		link, err := netlink.LinkByName(name)
		must(t, err)
		must(t, netlink.LinkSetUp(link))
	}
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	link, err := netlink.LinkByName("out")
	must(t, err)
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	must(t, err)
	defer nl.Close()
	must(t, netlab.AddAddr(nl, lo, netip.PrefixFrom(host, bits)))
	dst, err := netlink.ParseIPNet(route)
	must(t, err)
	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_LINK}))
	for _, port := range ports {
		l, err := net.Listen("tcp", netip.AddrPortFrom(host, port).String())
		must(t, err)
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprint(c, port)
				c.Close()
			}
		}()
	}
	return host
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ask connects and returns what the server says.
func ask(addr netip.Addr, port uint16) (string, error) {
	c, err := net.DialTimeout("tcp", netip.AddrPortFrom(addr, port).String(), time.Minute)
	if err != nil {
		return "", err
	}
	defer c.Close()
	answer, err := io.ReadAll(c)
	return string(answer), err
}

// connections is a plan of Services whose endpoints are ports of one host.
type connections struct {
	*world
	host netip.Addr
	plan *plan.Plan
}

var serverPorts = []uint16{8080, 8081, 8082}

func newConnections(t *testing.T, p *Proxier) *connections {
	c := &connections{newWorld(p.opts.Family, 1), loneHost(t, p.opts.Family, serverPorts...), planOf(p.opts.Family)}
	c.plan.Node.NodePortAddrs.All = true
	return c
}

// service puts a Service with cluster IP number vip, and node port 30000+vip,
// into the plan.
func (c *connections) service(name string, vip int, affinity time.Duration, ports ...uint16) plan.Change {
	set := &plan.EndpointSet{}
	for _, port := range ports {
		set.Endpoints = append(set.Endpoints, plan.Endpoint{AddrPort: netip.AddrPortFrom(c.host, port), MayHairpin: true})
	}
	sp := &plan.ServicePort{
		Name:            plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "ns", Name: name}, Protocol: plan.TCP},
		AffinityTimeout: affinity,
		Frontends: []plan.Frontend{
			{Addr: c.addr(96, vip), Port: 80, Internal: set, External: set},
			{Kind: plan.NodePort, Port: uint16(30000 + vip), Internal: set, External: set},
		},
	}
	c.plan.Services[sp.Name] = sp
	return plan.Change{Services: []plan.ServicePortName{sp.Name}}
}

// answers are those of the Service's servers to connections that go to its
// cluster IP and its node port in turn.
func (c *connections) answers(t *testing.T, vip, number int) map[string]bool {
	t.Helper()
	got := map[string]bool{}
	for i := range number {
		addr, port := c.addr(96, vip), uint16(80)
		if i%2 == 1 {
			addr, port = c.host, uint16(30000+vip)
		}
		answer, err := ask(addr, port)
		if err != nil {
			t.Fatalf("%s port %d: %v", addr, port, err)
		}
		got[answer] = true
	}
	return got
}

// TestConnections makes real connections: they are spread, or refused without
// endpoints. All that depends on where hosts are is tested for every mode
// alike, elsewhere.
func TestConnections(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		c := newConnections(t, p)
		c.service("spread", 1, 0, serverPorts...)
		c.service("empty", 3, 0)
		mustSync(t, p, c.plan, plan.Change{All: true})
		if got := c.answers(t, 1, 200); len(got) != len(serverPorts) {
			t.Errorf("200 connections reach %v of %v", got, serverPorts)
		}
		if _, err := ask(c.addr(96, 3), 80); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a Service without endpoints answers %v", err)
		}
		if _, err := ask(c.host, 30003); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a node port without endpoints answers %v", err)
		}
	})
}

// TestAffinity makes real connections: a client stays with one endpoint at
// every frontend, and goes to another when that is gone.
func TestAffinity(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		c := newConnections(t, p)
		c.service("sticky", 2, time.Hour, serverPorts...)
		mustSync(t, p, c.plan, plan.Change{All: true})
		first := c.answers(t, 2, 40)
		if len(first) != 1 {
			t.Fatalf("one client reaches %v", first)
		}
		left := slices.DeleteFunc(slices.Clone(serverPorts), func(port uint16) bool { return first[fmt.Sprint(port)] })
		mustSync(t, p, c.plan, c.service("sticky", 2, time.Hour, left...))
		second := c.answers(t, 2, 40)
		if len(second) != 1 {
			t.Errorf("after its endpoint went the client reaches %v", second)
		}
		for port := range second {
			if first[port] {
				t.Errorf("the client still reaches %s", port)
			}
		}
	})
}
