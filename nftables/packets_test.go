// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"context"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"signalbox/proxier/plan"
)

// synced is a Proxier that has written the plan.
func (l *lab) synced(desired *plan.Plan) *Proxier {
	p := newProxier(l.t, l.family)
	l.must(p.Sync(context.Background(), desired, plan.Change{All: true}))
	return p
}

// protocols are those that the lab's Pods answer.
var protocols = []plan.Protocol{plan.TCP, plan.UDP}

func TestClusterIP(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		desired := l.plan()
		for _, proto := range protocols {
			set := l.set(1, 2)
			put(desired, "web", proto, 0, plan.Frontend{
				Addr: l.vip(1), Port: 80, Internal: set, External: set, Masquerade: plan.FromNode | plan.FromOutside,
			})
		}
		l.synced(desired)
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
		l.mustFail(l.pods[0], plan.TCP, netip.AddrPortFrom(l.vip(1), 81), errRefused)
		l.mustFail(nil, plan.UDP, netip.AddrPortFrom(l.vip(1), 81), errRefused)
		l.mustFail(l.pods[0], plan.TCP, netip.AddrPortFrom(l.vip(9), 80), errSilence)
		l.mustFail(nil, plan.TCP, netip.AddrPortFrom(l.vip(9), 80), errSilence)
	})
}

// TestHairpin: a Pod that reaches itself through the Service sees the node.
func TestHairpin(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		desired := l.plan()
		set := l.set(1)
		put(desired, "web", plan.TCP, 0, plan.Frontend{Addr: l.vip(1), Port: 80, Internal: set, External: set})
		l.synced(desired)
		a := l.mustAnswer(l.pods[0], plan.TCP, netip.AddrPortFrom(l.vip(1), 80))
		if a.from != l.pods[0].nodeAddr {
			t.Errorf("the Pod saw %s, want %s", a.from, l.pods[0].nodeAddr)
		}
	})
}

// TestMasqueradeSources tries each set of traffic sources from each source.
func TestMasqueradeSources(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		desired := l.plan()
		set := l.set(1)
		for sources := range plan.AnySource + 1 {
			put(desired, "web-"+string('0'+rune(sources)), plan.TCP, 0, plan.Frontend{
				Kind: plan.NodePort, Port: 30000 + uint16(sources), Internal: set, External: set, Masquerade: sources,
			})
		}
		l.synced(desired)
		for sources := range plan.AnySource + 1 {
			to := netip.AddrPortFrom(l.client.nodeAddr, 30000+uint16(sources))
			for source, from := range map[plan.TrafficSources]*peer{plan.FromPods: l.pods[1], plan.FromOutside: l.client} {
				want := from.addr
				if sources&source != 0 {
					want = l.pods[0].nodeAddr
				}
				if a := l.mustAnswer(from, plan.TCP, to); a.from != want {
					t.Errorf("masquerade %03b, from %s: the endpoint saw %s, want %s", sources, from.name, a.from, want)
				}
			}
			// The node's own source is that of the address it connected to.
			want := l.client.nodeAddr
			if sources&plan.FromNode != 0 {
				want = l.pods[0].nodeAddr
			}
			if a := l.mustAnswer(nil, plan.TCP, to); a.from != want {
				t.Errorf("masquerade %03b, from the node: the endpoint saw %s, want %s", sources, a.from, want)
			}
		}
	})
}

