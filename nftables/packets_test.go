package nftables

import (
	"context"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"signalbox/proxier"
)

// synced is a Proxier that has written the plan.
func (l *lab) synced(plan *proxier.Plan) *Proxier {
	p := newProxier(l.t, l.family)
	l.must(p.Sync(context.Background(), plan, proxier.Change{All: true}))
	return p
}

// protocols are those that the lab's Pods answer.
var protocols = []proxier.Protocol{proxier.TCP, proxier.UDP}

func TestClusterIP(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		plan := l.plan()
		for _, proto := range protocols {
			set := l.set(1, 2)
			put(plan, "web", proto, 0, proxier.Frontend{
				Addr: l.vip(1), Port: 80, Internal: set, External: set, Masquerade: proxier.FromNode | proxier.FromOutside,
			})
		}
		l.synced(plan)
		for _, proto := range protocols {
			to := netip.AddrPortFrom(l.vip(1), 80)
			seen := map[string]bool{}
			for range 40 {
				a := l.mustAnswer(l.pods[2], proto, to)
				seen[a.name] = true
				if a.from != l.pods[2].addr {
					t.Fatalf("%s from a Pod: the endpoint saw %s, want the Pod's own %s", proto, a.from, l.pods[2].addr)
				}
			}
			if !seen["pod1"] || !seen["pod2"] || len(seen) != 2 {
				t.Errorf("%s: answers from %v, want both endpoints", proto, seen)
			}
			for _, from := range []*peer{nil, l.client} {
				a := l.mustAnswer(from, proto, to)
				if want := l.pods[a.name[3]-'1'].nodeAddr; a.from != want {
					t.Errorf("%s from %v: the endpoint saw %s, want the node's %s", proto, from, a.from, want)
				}
			}
		}
		l.mustFail(l.pods[0], proxier.TCP, netip.AddrPortFrom(l.vip(1), 81), errRefused)
		l.mustFail(nil, proxier.UDP, netip.AddrPortFrom(l.vip(1), 81), errRefused)
		l.mustFail(l.pods[0], proxier.TCP, netip.AddrPortFrom(l.vip(9), 80), errSilence)
		l.mustFail(nil, proxier.TCP, netip.AddrPortFrom(l.vip(9), 80), errSilence)
	})
}

// TestHairpin: a Pod that reaches itself through the Service sees the node.
func TestHairpin(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		plan := l.plan()
		set := l.set(1)
		put(plan, "web", proxier.TCP, 0, proxier.Frontend{Addr: l.vip(1), Port: 80, Internal: set, External: set})
		l.synced(plan)
		a := l.mustAnswer(l.pods[0], proxier.TCP, netip.AddrPortFrom(l.vip(1), 80))
		if a.from != l.pods[0].nodeAddr {
			t.Errorf("the Pod saw %s, want %s", a.from, l.pods[0].nodeAddr)
		}
	})
}

// TestMasqueradeOrigins tries every set of origins from every origin.
func TestMasqueradeOrigins(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		plan := l.plan()
		set := l.set(1)
		for origins := range proxier.AnySource + 1 {
			put(plan, "web-"+string('0'+rune(origins)), proxier.TCP, 0, proxier.Frontend{
				Kind: proxier.NodePort, Port: 30000 + uint16(origins), Internal: set, External: set, Masquerade: origins,
			})
		}
		l.synced(plan)
		for origins := range proxier.AnySource + 1 {
			to := netip.AddrPortFrom(l.client.nodeAddr, 30000+uint16(origins))
			for origin, from := range map[proxier.TrafficSources]*peer{proxier.FromPods: l.pods[1], proxier.FromOutside: l.client} {
				want := from.addr
				if origins&origin != 0 {
					want = l.pods[0].nodeAddr
				}
				if a := l.mustAnswer(from, proxier.TCP, to); a.from != want {
					t.Errorf("masquerade %03b, from %s: the endpoint saw %s, want %s", origins, from.name, a.from, want)
				}
			}
			// The node's own source is that of the address it connected to.
			want := l.client.nodeAddr
			if origins&proxier.FromNode != 0 {
				want = l.pods[0].nodeAddr
			}
			if a := l.mustAnswer(nil, proxier.TCP, to); a.from != want {
				t.Errorf("masquerade %03b, from the node: the endpoint saw %s, want %s", origins, a.from, want)
			}
		}
	})
}

