// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"signalbox/internal/netlab"
)

// askPatience is after how long an answer is taken to be missing. Only where a
// test wants silence is it waited for in full.
const askPatience = 2 * time.Second

func addrOf(h *netlab.Host, v6 bool) netip.Addr {
	if v6 {
		return h.Addr.V6
	}
	return h.Addr.V4
}

func familyName(v6 bool) string {
	if v6 {
		return "IPv6"
	}
	return "IPv4"
}

// everyFamilyAndProtocol calls do with each of the four.
func everyFamilyAndProtocol(do func(v6 bool, network string)) {
	for _, v6 := range []bool{false, true} {
		for _, network := range []string{"tcp", "udp"} {
			do(v6, network)
		}
	}
}

// ask asks once from a host.
func (s *site) ask(from, network string, target netip.AddrPort) (netlab.Answer, error) {
	ctx, cancel := context.WithTimeout(s.Context(), askPatience)
	defer cancel()
	return s.lab.Host(from).Ask(ctx, network, netip.AddrPort{}, target)
}

// askOn asks once on a connection that is open.
func (s *site) askOn(c *netlab.Conn) (netlab.Answer, error) {
	ctx, cancel := context.WithTimeout(s.Context(), askPatience)
	defer cancel()
	return c.Ask(ctx)
}

// checkAnswers says what is wrong with who answers at target: over 16 new
// connections it must be each of the named Pods and nobody else. Sixteen
// connections miss one of two Pods by chance in one try of 32768, and then
// there is another try.
func (s *site) checkAnswers(from, network string, target netip.AddrPort, pods ...string) error {
	seen := map[string]int{}
	for range 16 {
		a, err := s.ask(from, network, target)
		if err != nil {
			return fmt.Errorf("%s from %s to %s: %w", network, from, target, err)
		}
		seen[a.Server]++
	}
	want := slices.Sorted(slices.Values(pods))
	if got := slices.Sorted(maps.Keys(seen)); !slices.Equal(got, want) {
		return fmt.Errorf("%s from %s to %s is answered by %v, want %v", network, from, target, seen, want)
	}
	return nil
}

// reaches waits until the Service's cluster IPs lead to the named Pods and
// nobody else, from a Pod and from the node, in both families and protocols.
func (s *site) reaches(svc *corev1.Service, pods ...string) {
	s.Helper()
	everyFamilyAndProtocol(func(v6 bool, network string) {
		target := netip.AddrPortFrom(clusterIP(svc, v6), 80)
		for _, from := range []string{"pod-x", "node1"} {
			s.eventually("Service "+svc.Name, func() error { return s.checkAnswers(from, network, target, pods...) })
		}
	})
}

// unreachable waits until nobody answers at the Service's cluster IPs.
func (s *site) unreachable(svc *corev1.Service) {
	s.Helper()
	everyFamilyAndProtocol(func(v6 bool, network string) {
		target := netip.AddrPortFrom(clusterIP(svc, v6), 80)
		s.eventually("the end of Service "+svc.Name, func() error {
			if a, err := s.ask("pod-x", network, target); err == nil {
				return fmt.Errorf("%s %s is answered by %s", network, target, a)
			}
			return nil
		})
	})
}

// sees waits until the Pods behind target see connections from a host come
// from the wanted address.
func (s *site) sees(from, network string, target netip.AddrPort, want netip.Addr) {
	s.Helper()
	s.eventually("source address", func() error {
		a, err := s.ask(from, network, target)
		if err == nil && a.Seen.Addr() != want {
			err = fmt.Errorf("%s %s to %s: answered by %s, want the source address %s", from, network, target, a, want)
		}
		return err
	})
}

// traffic opens connections all the time and remembers what went wrong.
type traffic struct {
	stop    context.CancelFunc
	streams sync.WaitGroup

	mu      sync.Mutex
	count   int
	slowest time.Duration
	failed  []string
}

// traffic starts new TCP connections to a NodePort Service from a Pod, the node and a
// client outside, which uses the node port, until it is ended.
func (s *site) traffic(svc *corev1.Service) *traffic {
	s.Helper()
	ctx, cancel := context.WithCancel(s.Context())
	t := &traffic{stop: cancel}
	s.Cleanup(cancel)
	nodePort := uint16(svc.Spec.Ports[0].NodePort)
	for _, v6 := range []bool{false, true} {
		for from, target := range map[string]netip.AddrPort{
			"pod-x":   netip.AddrPortFrom(clusterIP(svc, v6), 80),
			"node1":   netip.AddrPortFrom(clusterIP(svc, v6), 80),
			"client1": netip.AddrPortFrom(addrOf(s.lab.Host("node1"), v6), nodePort),
		} {
			t.streams.Go(func() { t.run(ctx, s.lab.Host(from), target) })
		}
	}
	return t
}

// Traffic uses source ports that the probes of eventually, which get theirs
// from the kernel, do not. A probe that came before the Service did has left a
// connection-tracking entry without translation, and the kernel looks at no
// rule for any packet of the same address and port while that entry lives.
const (
	firstTrafficPort = 11000
	trafficPorts     = 9000 // so that one comes again after its TIME-WAIT only
)

// run counts a connection as failed only when the kernel says so or nothing
// comes for very long: a lost packet that is sent again is not a failure.
func (t *traffic) run(ctx context.Context, from *netlab.Host, target netip.AddrPort) {
	source := addrOf(from, target.Addr().Is6())
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		start := time.Now()
		one, cancel := context.WithTimeout(ctx, time.Minute)
		_, err := from.Ask(one, "tcp", netip.AddrPortFrom(source, uint16(firstTrafficPort+i%trafficPorts)), target)
		cancel()
		if ctx.Err() != nil {
			return
		}
		t.mu.Lock()
		t.count++
		t.slowest = max(t.slowest, time.Since(start))
		if err != nil {
			t.failed = append(t.failed, fmt.Sprintf("%s %s to %s: %v", start.Format(time.TimeOnly), from.Name, target, err))
		}
		t.mu.Unlock()
	}
}

// end stops the traffic and fails the test if one connection failed.
func (t *traffic) end(s *site) {
	s.Helper()
	t.stop()
	t.streams.Wait()
	s.Logf("%d connections meanwhile, the slowest took %v", t.count, t.slowest)
	if t.count == 0 {
		s.Error("there was no traffic")
	}
	for _, f := range t.failed[:min(len(t.failed), 10)] {
		s.Error(f)
	}
	if len(t.failed) > 0 {
		s.Errorf("%d of %d connections failed", len(t.failed), t.count)
	}
}