// TestInternalAndExternal: where the sets differ, the source decides, and an
// empty one rejects or drops for its source only.
func TestInternalAndExternal(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		desired := l.plan()
		one, two, none := l.set(1), l.set(2), l.set()
		nodePort := func(port uint16, internal, external *plan.EndpointSet, empty plan.Verdict) plan.Frontend {
			return plan.Frontend{Kind: plan.NodePort, Port: port, Internal: internal, External: external, WhenEmpty: empty, Masquerade: plan.FromNode}
		}
		put(desired, "both", plan.TCP, 0, nodePort(30001, one, two, plan.Drop),
			plan.Frontend{Kind: plan.LoadBalancerIP, Addr: l.vip(200), Port: 80, Internal: one, External: two, Masquerade: plan.FromNode})
		put(desired, "internal", plan.TCP, 0, nodePort(30002, one, none, plan.Drop))
		put(desired, "external", plan.TCP, 0, nodePort(30003, none, two, plan.Drop))
		put(desired, "dropped", plan.TCP, 0, nodePort(30004, none, none, plan.Drop))
		put(desired, "rejected", plan.TCP, 0, nodePort(30005, none, none, plan.Reject),
			plan.Frontend{Kind: plan.ClusterIP, Addr: l.vip(7), Port: 80, Internal: none, External: none})
		l.synced(desired)
		at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(l.client.nodeAddr, port) }
		for _, to := range []netip.AddrPort{at(30001), netip.AddrPortFrom(l.vip(200), 80)} {
			for from, want := range map[*peer]string{l.client: "pod2", l.pods[2]: "pod1", nil: "pod1"} {
				if a := l.mustAnswer(from, plan.TCP, to); a.name != want {
					t.Errorf("%s answered %v, want %s", a.name, from, want)
				}
			}
		}
		if a := l.mustAnswer(l.pods[2], plan.TCP, at(30002)); a.name != "pod1" {
			t.Errorf("%s answered, want pod1", a.name)
		}
		l.mustFail(l.client, plan.TCP, at(30002), errSilence)
		l.mustAnswer(l.client, plan.TCP, at(30003))
		l.mustFail(l.pods[2], plan.TCP, at(30003), errSilence)
		l.mustFail(nil, plan.TCP, at(30003), errSilence)
		l.mustFail(l.client, plan.TCP, at(30004), errSilence)
		for _, from := range []*peer{l.client, l.pods[2], nil} {
			l.mustFail(from, plan.TCP, at(30005), errRefused)
			l.mustFail(from, plan.TCP, netip.AddrPortFrom(l.vip(7), 80), errRefused)
		}
	})
}

func TestSources(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		desired := l.plan()
		set := l.set(1)
		host := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, l.family.HostBits()) }
		sources := []netip.Prefix{host(l.client.addr), l.podPrefix(), host(l.pods[1].addr)}
		put(desired, "web", plan.TCP, 0,
			plan.Frontend{Kind: plan.LoadBalancerIP, Addr: l.vip(200), Port: 80, Internal: set, External: set, Sources: sources},
			plan.Frontend{Kind: plan.NodePort, Port: 30001, Internal: set, External: set, Sources: sources},
			plan.Frontend{Kind: plan.LoadBalancerIP, Addr: l.vip(201), Port: 80, Internal: set, External: set, Sources: []netip.Prefix{}})
		p := l.synced(desired)
		for _, to := range []netip.AddrPort{netip.AddrPortFrom(l.vip(200), 80), netip.AddrPortFrom(l.client.nodeAddr, 30001)} {
			l.mustAnswer(l.client, plan.TCP, to)
			l.mustAnswer(l.pods[1], plan.TCP, to)
			if _, err := l.probe(l.client, l.client.addr.Next(), plan.TCP, to, silence); err != errSilence {
				t.Errorf("a source that is not allowed: %v, want silence", err)
			}
			l.mustFail(nil, plan.TCP, to, errSilence)
		}
		l.mustFail(l.client, plan.TCP, netip.AddrPortFrom(l.vip(201), 80), errSilence)

		name := put(desired, "web", plan.TCP, 0,
			plan.Frontend{Kind: plan.LoadBalancerIP, Addr: l.vip(200), Port: 80, Internal: set, External: set, Sources: sources[1:]})
		l.must(p.Sync(context.Background(), desired, plan.Change{Services: []plan.ServicePortName{name}}))
		l.mustFail(l.client, plan.TCP, netip.AddrPortFrom(l.vip(200), 80), errSilence)
		l.mustAnswer(l.pods[1], plan.TCP, netip.AddrPortFrom(l.vip(200), 80))
	})
}

