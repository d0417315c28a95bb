package iptables

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"signalbox/proxier"
)

// loneHost gives the namespace an address, a default route that leads nowhere,
// and servers at that address which answer with their port.
func loneHost(t *testing.T, family proxier.Family, ports ...uint16) netip.Addr {
	t.Helper()
	host, route, bits := nodeAddr(family), "0.0.0.0/0", family.HostBits()
	if family == proxier.IPv6 {
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
	ip := &net.IPNet{IP: host.AsSlice(), Mask: net.CIDRMask(bits, bits)}
	must(t, netlink.AddrAdd(lo, &netlink.Addr{IPNet: ip, Flags: syscall.IFA_F_NODAD}))
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

// TestConnections makes real connections: they are spread, kept with affinity,
// moved when an endpoint goes, and refused without endpoints. All that depends
// on where hosts are is tested for every mode alike, elsewhere.
func TestConnections(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		ports := []uint16{8080, 8081, 8082}
		host := loneHost(t, p.opts.Family, ports...)
		w := newWorld(p.opts.Family, 1)
		set := func(ports ...uint16) *proxier.EndpointSet {
			s := &proxier.EndpointSet{}
			for _, port := range ports {
				s.Endpoints = append(s.Endpoints, proxier.Endpoint{AddrPort: netip.AddrPortFrom(host, port), MayHairpin: true})
			}
			return s
		}
		service := func(name string, vip int, s *proxier.EndpointSet) *proxier.ServicePort {
			return &proxier.ServicePort{
				Name:      proxier.ServicePortName{ServiceName: proxier.ServiceName{Namespace: "ns", Name: name}, Protocol: proxier.TCP},
				Frontends: []proxier.Frontend{{Addr: w.addr(96, vip), Port: 80, Internal: s, External: s}, {Kind: proxier.NodePort, Port: uint16(30000 + vip), Internal: s, External: s}},
			}
		}
		sticky := service("sticky", 2, set(ports...))
		sticky.AffinityTimeout = time.Hour
		plan := planOf(p.opts.Family, service("spread", 1, set(ports...)), sticky, service("empty", 3, nil))
		plan.Node.NodePortAddrs.All = true
		mustSync(t, p, plan, proxier.Change{All: true})

		answers := func(name string, vip int, connections int) map[string]bool {
			got := map[string]bool{}
			for i := range connections {
				addr, port := w.addr(96, vip), uint16(80)
				if i%2 == 1 {
					addr, port = host, uint16(30000+vip)
				}
				answer, err := ask(addr, port)
				if err != nil {
					t.Fatalf("%s at %s port %d: %v", name, addr, port, err)
				}
				got[answer] = true
			}
			return got
		}
		if got := answers("spread", 1, 200); len(got) != len(ports) {
			t.Errorf("200 connections reach %v of %v", got, ports)
		}
		first := answers("sticky", 2, 40)
		if len(first) != 1 {
			t.Fatalf("with affinity one client reaches %v", first)
		}
		var left []uint16
		for _, port := range ports {
			if !first[fmt.Sprint(port)] {
				left = append(left, port)
			}
		}
		without := service("sticky", 2, set(left...))
		without.AffinityTimeout = time.Hour
		plan.Services[without.Name] = without
		mustSync(t, p, plan, proxier.Change{Services: []proxier.ServicePortName{without.Name}})
		second := answers("sticky", 2, 40)
		if len(second) != 1 {
			t.Errorf("after its endpoint went the client reaches %v", second)
		}
		for port := range second {
			if first[port] {
				t.Errorf("the client still reaches %s", port)
			}
		}
		if _, err := ask(w.addr(96, 3), 80); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a Service without endpoints answers %v", err)
		}
		if _, err := ask(host, 30003); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a node port without endpoints answers %v", err)
		}
	})
}
