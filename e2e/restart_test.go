// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"signalbox/internal/netlab"
)

// lastingPort is no port of probes or of traffic.
const lastingPort = firstTrafficPort - 1

// openConns opens one connection of each family and protocol to the Service's
// cluster IP.
func openConns(s *site, svc *corev1.Service) []*netlab.Conn {
	s.Helper()
	pod := s.lab.Host("pod-x")
	var conns []*netlab.Conn
	everyFamilyAndProtocol(func(v6 bool, network string) {
		source := netip.AddrPortFrom(addrOf(pod, v6), lastingPort)
		c, err := pod.Open(s.Context(), network, source, netip.AddrPortFrom(clusterIP(svc, v6), 80))
		s.must(err)
		s.Cleanup(func() { c.Close() })
		conns = append(conns, c)
	})
	return conns
}

// askAll wants an answer on every connection, and returns who gave it.
func askAll(s *site, conns []*netlab.Conn) []string {
	s.Helper()
	var servers []string
	for _, c := range conns {
		ctx, cancel := context.WithTimeout(s.Context(), hangTimeout)
		a, err := c.Ask(ctx)
		cancel()
		if err != nil {
			s.Fatalf("on the connection from %s: %v", c.Local(), err)
		}
		servers = append(servers, a.Server)
	}
	return servers
}

// signalbox ends, by request or by crash, and starts again. Connections go on,
// new ones are made at any moment, and what changed meanwhile takes effect.
func TestProxyRestart(t *testing.T) {
	for name, end := range map[string]func(*site){"SIGTERM": (*site).terminate, "SIGKILL": (*site).crash} {
		t.Run(name, func(t *testing.T) {
			inEachMode(t, func(s *site) {
				steady := s.createService("steady", []string{"pod-a", "pod-c"}, asNodePort)
				moved := s.createService("moved", []string{"pod-a"})
				deleted := s.createService("deleted", []string{"pod-a"})
				s.start()
				s.reaches(steady, "pod-a", "pod-c")
				s.reaches(moved, "pod-a")
				s.reaches(deleted, "pod-a")
				conns := openConns(s, steady)
				before := askAll(s, conns)
				traffic := s.traffic(steady)

				end(s)
				askAll(s, conns)
				s.reaches(steady, "pod-a", "pod-c")
				s.reaches(moved, "pod-a")
				s.setEndpoints("moved", []string{"pod-b"})
				s.deleteService("deleted")
				created := s.createService("created", []string{"pod-c"})
				s.start()
				s.reaches(moved, "pod-b")
				s.reaches(created, "pod-c")
				s.unreachable(deleted)

				traffic.end(s)
				for i, server := range askAll(s, conns) {
					if server != before[i] {
						s.Errorf("the connection from %s was answered by %s, now by %s", conns[i].Local(), before[i], server)
					}
				}
			})
		})
	}
}

// storm is many Services whose endpoints change all the time.
const (
	stormServices = 30
	crashes       = 25
)

// Signalbox is killed at any moment of a storm of changes, also in the middle of
// writing, again and again. No connection to a Service that does not change
// fails, and in the end every other is what the API says, too.
func TestKilledInAStorm(t *testing.T) {
	inEachMode(t, func(s *site) {
		steady := createBalanced(s)
		pods := []string{"pod-a", "pod-b", "pod-c"}
		for i := range stormServices {
			s.createService(fmt.Sprintf("storm-%d", i), pods[:1+i%3], asNodePort)
		}
		s.start()
		checkBalanced(s, steady)
		e := s.exchange(steady)
		random := rand.New(rand.NewPCG(7, uint64(len(s.mode))))
		ctx, calm := context.WithCancel(s.Context())
		var storm sync.WaitGroup
		storm.Go(func() { s.storm(ctx, pods) })
		for i := range crashes {
			e.does(fmt.Sprintf("crash %d", i), func() {
				// From before the first sync to long after it.
				delay := time.NewTimer(time.Duration(random.IntN(400)) * time.Millisecond)
				select {
				case <-delay.C:
				case <-s.proxy.Done():
					s.Fatalf("signalbox ended: %v", s.proxy.Err())
				}
				s.crash()
				s.start()
			})
		}
		calm()
		storm.Wait()
		e.does("the calm after", func() {
			for i := range stormServices {
				name := fmt.Sprintf("storm-%d", i)
				s.reaches(s.service(name), s.endpointsOf(name)...)
			}
		})
		e.end()
	})
}

// storm changes the endpoints of one Service after the other until ctx ends.
func (s *site) storm(ctx context.Context, pods []string) {
	random := rand.New(rand.NewPCG(8, 8))
	for ctx.Err() == nil {
		chosen := slices.Clone(pods)
		random.Shuffle(len(chosen), func(i, j int) { chosen[i], chosen[j] = chosen[j], chosen[i] })
		s.setEndpoints(fmt.Sprintf("storm-%d", random.IntN(stormServices)), chosen[:1+random.IntN(len(chosen))])
	}
}

// A restart with nothing changed writes nothing: the kernel counts no
// transaction, and the tools' rules keep their counters.
func TestRestartWritesNothing(t *testing.T) {
	inEachMode(t, func(s *site) {
		createBalanced(s)
		svc := s.createService("other", []string{"pod-a"}, asNodePort)
		p := s.launchSignalbox(s.mode)
		s.serves(p)
		s.reaches(svc, "pod-a")
		s.terminated(p)
		before, rules := s.generation(), s.kernel()
		p = s.launchSignalbox(s.mode)
		s.serves(p)
		if now := s.generation(); now != before {
			t.Errorf("the kernel counted the transactions from %s to %s; the log says\n%s", before, now, p.Log())
		}
		if now := passing.ReplaceAllString(s.kernel(), ""); now != passing.ReplaceAllString(rules, "") {
			t.Errorf("the rules were\n%s\nand are\n%s", rules, now)
		}
		// And it is at work.
		s.setEndpoints("other", []string{"pod-b"})
		s.reaches(svc, "pod-b")
	})
}

// A new process is started beside the old one, as in an update with a surge. One
// of them writes at any time, the one that was started last; should it end
// first, the other serves again.
func TestUpgrade(t *testing.T) {
	inEachMode(t, func(s *site) {
		svc := createBalanced(s)
		moving := s.createService("moving", []string{"pod-a"})
		old := s.launchSignalbox(s.mode)
		s.serves(old)
		checkBalanced(s, svc)
		e := s.exchange(svc)
		var next *program
		e.does("a new process beside the old one", func() {
			next = s.launchSignalbox(s.mode)
			s.serves(next)
			s.setEndpoints("moving", []string{"pod-b"})
			s.reaches(moving, "pod-b")
		})
		if !strings.Contains(old.Log(), "this one is paused") {
			t.Errorf("the old process did not pause; it said\n%s", old.Tail(20))
		}
		e.does("the crash of the new process", func() {
			next.Kill()
			s.setEndpoints("moving", []string{"pod-c"})
			s.reaches(moving, "pod-c")
		})
		e.does("another try", func() {
			next = s.launchSignalbox(s.mode)
			s.serves(next)
		})
		e.does("the end of the old process", func() {
			s.terminated(old)
			s.setEndpoints("moving", []string{"pod-a"})
			s.reaches(moving, "pod-a")
		})
		e.end()
	})
}
