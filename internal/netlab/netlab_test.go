// SPDX-License-Identifier: Apache-2.0

package netlab_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"signalbox/internal/netlab"
)

// hangTimeout ends a test that hangs and decides nothing else.
const hangTimeout = 20 * time.Second

func newLab(t *testing.T, o netlab.Options) *netlab.Lab {
	t.Helper()
	lab, err := netlab.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
	})
	return lab
}

func ask(lab *netlab.Lab, from, network string, source netip.Addr, target netip.AddrPort) (netlab.Answer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), hangTimeout)
	defer cancel()
	return lab.Host(from).Ask(ctx, network, netip.AddrPortFrom(source, 0), target)
}

var layouts = []netlab.Options{
	{PodLink: netlab.Routed, Underlay: netlab.HostGateway},
	{PodLink: netlab.Bridged, Underlay: netlab.HostGateway},
	{PodLink: netlab.Routed, Underlay: netlab.VXLAN},
	{PodLink: netlab.Bridged, Underlay: netlab.VXLAN},
}

// TestEveryHostReachesEveryServer is what all probes of virtual IPs rest on:
// without rules, everyone reaches everyone, and is seen with its own address.
func TestEveryHostReachesEveryServer(t *testing.T) {
	servers := []string{"pod-a", "pod-b", "pod-c", "pod-d", "node1", "node2"}
	for _, o := range layouts {
		t.Run(fmt.Sprintf("link %d underlay %d", o.PodLink, o.Underlay), func(t *testing.T) {
			lab := newLab(t, o)
			for _, from := range lab.Hosts() {
				for _, to := range servers {
					for _, network := range []string{"tcp", "udp"} {
						for _, v6 := range []bool{false, true} {
							checkDirect(t, lab, from, lab.Host(to), network, v6)
						}
					}
				}
			}
		})
	}
}

func checkDirect(t *testing.T, lab *netlab.Lab, from, to *netlab.Host, network string, v6 bool) {
	t.Helper()
	target := to.Addr.V4
	if v6 {
		target = to.Addr.V6
	}
	at := netip.AddrPortFrom(target, 8080)
	a, err := ask(lab, from.Name, network, netip.Addr{}, at)
	if err != nil {
		t.Errorf("%s to %s %s: %v", from.Name, network, at, err)
		return
	}
	own, err := from.Addrs()
	if err != nil {
		t.Fatal(err)
	}
	seenOwn := false
	for _, o := range own {
		seenOwn = seenOwn || o == a.Seen.Addr()
	}
	if a.Server != to.Name || a.At != at || !seenOwn {
		t.Errorf("%s to %s %s: answer %s; the asker has %v", from.Name, network, at, a, own)
	}
}

func TestChosenSourceIsSeen(t *testing.T) {
	lab := newLab(t, netlab.Options{})
	client := lab.Host("client1")
	for _, extra := range []string{"198.51.100.77", "2001:db8:c1::77"} {
		source := netip.MustParseAddr(extra)
		if err := client.AddAddr(source); err != nil {
			t.Fatal(err)
		}
		target := lab.Host("pod-c").Addr.V4
		if source.Is6() {
			target = lab.Host("pod-c").Addr.V6
		}
		a, err := ask(lab, "client1", "udp", source, netip.AddrPortFrom(target, 8081))
		if err != nil || a.Seen.Addr() != source || a.Server != "pod-c" {
			t.Errorf("from %s: %v, %v", source, a, err)
		}
		if err := client.RemoveAddr(source); err != nil {
			t.Fatal(err)
		}
		if _, err := ask(lab, "client1", "udp", source, netip.AddrPortFrom(target, 8081)); err == nil {
			t.Errorf("%s is still usable after its removal", source)
		}
	}
}

