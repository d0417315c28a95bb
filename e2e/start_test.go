// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"signalbox/internal/netlab"
)

func asNodePort(svc *corev1.Service)     { svc.Spec.Type = corev1.ServiceTypeNodePort }
func asLoadBalancer(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeLoadBalancer }

var balancerIPs = netlab.Pair{V4: netlab.ExternalNetwork.V4.Addr().Next(), V6: netlab.ExternalNetwork.V6.Addr().Next()}

// createBalanced makes a Service that is reached in every way there is.
func createBalanced(s *site) *corev1.Service {
	s.Helper()
	svc := s.createService("web", []string{"pod-a", "pod-c"}, asLoadBalancer)
	s.setLoadBalancerIPs(svc, balancerIPs.V4, balancerIPs.V6)
	return svc
}

// checkBalanced wants both endpoints at every frontend of createBalanced's
// Service, and the source addresses that its traffic policies promise.
func checkBalanced(s *site, svc *corev1.Service) {
	s.Helper()
	s.reaches(svc, "pod-a", "pod-c")
	everyFamilyAndProtocol(func(v6 bool, network string) {
		ports := map[string]int32{"tcp": svc.Spec.Ports[0].NodePort, "udp": svc.Spec.Ports[1].NodePort}
		node := addrOf(s.lab.Host("node1"), v6)
		balancer := balancerIPs.V4
		if v6 {
			balancer = balancerIPs.V6
		}
		nodePort := netip.AddrPortFrom(node, uint16(ports[network]))
		for _, target := range []netip.AddrPort{nodePort, netip.AddrPortFrom(balancer, 80)} {
			s.eventually("from outside", func() error { return s.checkAnswers("client1", network, target, "pod-a", "pod-c") })
		}
		s.sees("pod-x", network, netip.AddrPortFrom(clusterIP(svc, v6), 80), addrOf(s.lab.Host("pod-x"), v6))
		s.eventually("masquerading", func() error {
			a, err := s.ask("client1", network, nodePort)
			if err != nil {
				return err
			}
			// Towards a Pod of its own the node may use any of its addresses.
			addrs, err := s.lab.Host("node1").Addrs()
			if err != nil {
				return err
			}
			for _, own := range addrs {
				if a.Seen.Addr() == own {
					return nil
				}
			}
			return fmt.Errorf("%s, which is not an address of the node", a)
		})
	})
}

func TestStartAfterObjectsExist(t *testing.T) {
	inEachMode(t, func(s *site) {
		svc := createBalanced(s)
		s.start()
		checkBalanced(s, svc)
	})
}

func TestStartBeforeObjectsExist(t *testing.T) {
	inEachMode(t, func(s *site) {
		s.start()
		// A Service that is there shows that the start is over.
		first := s.createService("first", []string{"pod-b"})
		s.reaches(first, "pod-b")
		checkBalanced(s, createBalanced(s))
	})
}

// Pods and the node send before signalbox has started, as at a boot. What they
// go on sending from the same port must arrive once it has.
func TestFlowOlderThanStart(t *testing.T) {
	inEachMode(t, func(s *site) {
		svc := s.createService("web", []string{"pod-a", "pod-c"})
		flows := map[string]*netlab.Conn{}
		for _, from := range []string{"pod-x", "node1"} {
			for _, v6 := range []bool{false, true} {
				c, err := s.lab.Host(from).Open(s.Context(), "udp", netip.AddrPort{}, netip.AddrPortFrom(clusterIP(svc, v6), 80))
				s.must(err)
				s.Cleanup(func() { c.Close() })
				if a, err := s.askOn(c); err == nil {
					s.Fatalf("%s answered before signalbox was started", a)
				}
				flows[from+", "+familyName(v6)] = c
			}
		}
		s.start()
		for name, c := range flows {
			s.eventually("the flow from "+name, func() error {
				_, err := s.askOn(c)
				return err
			})
		}
	})
}

// The API server is down when the node boots. signalbox waits for it, and does
// not need to be started again.
func TestStartWithoutAPIServer(t *testing.T) {
	inEachMode(t, func(s *site) {
		svc := createBalanced(s)
		s.must(shared.StopAPIServer())
		s.start()
		s.eventually("a few attempts", func() error {
			if n := s.relay.Accepted(); n < 3 {
				return fmt.Errorf("%d connections", n)
			}
			return nil
		})
		s.must(shared.StartAPIServer(s.Context()))
		checkBalanced(s, svc)
	})
}

// A node boots again while the API server is away. It serves the state that it saved, and
// says so. Later it follows the API server again.
func TestRebootWithoutAPIServer(t *testing.T) {
	inEachMode(t, func(s *site) {
		dir := s.TempDir()
		balanced := createBalanced(s)
		s.start("--state-dir", dir)
		checkBalanced(s, balanced)
		s.eventually("the saved state", func() error {
			_, services := os.Stat(filepath.Join(dir, "services.state"))
			_, endpoints := os.Stat(filepath.Join(dir, "endpointslices.state"))
			return errors.Join(services, endpoints)
		})
		s.terminate()

		s.relay.Cut()
		s.nft("flush ruleset")
		s.start("--state-dir", dir)
		checkBalanced(s, balanced)
		health := func(want bool) func() error {
			return func() error {
				r, err := s.get("node1", healthURL+"/healthz")
				if says := strings.Contains(r.body, "serves the saved state"); err == nil && says != want {
					err = fmt.Errorf("health says %s", r.body)
				}
				return err
			}
		}
		s.eventually("health of a node with a saved state", health(true))

		s.setEndpoints("web", []string{"pod-b"})
		s.must(s.relay.Restore())
		s.reaches(balanced, "pod-b")
		s.eventually("health of a node without one", health(false))
	})
}

// What signalbox asks of the API server is what kube-proxy's ClusterRole
// allows, which is all that its user is bound to: nothing is refused.
func TestNodeProxierSuffices(t *testing.T) {
	inEachMode(t, func(s *site) {
		before, err := shared.Requests()
		s.must(err)
		s.start()
		s.reaches(s.createService("web", []string{"pod-a"}), "pod-a")
		watched := map[string]bool{"services": false, "endpointslices.discovery.k8s.io": false, "nodes": false, "servicecidrs.networking.k8s.io": false}
		s.eventually("the four watches", func() error {
			requests, err := shared.Requests()
			s.must(err)
			for _, r := range requests[len(before):] {
				if r.Code >= 400 {
					s.Fatalf("%+v", r)
				}
				if r.Verb == "watch" {
					watched[r.Resource] = true
				}
				if r.Resource == "nodes" && !strings.Contains(r.URI, "node1") {
					s.Fatalf("every node asking for all nodes is too much for a cluster: %+v", r)
				}
			}
			for resource, ok := range watched {
				if !ok {
					return fmt.Errorf("no watch of %s in %+v", resource, requests[len(before):])
				}
			}
			return nil
		})
	})
}
