// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"

	"signalbox/internal/cluster"
)

// A Service has the API server's own address and port. Pods go to the Service. signalbox and
// the node's other processes go on to reach the API server, also with a new connection, and an
// Event of the Service and the log say so.
func TestServiceAtAPIServer(t *testing.T) {
	for _, mode := range []string{"nftables", "iptables", "userspace"} {
		t.Run(mode, func(t *testing.T) {
			s := newSite(t, shared, mode)
			server := netip.MustParseAddrPort(s.entrance)
			s.start()
			steady := s.createService("steady", []string{"pod-a"})
			s.reaches(steady, "pod-a")
			atServer := func(svc *corev1.Service) { svc.Spec.Ports[0].Port = int32(server.Port()) }
			for _, c := range []struct {
				what   string
				create func(name string)
			}{
				{"external-ip", func(name string) {
					s.createService(name, []string{"pod-b"}, atServer, func(svc *corev1.Service) { svc.Spec.ExternalIPs = []string{server.Addr().String()} })
				}},
				{"load-balancer-ip", func(name string) {
					svc := s.createService(name, []string{"pod-b"}, atServer, func(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeLoadBalancer })
					s.setLoadBalancerIPs(svc, server.Addr())
				}},
			} {
				c.create(c.what)
				says := "an API server is at " + s.entrance
				if e := s.event(s.namespace, "Service", c.what, "NotFullyServed"); !strings.Contains(e.Note, says) {
					t.Errorf("%s: the Event says %q", c.what, e.Note)
				}
				s.eventually(c.what+" from a Pod", func() error { return s.checkAnswers("pod-x", "tcp", server, "pod-b") })
				if err := s.asksAPIServer("node1", server); err != nil {
					t.Errorf("%s: from the node: %v", c.what, err)
				}
				// signalbox has to connect again, past the rules that are there now.
				before := s.relay.Accepted()
				s.relay.Cut()
				s.must(s.relay.Restore())
				s.setEndpoints("steady", []string{"pod-c"})
				s.reaches(steady, "pod-c")
				if s.relay.Accepted() == before {
					t.Errorf("%s: signalbox made no new connection", c.what)
				}
				if log := s.proxy.Log(); !strings.Contains(log, says) {
					t.Errorf("%s: the log does not say %q", c.what, says)
				}
				s.deleteService(c.what)
				s.eventually("the end of "+c.what, func() error { return s.asksAPIServer("pod-x", server) })
				s.setEndpoints("steady", []string{"pod-a"})
				s.reaches(steady, "pod-a")
			}
		})
	}
}

// asksAPIServer has a host ask for the API server's version at an address.
func (s *site) asksAPIServer(from string, at netip.AddrPort) error {
	config, err := shared.Config("admin", "system:masters")
	if err != nil {
		return err
	}
	config.Host = "https://" + at.String()
	config.Timeout = askPatience
	config.Dial = s.lab.Host(from).Dial
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	version, err := client.Discovery().ServerVersion()
	if err == nil && version.GitVersion != cluster.KubeVersion {
		err = fmt.Errorf("version %s", version)
	}
	return err
}