func TestOutcomes(t *testing.T) {
	lab := newLab(t, netlab.Options{})
	nobody := netip.MustParseAddr("10.244.1.200")   // in node1's range, held by no Pod
	loop := netlab.ServiceNetwork.V4.Addr().Next()  // the router sends it to node1, which sends it back
	loop6 := netlab.ServiceNetwork.V6.Addr().Next() //
	silent := netip.MustParseAddr("198.51.100.10")  // made silent below
	node1 := lab.Host("node1").Addr
	if err := lab.Host("client1").Do(func() error {
		return nft("add table ip t; add chain ip t c { type filter hook input priority 0; }; add rule ip t c meta l4proto { tcp, udp } drop")
	}); err != nil {
		t.Fatal(err)
	}
	if err := lab.Host("client2").Do(func() error {
		return nft("add table ip t; add chain ip t c { type filter hook output priority 0; }; add rule ip t c udp dport 7 drop")
	}); err != nil {
		t.Fatal(err)
	}
	_, err := ask(lab, "client2", "udp", netip.Addr{}, netip.AddrPortFrom(node1.V4, 7))
	if got := netlab.OutcomeOf(err); got != netlab.NotPermitted {
		t.Errorf("dropped by the client's own host: got %s (%v), want %s", got, err, netlab.NotPermitted)
	}
	for _, c := range []struct {
		name   string
		from   string
		target netip.AddrPort
		want   netlab.Outcome
	}{
		{"no listener", "client2", netip.AddrPortFrom(node1.V4, 9), netlab.Refused},
		{"no listener, IPv6", "client2", netip.AddrPortFrom(node1.V6, 9), netlab.Refused},
		{"routing loop", "client2", netip.AddrPortFrom(loop, 80), netlab.Unreachable},
		{"routing loop, IPv6", "client2", netip.AddrPortFrom(loop6, 80), netlab.Unreachable},
		{"nobody there", "client2", netip.AddrPortFrom(nobody, 80), netlab.Unreachable},
		{"dropped", "client2", netip.AddrPortFrom(silent, 80), netlab.Silent},
	} {
		for _, network := range []string{"tcp", "udp"} {
			t.Run(c.name+" "+network, func(t *testing.T) {
				wait := hangTimeout
				if c.want == netlab.Silent {
					wait = 300 * time.Millisecond // a late answer could only be missed, and there is none
				}
				ctx, cancel := context.WithTimeout(context.Background(), wait)
				defer cancel()
				_, err := lab.Host(c.from).Ask(ctx, network, netip.AddrPort{}, c.target)
				if got := netlab.OutcomeOf(err); got != c.want {
					t.Errorf("got %s (%v), want %s", got, err, c.want)
				}
			})
		}
	}
}

// TestRejectedSYN: a client learns of the ICMP error that its first SYN meets, and sends
// no second one.
func TestRejectedSYN(t *testing.T) {
	lab := newLab(t, netlab.Options{})
	node1 := lab.Host("node1")
	if err := node1.Do(func() error {
		return nft("add table inet t; add counter inet t syns; add chain inet t c { type filter hook input priority 0; }; " +
			"add rule inet t c tcp dport 9 counter name syns reject with icmpx type port-unreachable")
	}); err != nil {
		t.Fatal(err)
	}
	for _, from := range []string{"node1", "pod-x", "client1"} {
		for _, a := range []netip.Addr{node1.Addr.V4, node1.Addr.V6} {
			if _, err := ask(lab, from, "tcp", netip.Addr{}, netip.AddrPortFrom(a, 9)); netlab.OutcomeOf(err) != netlab.Refused {
				t.Errorf("%s to %s: %v, want refused", from, a, err)
			}
		}
	}
	var counter []byte
	if err := node1.Do(func() (err error) {
		counter, err = exec.Command("nft", "list", "counter", "inet", "t", "syns").Output()
		return err
	}); err != nil || !strings.Contains(string(counter), "packets 6 ") {
		t.Errorf("6 connections sent other than 6 SYNs (%v):\n%s", err, counter)
	}
}

// TestBurstOfDatagrams: a server loses none of many questions that come at once.
func TestBurstOfDatagrams(t *testing.T) {
	lab := newLab(t, netlab.Options{})
	at := netip.AddrPortFrom(lab.Host("pod-c").Addr.V4, 8080)
	ctx, cancel := context.WithTimeout(t.Context(), hangTimeout)
	defer cancel()
	var all errgroup.Group
	for range 2000 {
		c, err := lab.Host("client1").Open(ctx, "udp", netip.AddrPort{}, at)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		all.Go(func() error {
			_, err := c.Ask(ctx)
			return err
		})
	}
	if err := all.Wait(); err != nil {
		t.Error(err)
	}
}