// TestInternalAndExternal: where the sets differ, the origin decides, and an
// empty one rejects or drops for its origin only.
func TestInternalAndExternal(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		plan := l.plan()
		one, two, none := l.set(1), l.set(2), l.set()
		nodePort := func(port uint16, internal, external *proxier.EndpointSet, empty proxier.Verdict) proxier.Frontend {
			return proxier.Frontend{Kind: proxier.NodePort, Port: port, Internal: internal, External: external, WhenEmpty: empty, Masquerade: proxier.FromNode}
		}
		put(plan, "both", proxier.TCP, 0, nodePort(30001, one, two, proxier.Drop),
			proxier.Frontend{Kind: proxier.LoadBalancerIP, Addr: l.vip(200), Port: 80, Internal: one, External: two, Masquerade: proxier.FromNode})
		put(plan, "internal", proxier.TCP, 0, nodePort(30002, one, none, proxier.Drop))
		put(plan, "external", proxier.TCP, 0, nodePort(30003, none, two, proxier.Drop))
		put(plan, "dropped", proxier.TCP, 0, nodePort(30004, none, none, proxier.Drop))
		put(plan, "rejected", proxier.TCP, 0, nodePort(30005, none, none, proxier.Reject),
			proxier.Frontend{Kind: proxier.ClusterIP, Addr: l.vip(7), Port: 80, Internal: none, External: none})
		l.synced(plan)
		at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(l.client.nodeAddr, port) }
		for _, to := range []netip.AddrPort{at(30001), netip.AddrPortFrom(l.vip(200), 80)} {
			for from, want := range map[*peer]string{l.client: "pod2", l.pods[2]: "pod1", nil: "pod1"} {
				if a := l.mustAnswer(from, proxier.TCP, to); a.name != want {
					t.Errorf("%s answered %v, want %s", a.name, from, want)
				}
			}
		}
		if a := l.mustAnswer(l.pods[2], proxier.TCP, at(30002)); a.name != "pod1" {
			t.Errorf("%s answered, want pod1", a.name)
		}
		l.mustFail(l.client, proxier.TCP, at(30002), errSilence)
		l.mustAnswer(l.client, proxier.TCP, at(30003))
		l.mustFail(l.pods[2], proxier.TCP, at(30003), errSilence)
		l.mustFail(nil, proxier.TCP, at(30003), errSilence)
		l.mustFail(l.client, proxier.TCP, at(30004), errSilence)
		for _, from := range []*peer{l.client, l.pods[2], nil} {
			l.mustFail(from, proxier.TCP, at(30005), errRefused)
			l.mustFail(from, proxier.TCP, netip.AddrPortFrom(l.vip(7), 80), errRefused)
		}
	})
}

func TestSources(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		plan := l.plan()
		set := l.set(1)
		host := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, l.family.HostBits()) }
		sources := []netip.Prefix{host(l.client.addr), l.podPrefix(), host(l.pods[1].addr)}
		put(plan, "web", proxier.TCP, 0,
			proxier.Frontend{Kind: proxier.LoadBalancerIP, Addr: l.vip(200), Port: 80, Internal: set, External: set, Sources: sources},
			proxier.Frontend{Kind: proxier.NodePort, Port: 30001, Internal: set, External: set, Sources: sources},
			proxier.Frontend{Kind: proxier.LoadBalancerIP, Addr: l.vip(201), Port: 80, Internal: set, External: set, Sources: []netip.Prefix{}})
		p := l.synced(plan)
		for _, to := range []netip.AddrPort{netip.AddrPortFrom(l.vip(200), 80), netip.AddrPortFrom(l.client.nodeAddr, 30001)} {
			l.mustAnswer(l.client, proxier.TCP, to)
			l.mustAnswer(l.pods[1], proxier.TCP, to)
			if _, err := l.probe(l.client, l.client.addr.Next(), proxier.TCP, to, silence); err != errSilence {
				t.Errorf("a source that is not allowed: %v, want silence", err)
			}
			l.mustFail(nil, proxier.TCP, to, errSilence)
		}
		l.mustFail(l.client, proxier.TCP, netip.AddrPortFrom(l.vip(201), 80), errSilence)

		name := put(plan, "web", proxier.TCP, 0,
			proxier.Frontend{Kind: proxier.LoadBalancerIP, Addr: l.vip(200), Port: 80, Internal: set, External: set, Sources: sources[1:]})
		l.must(p.Sync(context.Background(), plan, proxier.Change{Services: []proxier.ServicePortName{name}}))
		l.mustFail(l.client, proxier.TCP, netip.AddrPortFrom(l.vip(200), 80), errSilence)
		l.mustAnswer(l.pods[1], proxier.TCP, netip.AddrPortFrom(l.vip(200), 80))
	})
}

