// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"signalbox/internal/netlab"
)

func TestServiceChanges(t *testing.T) {
	inEachMode(t, func(s *site) {
		s.start()
		other := s.createService("other", []string{"pod-b"})
		svc := s.createService("web", []string{"pod-a", "pod-c"})
		s.reaches(svc, "pod-a", "pod-c")
		s.setEndpoints("web", []string{"pod-c"})
		s.reaches(svc, "pod-c")
		s.setEndpoints("web", nil)
		everyFamilyAndProtocol(func(v6 bool, network string) {
			s.eventually("rejection", func() error { return s.refused("pod-x", network, netip.AddrPortFrom(clusterIP(svc, v6), 80)) })
		})
		s.setEndpoints("web", []string{"pod-a"})
		s.reaches(svc, "pod-a")
		s.deleteService("web")
		s.unreachable(svc)
		s.reaches(other, "pod-b")
	})
}

// refused says what came back, if not that nobody listens.
func (s *site) refused(from, network string, target netip.AddrPort) error {
	a, err := s.ask(from, network, target)
	if outcome := netlab.OutcomeOf(err); outcome != netlab.Refused {
		return fmt.Errorf("%s from %s to %s: %s (%v, %v)", network, from, target, outcome, a, err)
	}
	return nil
}

// A Service gets its second family while it is in use.
func TestServiceBecomesDualStack(t *testing.T) {
	inEachMode(t, func(s *site) {
		s.start()
		s.createService("web", []string{"pod-a", "pod-c"}, func(svc *corev1.Service) {
			svc.Spec.IPFamilyPolicy = ptr(corev1.IPFamilyPolicySingleStack)
			svc.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv6Protocol}
		})
		svc := s.updateService("web", func(svc *corev1.Service) {
			svc.Spec.IPFamilyPolicy = ptr(corev1.IPFamilyPolicyRequireDualStack)
		})
		s.reaches(svc, "pod-a", "pod-c")
	})
}

// A Service is given to another proxy, by a label, and taken back. The API
// server filters by it, so to signalbox the Service goes and comes.
func TestServiceOfAnotherProxy(t *testing.T) {
	inEachMode(t, func(s *site) {
		const label = "service.kubernetes.io/service-proxy-name"
		s.start()
		svc := s.createService("web", []string{"pod-a"})
		s.reaches(svc, "pod-a")
		s.updateService("web", func(svc *corev1.Service) { svc.Labels = map[string]string{label: "another"} })
		s.unreachable(svc)
		s.updateService("web", func(svc *corev1.Service) { delete(svc.Labels, label) })
		s.reaches(svc, "pod-a")
	})
}

// A range is added to those that cluster IPs are given from. In nftables mode
// addresses of it that no Service has lead nowhere from then on.
func TestServiceCIDRAdded(t *testing.T) {
	inEachMode(t, func(s *site) {
		s.start()
		s.reaches(s.createService("first", []string{"pod-b"}), "pod-b")
		// Another host has an address in the range, by accident.
		elsewhere := netip.AddrPortFrom(netip.MustParseAddr("10.97.7.7"), 8080)
		stranger := s.lab.Host("node2")
		s.must(stranger.AddAddr(elsewhere.Addr()))
		s.must(stranger.Serve(elsewhere))
		s.must(s.lab.RouteVIP(netip.PrefixFrom(elsewhere.Addr(), 32), stranger.Name))
		s.eventually("the stranger", func() error { return s.checkAnswers("pod-x", "tcp", elsewhere, stranger.Name) })

		s.createServiceCIDR("second", netlab.ServiceNetwork2)
		var svc *corev1.Service
		s.eventually("the API server's use of the range", func() (err error) {
			svc, err = s.tryCreateService("web", func(svc *corev1.Service) {
				svc.Spec.ClusterIP = "10.97.0.10"
				svc.Spec.ClusterIPs = []string{"10.97.0.10", "fd00:10:97::10"}
			})
			return err
		})
		s.setEndpoints("web", []string{"pod-a", "pod-c"})
		s.reaches(svc, "pod-a", "pod-c")
		if s.mode == "nftables" {
			s.eventually("dropping", func() error {
				a, err := s.ask("pod-x", "tcp", elsewhere)
				if outcome := netlab.OutcomeOf(err); outcome != netlab.Silent {
					return fmt.Errorf("%s: %s (%v, %v)", elsewhere, outcome, a, err)
				}
				return nil
			})
		}
	})
}