// TestConnectionKeepsItsServer holds one TCP connection and one UDP flow open
// over several questions.
func TestConnectionKeepsItsServer(t *testing.T) {
	lab := newLab(t, netlab.Options{})
	ctx, cancel := context.WithTimeout(context.Background(), hangTimeout)
	defer cancel()
	for _, network := range []string{"tcp", "udp"} {
		c, err := lab.Host("pod-x").Open(ctx, network, netip.AddrPort{}, netip.AddrPortFrom(lab.Host("pod-d").Addr.V6, 8080))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for range 3 {
			a, err := c.Ask(ctx)
			if err != nil || a.Server != "pod-d" || a.Seen != c.Local() {
				t.Errorf("%s: %v, %v; own address %s", network, a, err, c.Local())
			}
		}
	}
}

func TestConnectionSeesItsServerGo(t *testing.T) {
	lab, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), hangTimeout)
	defer cancel()
	c, err := lab.Host("client1").Open(ctx, "tcp", netip.AddrPort{}, netip.AddrPortFrom(lab.Host("node1").Addr.V4, 8080))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Ask(ctx); err != nil {
		t.Fatal(err)
	}
	if err := lab.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Ask(ctx); netlab.OutcomeOf(err) != netlab.Ended {
		t.Errorf("the server is gone, and the question ended with %v", err)
	}
}

// TestRouteVIP moves a virtual IP's traffic to the other node.
func TestRouteVIP(t *testing.T) {
	lab := newLab(t, netlab.Options{})
	vip := netlab.ExternalNetwork.V4.Addr().Next()
	at := netip.AddrPortFrom(vip, 8080)
	for _, node := range []string{"node1", "node2"} {
		h := lab.Host(node)
		if err := h.AddAddr(vip); err != nil {
			t.Fatal(err)
		}
		if err := h.Serve(at); err != nil {
			t.Fatal(err)
		}
	}
	if a, err := ask(lab, "client1", "tcp", netip.Addr{}, at); err != nil || a.Server != "node1" {
		t.Errorf("before: %v, %v", a, err)
	}
	if err := lab.RouteVIP(netip.PrefixFrom(vip, 32), "node2"); err != nil {
		t.Fatal(err)
	}
	if a, err := ask(lab, "client1", "tcp", netip.Addr{}, at); err != nil || a.Server != "node2" {
		t.Errorf("after: %v, %v", a, err)
	}
	if err := lab.RouteVIP(netip.PrefixFrom(vip, 32), "node9"); err == nil {
		t.Error("a host that does not exist was accepted")
	}
}

// An HTTP client may dial once more in the background when its test has ended.
func TestDoAfterClose(t *testing.T) {
	lab, err := netlab.Lone("node")
	if err != nil {
		t.Fatal(err)
	}
	host := lab.Host("node")
	inside, closed, ended := make(chan bool), make(chan bool), make(chan error)
	go func() {
		ended <- host.Do(func() error {
			inside <- true
			<-closed
			return nil
		})
	}()
	<-inside
	go func() {
		entered := true
		for entered {
			entered = host.Do(func() error { return nil }) == nil
		}
		ended <- nil
	}()
	if err := lab.Close(); err != nil {
		t.Fatal(err)
	}
	close(closed)
	for range 2 {
		if err := <-ended; err != nil {
			t.Errorf("the function that ran while the lab was closed failed: %v", err)
		}
	}
	if err := host.Do(func() error { t.Error("a function runs after the lab was closed"); return nil }); err == nil {
		t.Error("a closed lab's host can be entered")
	}
}

func TestDoIsInsideTheHost(t *testing.T) {
	lab := newLab(t, netlab.Options{})
	inside := func() (link string, err error) {
		err = lab.Host("pod-a").Do(func() error {
			link, err = os.Readlink("/proc/thread-self/ns/net")
			return err
		})
		return
	}
	a, err := inside()
	if err != nil {
		t.Fatal(err)
	}
	b, err := inside()
	if err != nil {
		t.Fatal(err)
	}
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if a != b || a == home {
		t.Errorf("inside %s and %s, at home %s", a, b, home)
	}
	sentinel := errors.New("sentinel")
	if err := lab.Host("pod-a").Do(func() error { return sentinel }); err != sentinel {
		t.Errorf("the function's error came back as %v", err)
	}
	var out strings.Builder
	cmd := exec.Command("readlink", "/proc/self/ns/net")
	cmd.Stdout = &out
	if err := lab.Host("pod-a").Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if strings.TrimSpace(out.String()) != a {
		t.Errorf("a started program is in %s, not in %s", out.String(), a)
	}
}

