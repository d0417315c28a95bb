package e2e

import (
	"context"
	"net/netip"
	"testing"

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
		ctx, cancel := context.WithTimeout(s.Context(), patience)
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