func (o *objects) createServiceCIDR(name string, network netlab.PrefixPair) {
	o.t.Helper()
	cidrs := o.client.NetworkingV1().ServiceCIDRs()
	_, err := cidrs.Create(o.t.Context(), &networkingv1.ServiceCIDR{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       networkingv1.ServiceCIDRSpec{CIDRs: []string{network.V4.String(), network.V6.String()}},
	}, metav1.CreateOptions{})
	o.must(err)
	o.t.Cleanup(func() {
		// Without its range the API server could not take a cluster IP back,
		// and no controller keeps a range that is in use.
		err := errors.Join(o.deleteAll(context.Background()), cidrs.Delete(context.Background(), name, metav1.DeleteOptions{}))
		if err != nil {
			o.t.Errorf("cleaning up: %v", err)
		}
	})
}

const manyServices = 1000

// A thousand Services are created as fast as the API server takes them. Each
// must lead to its own endpoint, and be in the kernel.
func TestThousandServices(t *testing.T) {
	inEachMode(t, func(s *site) {
		s.start()
		s.reaches(s.createService("first", []string{"pod-b"}), "pod-b")

		pods := []string{"pod-a", "pod-c"}
		services := make([]*corev1.Service, manyServices)
		start := time.Now()
		s.must(inParallel(manyServices, func(i int) (err error) {
			services[i], err = s.createSmallService("many-"+strconv.Itoa(i), pods[i%len(pods)])
			return err
		}))
		created := time.Now()
		for i, svc := range services {
			target := netip.AddrPortFrom(clusterIP(svc, false), 80)
			s.eventually("Service "+svc.Name, func() error {
				a, err := s.ask("pod-x", "tcp", target)
				if err == nil && a.Server != pods[i%len(pods)] {
					err = fmt.Errorf("%s is answered by %s, want %s", target, a, pods[i%len(pods)])
				}
				return err
			})
		}
		s.Logf("%d Services with a slice each were created in %v; all were reached %v after that",
			manyServices, created.Sub(start).Round(time.Millisecond), time.Since(created).Round(time.Millisecond))

		s.Logf("signalbox's memory: %s", s.memory())

		written := s.wordsInKernel()
		for _, svc := range services {
			if !written[svc.Spec.ClusterIP] {
				s.Errorf("%s of Service %s is not in the kernel", svc.Spec.ClusterIP, svc.Name)
			}
		}
		s.must(s.deleteAll(s.Context()))
		s.eventually("an empty kernel", func() error {
			left := 0
			written := s.wordsInKernel()
			for _, svc := range services {
				if written[svc.Spec.ClusterIP] {
					left++
				}
			}
			if left > 0 {
				return fmt.Errorf("%d Services are still in the kernel", left)
			}
			return nil
		})
	})
}

// createSmallService is IPv4 with one TCP port, and may be called from many
// goroutines.
func (o *objects) createSmallService(name, pod string) (*corev1.Service, error) {
	svc := newService(name)
	svc.Spec.IPFamilyPolicy = ptr(corev1.IPFamilyPolicySingleStack)
	svc.Spec.Ports = svc.Spec.Ports[:1]
	slice := o.newSlice(name, discoveryv1.AddressTypeIPv4, []string{pod})
	slice.Ports = slice.Ports[:1]
	if _, err := o.client.DiscoveryV1().EndpointSlices(o.namespace).Create(o.t.Context(), slice, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	svc, err := o.client.CoreV1().Services(o.namespace).Create(o.t.Context(), svc, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		err = fmt.Errorf("%s: %w", name, err)
	}
	return svc, err
}

// wordsInKernel is the set of addresses and other words in what the kernel
// holds, without prefix lengths.
func (s *site) wordsInKernel() map[string]bool {
	s.Helper()
	words := map[string]bool{}
	for word := range strings.FieldsFuncSeq(s.kernel(), func(r rune) bool { return strings.ContainsRune(" \t\n/,{}", r) }) {
		words[word] = true
	}
	return words
}