func TestBadOptions(t *testing.T) {
	if lab, err := netlab.New(netlab.Options{Pods: []netlab.PodSpec{{Name: "p", Node: "node7"}}}); err == nil {
		lab.Close()
		t.Error("a Pod on a node that does not exist was accepted")
	}
}

// Many connections in turn leave the host's source ports free if they are reset.
func TestAskAndReset(t *testing.T) {
	lab := newLab(t, netlab.Options{})
	client, at := lab.Host("client1"), netip.AddrPortFrom(lab.Host("pod-a").Addr.V4, 8080)
	ctx, cancel := context.WithTimeout(t.Context(), hangTimeout)
	defer cancel()
	if a, err := client.AskAndReset(ctx, "tcp", at); err != nil || a.Server != "pod-a" {
		t.Fatalf("got %v (%v)", a, err)
	}
	if n := timeWait(t, client); n != 0 {
		t.Errorf("a connection that was reset is in TIME-WAIT (%d)", n)
	}
	if _, err := client.Ask(ctx, "tcp", netip.AddrPort{}, at); err != nil {
		t.Fatal(err)
	}
	for timeWait(t, client) != 1 { // the Pod ends the connection a moment later
		if ctx.Err() != nil {
			t.Fatal("a connection that was closed never was in TIME-WAIT: this test would not see one")
		}
	}
}

// timeWait counts the sockets of a host in TIME-WAIT.
func timeWait(t *testing.T, h *netlab.Host) (n int) {
	t.Helper()
	err := h.Do(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/sockstat")
		if err != nil {
			return err
		}
		_, tw, _ := strings.Cut(string(text), " tw ")
		_, err = fmt.Sscan(tw, &n)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func nft(script string) error {
	out, err := exec.Command("nft", script).CombinedOutput()
	if err != nil {
		return fmt.Errorf("nft: %w: %s", err, out)
	}
	return nil
}

func BenchmarkLab(b *testing.B) {
	for b.Loop() {
		lab, err := netlab.New(netlab.Options{})
		if err != nil {
			b.Fatal(err)
		}
		lab.Close()
	}
}

// A Pod that is given a range answers at each of its addresses, to other Pods and to
// outside hosts.
func TestGiveRange(t *testing.T) {
	l := newLab(t, netlab.Options{})
	listener, err := l.Host("pod-b").Listen("tcp", ":9090")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for _, text := range []string{"10.0.0.0/10", "fd00:10:128::/48"} {
		p := netip.MustParsePrefix(text)
		if err := l.GiveRange(p, "pod-b"); err != nil {
			t.Fatal(err)
		}
		at := netip.AddrPortFrom(p.Addr().Next(), 9090)
		for _, client := range []string{"pod-x", "node1", "client1"} {
			c, err := l.Host(client).Open(t.Context(), "tcp", netip.AddrPort{}, at)
			if err != nil {
				t.Errorf("%s to %s: %v", client, at, err)
				continue
			}
			c.Close()
		}
	}
}

func TestNth(t *testing.T) {
	for _, c := range []struct {
		n    int
		p, a string
	}{
		{0, "10.0.0.0/10", "10.0.0.0"}, {255, "10.0.0.0/10", "10.0.0.255"}, {256, "10.0.0.0/10", "10.0.1.0"},
		{1<<16 + 3, "10.0.0.0/10", "10.1.0.3"}, {4096, "fd00:10:96::/112", "fd00:10:96::1000"},
	} {
		if got := netlab.Nth(netip.MustParsePrefix(c.p), c.n); got != netip.MustParseAddr(c.a) {
			t.Errorf("address %d of %s is %s, not %s", c.n, c.p, got, c.a)
		}
	}
}