// TestNodeChange: the node's facts change, and with them who counts as a Pod,
// where NodePorts answer and what is dropped; the Services are not touched.
func TestNodeChange(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		desired := l.plan()
		desired.Node = plan.Node{NodePortAddrs: plan.NodePortAddrs{Addrs: []netip.Addr{l.pods[0].nodeAddr}}}
		one, two := l.set(1), l.set(2)
		put(desired, "web", plan.TCP, 0, plan.Frontend{Kind: plan.NodePort, Port: 30001, Internal: one, External: two})
		p := l.synced(desired)
		at := func(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, 30001) }
		expect := func(from *peer, to netip.Addr, want string) {
			t.Helper()
			if a := l.mustAnswer(from, plan.TCP, at(to)); a.name != want {
				t.Errorf("%s answered, want %s", a.name, want)
			}
		}
		expect(l.pods[2], l.pods[0].nodeAddr, "pod2") // not known as a Pod
		l.mustFail(l.client, plan.TCP, at(l.client.nodeAddr), errRefused)

		for _, pods := range []plan.LocalPods{
			{Prefixes: []netip.Prefix{l.podPrefix()}}, {Interface: "pod3"}, {InterfacePrefix: "pod"},
		} {
			desired.Node = plan.Node{LocalPods: pods, NodePortAddrs: plan.NodePortAddrs{All: true}, ServiceCIDRs: []netip.Prefix{l.vips()}}
			l.must(p.Sync(context.Background(), desired, plan.Change{Node: true}))
			expect(l.pods[2], l.pods[0].nodeAddr, "pod1")
			expect(l.client, l.client.nodeAddr, "pod2")
			l.mustFail(l.pods[2], plan.TCP, netip.AddrPortFrom(l.vip(3), 80), errSilence)
		}
	})
}

// TestForeignMarks: other software's bits of the packet mark pass unchanged,
// and neither our bit nor an id leaves the node.
func TestForeignMarks(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab) {
		desired := l.plan()
		set := l.set(1)
		put(desired, "web", plan.TCP, 0, plan.Frontend{
			Addr: l.vip(1), Port: 80, Internal: set, External: set, Masquerade: plan.AnySource,
		})
		l.synced(desired)
		runNft(t, "-f", "-", `table inet other {
			chain in { type filter hook prerouting priority mangle; tcp dport 80 meta mark set 0x80000003; }
			chain out { type route hook output priority mangle; tcp dport 80 meta mark set 0x80000003; }
			chain post { type filter hook postrouting priority 300; tcp dport 8080 tcp flags syn / syn,ack meta mark 0x80000003 meta priority < 1:0 counter accept;
				tcp dport 8080 tcp flags syn / syn,ack counter comment "wrong"; }
		}`)
		for _, from := range []*peer{l.client, l.pods[1], nil} {
			l.mustAnswer(from, plan.TCP, netip.AddrPortFrom(l.vip(1), 80))
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
			l := newLab(t, plan.IPv4)
			s := newSticky(l, plan.TCP, timeout, 1, 2, 3)
			done := make(chan struct{})
			go func() {
				defer close(done)
				var clients sync.WaitGroup
				for _, c := range s.clients()[:4] {
					clients.Go(func() {
						for range 150 {
							if _, err := l.probe(l.client, c, plan.TCP, s.cluster, patience); err != nil {
								t.Errorf("from %s: %v", c, err)
							}
						}
					})
				}
				clients.Wait()
			}()
			sets := []*plan.EndpointSet{l.set(1), l.set(1, 2, 3, 4), l.set(4), l.set(2, 3), l.set(1, 4), l.set(2, 3, 4)}
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
