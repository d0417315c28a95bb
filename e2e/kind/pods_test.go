// SPDX-License-Identifier: Apache-2.0

//go:build kind

package kind

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
)

// playground is the namespace of what the tests make.
const playground = "signalbox-kind"

// The ports that agnhost's netexec listens at; on a node's own network others,
// which nobody else there has.
const (
	podPort, podUDPPort   = 8080, 8081
	hostPort, hostUDPPort = 28080, 28081
)

// The Pods: one server on each of two workers, and on the first worker a
// client and one on the node's own network.
const (
	serverA, serverB, client, nodeClient = "server-a", "server-b", "client", "node-client"
)

// populate makes the playground anew.
func (s *site) populate() {
	s.Helper()
	s.depopulate()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: playground, Labels: map[string]string{
		"pod-security.kubernetes.io/enforce": "privileged",
	}}}
	s.eventually("the namespace", func(ctx context.Context) error {
		_, err := s.client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{})
		return err
	})
	s.eventually("its service account", func(ctx context.Context) error {
		_, err := s.client.CoreV1().ServiceAccounts(playground).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	s.createPod(serverA, s.workers[0].name, map[string]string{"server": "yes", "name": serverA})
	s.createPod(serverB, s.workers[1].name, map[string]string{"server": "yes", "name": serverB})
	s.createPod(client, s.workers[0].name, nil)
	s.createPod(nodeClient, s.workers[0].name, nil)
	for _, name := range []string{serverA, serverB, client, nodeClient} {
		s.podReady(name)
	}
}

func (s *site) depopulate() {
	ctx := context.WithoutCancel(s.Context())
	err := s.client.CoreV1().Namespaces().Delete(ctx, playground, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		s.Error(err)
	}
}

func (s *site) createPod(name, on string, labels map[string]string) {
	s.Helper()
	http, udp, own := podPort, podUDPPort, name == nodeClient
	if own {
		http, udp = hostPort, hostUDPPort
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
		Spec: corev1.PodSpec{
			NodeName: on, HostNetwork: own, TerminationGracePeriodSeconds: ptr.To[int64](1),
			Containers: []corev1.Container{{
				Name: "agnhost", Image: setting("AGNHOST_IMAGE", "registry.k8s.io/e2e-test-images/agnhost:2.53"),
				Args: []string{"netexec", "--http-port=" + strconv.Itoa(http), "--udp-port=" + strconv.Itoa(udp)},
				ReadinessProbe: &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{
					HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(int32(http))},
				}},
			}},
		},
	}
	_, err := s.client.CoreV1().Pods(playground).Create(s.Context(), pod, metav1.CreateOptions{})
	s.must(err)
}

func (s *site) podReady(name string) *corev1.Pod {
	s.Helper()
	var pod *corev1.Pod
	s.eventually(name, func(ctx context.Context) (err error) {
		if pod, err = s.client.CoreV1().Pods(playground).Get(ctx, name, metav1.GetOptions{}); err != nil {
			return err
		}
		for _, c := range pod.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("not ready: %+v", pod.Status)
	})
	return pod
}

// createService makes one for TCP and UDP of all the cluster's families, with
// the servers that labels select as endpoints.
func (s *site) createService(name string, labels map[string]string, change func(*corev1.ServiceSpec)) *corev1.Service {
	s.Helper()
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.ServiceSpec{
			Selector: labels, IPFamilyPolicy: ptr.To(corev1.IPFamilyPolicyPreferDualStack),
			Ports: []corev1.ServicePort{
				{Name: "tcp", Port: 80, TargetPort: intstr.FromInt32(podPort), Protocol: corev1.ProtocolTCP},
				{Name: "udp", Port: 80, TargetPort: intstr.FromInt32(podUDPPort), Protocol: corev1.ProtocolUDP},
			},
		},
	}
	if change != nil {
		change(&svc.Spec)
	}
	svc, err := s.client.CoreV1().Services(playground).Create(s.Context(), svc, metav1.CreateOptions{})
	s.must(err)
	return svc
}

var bothServers, onlyA = map[string]string{"server": "yes"}, map[string]string{"name": serverA}

func clusterIP(svc *corev1.Service, v6 bool) string {
	for _, ip := range svc.Spec.ClusterIPs {
		if strings.Contains(ip, ":") == v6 {
			return ip
		}
	}
	return ""
}

// answers are what a Pod got that asked some times over, each time from
// another port.
type answers struct {
	Responses []string
	Errors    []string
}

// dial makes a Pod ask by TCP (HTTP) or UDP. Its own answer comes back through
// the API server, by no Service.
func (s *site) dial(ctx context.Context, from, network, host string, port int32, request string, tries int) (answers, error) {
	at := podPort
	if from == nodeClient {
		at = hostPort
	}
	protocol := map[string]string{"tcp": "http", "udp": "udp"}[network]
	text, err := s.client.CoreV1().RESTClient().Get().Namespace(playground).Resource("pods").
		Name(fmt.Sprintf("%s:%d", from, at)).SubResource("proxy").Suffix("dial").
		Param("host", host).Param("port", strconv.Itoa(int(port))).Param("protocol", protocol).
		Param("request", request).Param("tries", strconv.Itoa(tries)).
		DoRaw(ctx)
	if err != nil {
		return answers{}, err
	}
	var a answers
	return a, json.Unmarshal(text, &a)
}

// reaches wants a Pod to get answers from these servers and no others, and
// never none.
func (s *site) reaches(from, network, host string, port int32, servers ...string) {
	s.Helper()
	slices.Sort(servers)
	s.eventually(fmt.Sprintf("%s to %s port %d by %s", from, host, port, network), func(ctx context.Context) error {
		a, err := s.dial(ctx, from, network, host, port, "hostname", 20)
		if err != nil {
			return err
		}
		got := slices.Compact(slices.Sorted(slices.Values(a.Responses)))
		if len(a.Errors) > 0 || !slices.Equal(got, servers) {
			return fmt.Errorf("%d answers from %v, want %v; %q", len(a.Responses), got, servers, a.Errors)
		}
		return nil
	})
}