// TestNodeChange: the node's facts change, and with them who counts as a Pod,
// where NodePorts answer and what is dropped; the Services are not touched.
func TestNodeChange(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		plan := l.plan()
		plan.Node = proxier.Node{NodePortAddrs: proxier.NodePortAddrs{Addrs: []netip.Addr{l.pods[0].nodeAddr}}}
		one, two := l.set(1), l.set(2)
		put(plan, "web", proxier.TCP, 0, proxier.Frontend{Kind: proxier.NodePort, Port: 30001, Internal: one, External: two})
		p := l.synced(plan)
		at := func(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, 30001) }
		expect := func(from *peer, to netip.Addr, want string) {
			t.Helper()
			if a := l.mustAnswer(from, proxier.TCP, at(to)); a.name != want {
				t.Errorf("%s answered, want %s", a.name, want)
			}
		}
		expect(l.pods[2], l.pods[0].nodeAddr, "pod2") // not known as a Pod
		l.mustFail(l.client, proxier.TCP, at(l.client.nodeAddr), errRefused)

		for _, pods := range []proxier.LocalPods{
			{Prefixes: []netip.Prefix{l.podPrefix()}}, {Interface: "pod3"}, {InterfacePrefix: "pod"},
		} {
			plan.Node = proxier.Node{LocalPods: pods, NodePortAddrs: proxier.NodePortAddrs{All: true}, ServiceCIDRs: []netip.Prefix{l.vips()}}
			l.must(p.Sync(context.Background(), plan, proxier.Change{Node: true}))
			expect(l.pods[2], l.pods[0].nodeAddr, "pod1")
			expect(l.client, l.client.nodeAddr, "pod2")
			l.mustFail(l.pods[2], proxier.TCP, netip.AddrPortFrom(l.vip(3), 80), errSilence)
		}
	})
}

// TestForeignMarks: other software's bits of the packet mark pass unchanged,
// and neither our bit nor an id leaves the node.
func TestForeignMarks(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		plan := l.plan()
		set := l.set(1)
		put(plan, "web", proxier.TCP, 0, proxier.Frontend{
			Addr: l.vip(1), Port: 80, Internal: set, External: set, Masquerade: proxier.AnySource,
		})
		l.synced(plan)
		runNft(t, "-f", "-", `table inet other {
			chain in { type filter hook prerouting priority mangle; tcp dport 80 meta mark set 0x80000003; }
			chain out { type route hook output priority mangle; tcp dport 80 meta mark set 0x80000003; }
			chain post { type filter hook postrouting priority 300; tcp dport 8080 tcp flags syn / syn,ack meta mark 0x80000003 meta priority < 1:0 counter accept;
				tcp dport 8080 tcp flags syn / syn,ack counter comment "wrong"; }
		}`)
		for _, from := range []*peer{l.client, l.pods[1], nil} {
			l.mustAnswer(from, proxier.TCP, netip.AddrPortFrom(l.vip(1), 80))
		}
		listing := runNft(t, "list", "chain", "inet", "other", "post")
		if !strings.Contains(listing, "counter packets 3") || !strings.Contains(listing, "counter packets 0") {
			t.Errorf("packets with a wrong mark or priority left the node:\n%s", listing)
		}
	})
}

// TestTrafficDuringSyncs: connections that are opened while endpoints come and
// go all reach one of them.
func TestTrafficDuringSyncs(t *testing.T) {
	for _, timeout := range []time.Duration{0, time.Hour} {
		t.Run("affinity "+timeout.String(), func(t *testing.T) {
			l := newLab(t, proxier.IPv4)
			s := newSticky(l, proxier.TCP, timeout, 1, 2, 3)
			done := make(chan struct{})
			go func() {
				defer close(done)
				var clients sync.WaitGroup
				for _, c := range s.clients()[:4] {
					clients.Go(func() {
						for range 150 {
							if _, err := l.probe(l.client, c, proxier.TCP, s.cluster, patience); err != nil {
								t.Errorf("from %s: %v", c, err)
							}
						}
					})
				}
				clients.Wait()
			}()
			sets := []*proxier.EndpointSet{l.set(1), l.set(1, 2, 3, 4), l.set(4), l.set(2, 3), l.set(1, 4), l.set(2, 3, 4)}
			for i := 0; ; i++ {
				select {
				case <-done:
					if i < 10 {
						t.Errorf("only %d Syncs happened during the connections", i)
					}
					return
				default:
					s.become(sets[i%len(sets)], nil)
				}
			}
		})
	}
}

// runNft runs the nft program; an argument after "-f", "-" is its input.
func runNft(t testing.TB, args ...string) string {
	t.Helper()
	input := ""
	if len(args) == 3 && args[1] == "-" {
		args, input = args[:2], args[2]
	}
	cmd := exec.Command("nft", args...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}
