// SPDX-License-Identifier: Apache-2.0

//go:build kind

package kind

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestModes brings the cluster to one mode after the other, each from the one
// before, and asks of each the same.
func TestModes(t *testing.T) {
	s := newSite(t)
	if s.kubeProxyDaemonSet() != nil {
		t.Skip("the cluster has a kube-proxy: it is for TestMigration")
	}
	s.populate()
	t.Cleanup(func() {
		s.depopulate()
		s.undeploy()
	})
	before := ""
	for _, mode := range strings.Fields(setting("MODES", "nftables userspace iptables")) {
		s.run(mode, func(s *site) {
			s.Cleanup(s.report)
			if before == "" {
				s.deploy(mode, before)
			} else {
				s.run("switch under load", func(s *site) { s.underLoad(before, mode, func() { s.deploy(mode, before) }) })
			}
			before = mode
			s.run("says its mode", func(s *site) { s.saysMode(mode) })
			s.run("ClusterIP", (*site).testClusterIP)
			s.run("NodePort", (*site).testNodePort)
			s.run("LoadBalancer with policy Local", (*site).testLoadBalancer)
			s.run("affinity", (*site).testAffinity)
			s.run("hairpin", (*site).testHairpin)
			s.run("no endpoint", (*site).testNoEndpoint)
			s.run("an endpoint comes and goes", (*site).testEndpointChange)
			s.run("cluster DNS", (*site).testDNS)
			s.run("rolling restart under load", func(s *site) { s.underLoad(mode, mode, s.restart) })
			if mode != relay {
				s.run("a kill under load", func(s *site) { s.underLoad(mode, mode, func() { s.kill(s.workers[1].name) }) })
			}
			s.noErrors()
		})
	}
}

// relay is the mode in which connections pass through the process: they end
// with it, at once where it is killed.
const relay = "userspace"

// fresh makes a Service for one subtest.
func (s *site) fresh(name string, labels map[string]string, change func(*corev1.ServiceSpec)) *corev1.Service {
	s.Helper()
	svc := s.createService(name, labels, change)
	s.Cleanup(func() {
		err := s.client.CoreV1().Services(playground).Delete(context.WithoutCancel(s.Context()), name, metav1.DeleteOptions{})
		if err != nil {
			s.Error(err)
		}
	})
	return svc
}

func (s *site) saysMode(mode string) {
	s.eventually("/proxyMode", func(ctx context.Context) error {
		a, err := s.dial(ctx, nodeClient, "tcp", "127.0.0.1", 10249, "proxyMode", 1)
		if err != nil {
			return err
		}
		if len(a.Responses) != 1 || a.Responses[0] != mode {
			return fmt.Errorf("%+v", a)
		}
		return nil
	})
}

func (s *site) testClusterIP() {
	svc := s.fresh("web", bothServers, nil)
	s.eachFamily(func(s *site, v6 bool) {
		for _, from := range []string{client, serverB, nodeClient} {
			for _, network := range []string{"tcp", "udp"} {
				s.reaches(from, network, clusterIP(svc, v6), 80, serverA, serverB)
			}
		}
	})
}

func (s *site) testNodePort() {
	svc := s.fresh("web", bothServers, func(spec *corev1.ServiceSpec) { spec.Type = corev1.ServiceTypeNodePort })
	ports := map[string]int32{"tcp": svc.Spec.Ports[0].NodePort, "udp": svc.Spec.Ports[1].NodePort}
	s.eachFamily(func(s *site, v6 bool) {
		for network, port := range ports {
			for _, n := range s.workers {
				at := n.addr(s.T, v6)
				s.reaches(client, network, at.String(), port, serverA, serverB)
				s.outsideReaches(network, netip.AddrPortFrom(at, uint16(port)), serverA, serverB)
			}
		}
	})
}

// testLoadBalancer has its only endpoint on the first worker. A client outside
// is sent there alone, and seen there with its own address; Pods and nodes reach
// it from everywhere.
func (s *site) testLoadBalancer() {
	svc := s.fresh("balanced", onlyA, func(spec *corev1.ServiceSpec) {
		spec.Type, spec.ExternalTrafficPolicy = corev1.ServiceTypeLoadBalancer, corev1.ServiceExternalTrafficPolicyLocal
	})
	svc = s.balanced(svc)
	s.eachFamily(func(s *site, v6 bool) {
		vip := ingress(svc, v6)
		for _, network := range []string{"tcp", "udp"} {
			for _, from := range []string{client, serverB, nodeClient} {
				s.reaches(from, network, vip.String(), 80, serverA)
			}
			s.seesClient(network, netip.AddrPortFrom(s.workers[0].addr(s.T, v6), uint16(nodePort(svc, network))))
			if setting("LOAD_BALANCER", "") != "" {
				s.outsideReaches(network, netip.AddrPortFrom(vip, 80), serverA)
				s.seesClient(network, netip.AddrPortFrom(vip, 80))
			}
		}
		s.healthCheck(s.workers[0].addr(s.T, v6), svc.Spec.HealthCheckNodePort, http.StatusOK)
		s.healthCheck(s.workers[1].addr(s.T, v6), svc.Spec.HealthCheckNodePort, http.StatusServiceUnavailable)
	})
}

