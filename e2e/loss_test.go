// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// loss is a way in which a node can lose what a client of a Service sends or
// gets.
type loss struct {
	name string
	// rule drops packets, in nft's language; PORTS stands for the ports of the
	// Service under test.
	rule string
	// least is how many packets must have been dropped before it ends.
	least int
	// fault is what the exchange must find.
	fault string
}

// losses are from the worst to the least that there can be.
var losses = []loss{
	{"SYNs", "tcp dport PORTS tcp flags & (syn | ack) == syn counter name lost drop", newConnections, `packets were lost .*SYN, cluster IP from the node IPv6`},
	{"a single SYN", "ip6 daddr " + balancerIPs.V6.String() + " tcp dport 80 tcp flags & (syn | ack) == syn limit rate 1/day burst 1 packets counter name lost drop", 1,
		`1 packets were lost .*map\[SYN, load-balancer IP IPv6:1\]`},
	{"questions on streams", "tcp dport PORTS tcp flags & psh == psh counter name lost drop", 1, `packets were lost .*question, `},
	{"answers", "tcp sport 8080 tcp flags & psh == psh counter name lost drop", 1, `packets were lost .*answer of pod-`},
	{"a datagram", "udp dport PORTS counter name lost drop", 1, `UDP questions from new ports|answers on (open udp|udp) streams`},
	{"refused connections", "tcp dport PORTS tcp flags & (syn | ack) == syn counter name lost reject with tcp reset", 1, `connection refused`},
}

// calmExchange is an exchange that has gone on for a while with nothing lost.
func calmExchange(t *testing.T) (*site, *corev1.Service, *exchange) {
	t.Helper()
	s := newSite(t, shared, "nftables")
	svc := createBalanced(s)
	s.start()
	checkBalanced(s, svc)
	e := s.exchange(svc)
	e.does("a calm before", func() {})
	return s, svc, e
}

// TestExchangeFindsLoss has a node lose packets for a moment, which the traffic
// of the other tests must find, and in that step only.
func TestExchangeFindsLoss(t *testing.T) {
	for _, l := range losses {
		t.Run(l.name, func(t *testing.T) {
			s, svc, e := calmExchange(t)
			e.does("the loss", func() {
				s.loses(l, svc)
				s.eventually("the loss", func() error {
					if n := s.lost(); n < l.least {
						return fmt.Errorf("%d packets lost", n)
					}
					return nil
				})
				s.nft("delete table inet lossy")
			})
			e.does("the calm after", func() {})
			faults := e.faults()
			found := regexp.MustCompile("during the loss: .*(" + l.fault + ")")
			if !found.MatchString(strings.Join(faults, "\n")) {
				t.Errorf("no fault is %q, among %d: %.2000q", found, len(faults), faults)
			}
			for _, f := range faults {
				if !strings.Contains(f, "during the loss") {
					t.Errorf("a fault of another step: %s", f)
				}
			}
		})
	}
}

// A way that is dead holds a step up, however well the others do.
func TestExchangeWaitsForEachWay(t *testing.T) {
	s, svc, e := calmExchange(t)
	step := e.next("the loss of a way")
	s.loses(loss{rule: "ip daddr " + clusterIP(svc, false).String() + " iifname veth-pod-x tcp dport 80 counter name lost reject with tcp reset"}, svc)
	const dead = "cluster IP from a Pod IPv4"
	s.eventually("the other ways' share", func() error {
		e.mu.Lock()
		defer e.mu.Unlock()
		for _, w := range e.ways {
			if n := step.made[w.name]; w.name != dead && n < 50 {
				return fmt.Errorf("%s: %d", w.name, n)
			}
		}
		if name, n, _ := e.slowest(step); name != dead || n >= 50 {
			t.Errorf("the slowest way is %s with %d connections", name, n)
		}
		return nil
	})
	if faults := e.faults(); len(faults) == 0 {
		t.Error("no fault was found")
	}
}

func (s *site) loses(l loss, svc *corev1.Service) {
	s.Helper()
	ports := fmt.Sprintf("{ 80, %d, %d }", svc.Spec.Ports[0].NodePort, svc.Spec.Ports[1].NodePort)
	rule := strings.ReplaceAll(l.rule, "PORTS", ports)
	s.nft(`table inet lossy {
		counter lost { }
		chain in { type filter hook prerouting priority -400; ` + rule + `; }
		chain own { type filter hook output priority -400; ` + rule + `; }
	}`)
}

var countedPackets = regexp.MustCompile(`packets (\d+)`)

// lost is how many packets were dropped.
func (s *site) lost() int {
	s.Helper()
	n, err := strconv.Atoi(countedPackets.FindStringSubmatch(s.nft("list counter inet lossy lost"))[1])
	s.must(err)
	return n
}

// nft runs commands of nft on node1.
func (s *site) nft(commands string) string {
	s.Helper()
	var out []byte
	s.must(s.lab.Host("node1").Do(func() (err error) {
		if out, err = exec.Command("nft", commands).CombinedOutput(); err != nil {
			err = fmt.Errorf("nft: %w: %s", err, out)
		}
		return err
	}))
	return string(out)
}

// TestExchangeWhenARelayEnds has a node lose datagrams in a step in which
// kube-proxy replaces a relay. One is asked again; what is lost for longer, and
// what is not UDP, is a fault as ever.
func TestExchangeWhenARelayEnds(t *testing.T) {
	const one = "limit rate 1/day burst 1 packets counter name lost drop"
	for _, c := range []struct {
		loss
		asked int // again, at least
	}{
		{loss{"a datagram", "ip6 daddr " + balancerIPs.V6.String() + " udp dport 80 " + one, 1, ""}, 1},
		{loss{"an answer", "udp sport 8080 " + one, 1, ""}, 1},
		{loss{"answers without end", "udp sport 8080 counter name lost drop", 100, "asked again: "}, 1},
		{loss{"a refused datagram", "udp dport PORTS limit rate 1/day burst 1 packets counter name lost reject", 1, "connection refused"}, 0},
		{loss{"a SYN", "ip daddr " + balancerIPs.V4.String() + " tcp dport 80 tcp flags & (syn | ack) == syn " + one, 1, `1 packets were lost .*SYN, load-balancer IP IPv4`}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, svc, e := calmExchange(t)
			e.losesRelay()
			e.does("the end of the relay", func() {
				s.loses(c.loss, svc)
				s.eventually("the loss", func() error {
					if n := s.lost(); n < c.least {
						return fmt.Errorf("%d packets lost", n)
					}
					return nil
				})
				s.nft("delete table inet lossy")
			})
			end := e.now().step
			faults := strings.Join(e.faults(), "\n")
			asked := sum(end.askedAgain)
			switch {
			case c.fault == "" && (faults != "" || asked != c.asked):
				t.Errorf("%d datagrams were asked again, and there are faults: %.2000q", asked, faults)
			case asked < c.asked || !regexp.MustCompile(c.fault).MatchString(faults):
				t.Errorf("%d datagrams were asked again; no fault is %q: %.2000q", asked, c.fault, faults)
			}
		})
	}
}