// balanced waits for the load balancer's addresses, or makes some up where the
// cluster has nothing that gives them out.
func (s *site) balanced(svc *corev1.Service) *corev1.Service {
	s.Helper()
	services := s.client.CoreV1().Services(playground)
	if setting("LOAD_BALANCER", "") == "" {
		for _, ip := range map[bool][]string{true: {"203.0.113.80", "2001:db8:113::80"}, false: {"203.0.113.80"}}[len(svc.Spec.ClusterIPs) > 1] {
			svc.Status.LoadBalancer.Ingress = append(svc.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip})
		}
		svc, err := services.UpdateStatus(s.Context(), svc, metav1.UpdateOptions{})
		s.must(err)
		return svc
	}
	s.eventually("the load balancer's addresses", func(ctx context.Context) (err error) {
		if svc, err = services.Get(ctx, svc.Name, metav1.GetOptions{}); err == nil && len(svc.Status.LoadBalancer.Ingress) < len(svc.Spec.ClusterIPs) {
			err = fmt.Errorf("%+v", svc.Status)
		}
		return err
	})
	return svc
}

func ingress(svc *corev1.Service, v6 bool) netip.Addr {
	for _, in := range svc.Status.LoadBalancer.Ingress {
		if a, err := netip.ParseAddr(in.IP); err == nil && a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

func nodePort(svc *corev1.Service, network string) int32 {
	for _, p := range svc.Spec.Ports {
		if p.Name == network {
			return p.NodePort
		}
	}
	return 0
}

func (s *site) healthCheck(at netip.Addr, port int32, want int) {
	s.Helper()
	s.eventually(fmt.Sprintf("%d from the health check at %s", want, at), func(ctx context.Context) error {
		status, body, err := get(ctx, "http://"+net.JoinHostPort(at.String(), strconv.Itoa(int(port)))+"/")
		if err == nil && status != want {
			err = fmt.Errorf("%d %s", status, body)
		}
		return err
	})
}

func (s *site) testAffinity() {
	svc := s.fresh("sticky", bothServers, func(spec *corev1.ServiceSpec) { spec.SessionAffinity = corev1.ServiceAffinityClientIP })
	s.eachFamily(func(s *site, v6 bool) {
		for _, network := range []string{"tcp", "udp"} {
			s.eventually("one server for all", func(ctx context.Context) error {
				a, err := s.dial(ctx, client, network, clusterIP(svc, v6), 80, "hostname", 20)
				if err != nil {
					return err
				}
				if len(a.Errors) > 0 || len(a.Responses) == 0 {
					return fmt.Errorf("%q", a.Errors)
				}
				for _, r := range a.Responses {
					if r != a.Responses[0] {
						return never("%v", a.Responses)
					}
				}
				return nil
			})
		}
	})
}

// testHairpin has a Pod reach itself.
func (s *site) testHairpin() {
	svc := s.fresh("self", onlyA, nil)
	s.eachFamily(func(s *site, v6 bool) {
		for _, network := range []string{"tcp", "udp"} {
			s.reaches(serverA, network, clusterIP(svc, v6), 80, serverA)
		}
	})
}

func (s *site) testNoEndpoint() {
	svc := s.fresh("empty", map[string]string{"nobody": "yes"}, nil)
	s.eachFamily(func(s *site, v6 bool) {
		s.eventually("a refusal", func(ctx context.Context) error {
			a, err := s.dial(ctx, client, "tcp", clusterIP(svc, v6), 80, "hostname", 1)
			if err == nil && (len(a.Responses) > 0 || !strings.Contains(strings.Join(a.Errors, " "), "refused")) {
				err = fmt.Errorf("%+v", a)
			}
			return err
		})
	})
}

func (s *site) testEndpointChange() {
	svc := s.fresh("web", bothServers, nil)
	const third = "server-c"
	s.createPod(third, s.workers[1].name, map[string]string{"server": "yes"})
	s.podReady(third)
	s.eachFamily(func(s *site, v6 bool) {
		s.reaches(client, "tcp", clusterIP(svc, v6), 80, serverA, serverB, third)
		s.reaches(client, "udp", clusterIP(svc, v6), 80, serverA, serverB, third)
	})
	s.must(s.client.CoreV1().Pods(playground).Delete(s.Context(), third, metav1.DeleteOptions{}))
	s.eachFamily(func(s *site, v6 bool) {
		s.reaches(client, "tcp", clusterIP(svc, v6), 80, serverA, serverB)
		s.reaches(client, "udp", clusterIP(svc, v6), 80, serverA, serverB)
	})
}

// testDNS has a Pod find a Service by its name, which takes the DNS Service.
func (s *site) testDNS() {
	s.fresh("web", bothServers, nil)
	s.reaches(client, "tcp", "web."+playground+".svc.cluster.local", 80, serverA, serverB)
}
