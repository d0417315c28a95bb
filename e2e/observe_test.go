// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"signalbox/internal/cluster"
	"signalbox/internal/netlab"
)

// reply is an HTTP answer.
type reply struct {
	status int
	header http.Header
	body   string
}

// get asks an HTTP server from a host of the lab.
func (s *site) get(from, url string) (reply, error) {
	client := s.lab.Host(from).Client()
	defer client.CloseIdleConnections()
	resp, err := client.Get(url)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, string(body)}, err
}

const (
	healthURL  = "http://127.0.0.1:10256"
	metricsURL = "http://127.0.0.1:10249"
)

// startKubeProxy runs the proxy that signalbox replaces in its stead. It leaves
// the settings of connection tracking alone, which are the whole machine's.
func (s *site) startKubeProxy(flags ...string) {
	s.Helper()
	args := append([]string{
		"--kubeconfig", s.kubeconfig, "--hostname-override", "node1", "--proxy-mode", s.mode,
		"--cluster-cidr", netlab.PodNetwork.V4.String() + "," + netlab.PodNetwork.V6.String(),
		"--conntrack-max-per-core=0", "--conntrack-min=0", "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s",
		"--oom-score-adj=0", "--v=2",
	}, flags...)
	var err error
	s.proxy, err = cluster.StartProcess(exec.Command(binaries.KubeProxy, args...), filepath.Join(s.TempDir(), "kube-proxy.log"), s.lab.Host("node1").Do)
	s.must(err)
}

// exercise has a proxy do what its series are about: an endpoint of UDP goes, a
// Service with policy Local has none here, and its health is asked for.
func (s *site) exercise() {
	s.Helper()
	s.eventually("the health server", func() error {
		_, err := s.get("node1", healthURL+"/livez")
		return err
	})
	svc := s.createService("web", []string{"pod-a", "pod-c"}, asNodePort)
	s.reaches(svc, "pod-a", "pod-c")
	s.createService("far", []string{"pod-c"}, asNodePort, func(svc *corev1.Service) {
		svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		svc.Spec.InternalTrafficPolicy = ptr(corev1.ServiceInternalTrafficPolicyLocal)
	})
	for _, family := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		slice := s.newSlice("web", family, []string{"pod-c"})
		slice.Annotations = map[string]string{corev1.EndpointsLastChangeTriggerTime: time.Now().Format(time.RFC3339Nano)}
		s.must(s.applySlice(slice))
	}
	s.reaches(svc, "pod-c")
	for _, path := range []string{"/healthz", "/livez"} {
		if _, err := s.get("node1", healthURL+path); err != nil {
			s.Fatal(err)
		}
	}
}

// scrape returns the series that are exposed, by name.
func (s *site) scrape() map[string]*dto.MetricFamily {
	s.Helper()
	r, err := s.get("node1", metricsURL+"/metrics")
	s.must(err)
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(r.body))
	s.must(err)
	return families
}

// scrapeOnce waits until the series that come with a sync and after it are
// there.
func (s *site) scrapeOnce() (families map[string]*dto.MetricFamily) {
	s.Helper()
	s.eventually("series", func() error {
		families = s.scrape()
		for _, name := range []string{"kubeproxy_network_programming_duration_seconds", "kubeproxy_conntrack_reconciler_sync_duration_seconds"} {
			if f := families[name]; f == nil || len(f.Metric) < 2 {
				return fmt.Errorf("%s: %v", name, f)
			}
		}
		return nil
	})
	return families
}

// shape is what a dashboard depends on: the type, the names of the labels, the
// values of those that are not free, and the buckets.
func shape(f *dto.MetricFamily) string {
	labels, buckets := map[string]bool{}, map[float64]bool{}
	for _, m := range f.Metric {
		for _, l := range m.Label {
			labels[l.GetName()] = true
			if name := l.GetName(); name == "ip_family" || name == "traffic_policy" || name == "table" {
				labels[name+"="+l.GetValue()] = true
			}
		}
		for _, b := range m.GetHistogram().GetBucket() {
			buckets[b.GetUpperBound()] = true
		}
	}
	return fmt.Sprintf("%s %v %v", f.GetType(), slices.Sorted(maps.Keys(labels)), slices.Sorted(maps.Keys(buckets)))
}

// notExposed says why a series of kube-proxy's is not signalbox's. A name that
// ends in an underscore stands for all that begin so.
var notExposed = map[string]string{
	"apiserver_":  "it comes with code of API servers that kube-proxy is linked with and never runs",
	"aggregator_": "it comes with code of API servers that kube-proxy is linked with and never runs",
	"kubeproxy_iptables_ct_state_invalid_dropped_packets_total":     "it counts in an nfacct object; the counters of signalbox's own rule in KUBE-FORWARD say the same",
	"kubeproxy_iptables_localhost_nodeports_accepted_packets_total": "it counts in an nfacct object",
}

func excuse(name string) string {
	for listed, reason := range notExposed {
		if name == listed || strings.HasSuffix(listed, "_") && strings.HasPrefix(name, listed) {
			return reason
		}
	}
	return ""
}

// sameShape says whether a series is one on whose shape something depends. The
// Go runtime's series differ with the release of Go.
func sameShape(name string) bool {
	prefix, _, _ := strings.Cut(name, "_")
	return prefix != "go" && prefix != "process"
}

// classicGo are series of process and runtime that dashboards use.
var classicGo = map[string]bool{
	"go_goroutines": true, "go_threads": true, "go_info": true, "go_gc_duration_seconds": true, "go_memstats_alloc_bytes": true,
	"go_memstats_heap_inuse_bytes": true, "process_cpu_seconds_total": true, "process_resident_memory_bytes": true,
	"process_open_fds": true, "process_start_time_seconds": true,
}

// Dashboards and alerts for kube-proxy go on working: what the real one
// exposes, signalbox exposes in the same shape.
func TestSeriesAreKubeProxys(t *testing.T) {
	inEachMode(t, func(s *site) {
		s.startKubeProxy()
		s.exercise()
		want := s.scrapeOnce()
		s.crash()
		s.must(s.objects.deleteAll(s.Context()))

		s.start()
		s.exercise()
		got := s.scrapeOnce()
		for _, name := range slices.Sorted(maps.Keys(want)) {
			f, reason := got[name], excuse(name)
			switch {
			case f == nil && reason == "" && (sameShape(name) || classicGo[name]):
				s.Errorf("%s %s is not exposed", name, shape(want[name]))
			case f != nil && reason != "":
				s.Errorf("%s is exposed, although %s", name, reason)
			case f != nil && sameShape(name) && shape(want[name]) != shape(f):
				s.Errorf("%s: kube-proxy's is\n%s, signalbox's\n%s", name, shape(want[name]), shape(f))
			}
		}
		gates := samples(got["kubernetes_feature_enabled"], "name", "stage")
		for gate, on := range samples(want["kubernetes_feature_enabled"], "name", "stage") {
			if ours, known := gates[gate]; !known || ours != on {
				s.Errorf("feature gate %s: kube-proxy has %v, signalbox %v (known: %v)", gate, on, ours, known)
			}
		}
	})
}

// The alert KubeVersionMismatch counts the releases that a cluster's components
// tell of.
func TestOneKubernetesVersion(t *testing.T) {
	inEachMode(t, func(s *site) {
		s.start()
		s.eventually("the metrics server", func() error {
			_, err := s.get("node1", metricsURL)
			return err
		})
		want := map[string]float64{cluster.KubeVersion: 1}
		s.eventually("the API server's version", func() error {
			if got := samples(s.scrape()["kubernetes_build_info"], "git_version"); !maps.Equal(got, want) {
				return fmt.Errorf("%v, want %v", got, want)
			}
			return nil
		})
	})
}

// samples are the values of a series by some of its labels.
func samples(f *dto.MetricFamily, labels ...string) map[string]float64 {
	out := map[string]float64{}
	for _, m := range f.GetMetric() {
		var key []string
		for _, l := range m.Label {
			if slices.Contains(labels, l.GetName()) {
				key = append(key, l.GetValue())
			}
		}
		out[strings.Join(key, " ")] = m.GetGauge().GetValue()
	}
	return out
}

// talk is what a proxy answered to everything that a test asked it.
type talk map[string]string

// Addresses, times and numbers that differ with each run.
var unsteady = []struct{ pattern, text string }{
	{`"(lastUpdated|currentTime)":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[0-9.]*(Z|[+-]\d\d:\d\d)"`, `"$1":"TIME"`},
	{`Started(: | |=|:).*`, "Started: TIME"},
	{`Up(: | |=|:).*`, "Up: TIME"},
	{`(Go|Binary|Emulation) version(: | |=|:).*`, "$1 version: VERSION"},
	{`Paths.*`, "Paths"},
}

// note asks and remembers: status, the headers that mean something, and body.
func (k talk) note(s *site, what, from, url string) {
	s.Helper()
	r, err := s.get(from, url)
	text := fmt.Sprintf("%d\n", r.status)
	if err != nil {
		text = "no answer\n"
	}
	for _, name := range []string{"Content-Type", "X-Content-Type-Options", "X-Load-Balancing-Endpoint-Weight"} {
		text += fmt.Sprintf("%s: %s\n", name, r.header.Get(name))
	}
	body := r.body
	for _, u := range unsteady {
		body = regexp.MustCompile(u.pattern).ReplaceAllString(body, u.text)
	}
	k[what] = text + body
}

// converse makes a Service with a health check and asks a proxy everything, in
// each state that an answer depends on.
func (s *site) converse(port int32) talk {
	s.Helper()
	k := talk{}
	node := s.lab.Host("node1").Addr
	servers := map[string]string{
		"IPv4": fmt.Sprintf("http://%s:%d", node.V4, port), "IPv6": fmt.Sprintf("http://[%s]:%d", node.V6, port),
		"localhost": fmt.Sprintf("http://127.0.0.1:%d", port),
	}
	s.createService("balanced", []string{"pod-a", "pod-b", "pod-c"}, asLoadBalancer, func(svc *corev1.Service) {
		svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		svc.Spec.HealthCheckNodePort = port
	})
	weight := func(want string) {
		for _, family := range []string{"IPv4", "IPv6"} {
			s.eventually("weight "+want, func() error {
				r, err := s.get("node1", servers[family])
				if got := r.header.Get("X-Load-Balancing-Endpoint-Weight"); got != want {
					return fmt.Errorf("%s: weight %s (%v)", family, got, err)
				}
				return nil
			})
		}
	}
	checks := func(when string) {
		for name, url := range servers {
			k.note(s, "health check, "+when+", "+name, "node1", url+"/any/path?at=all")
		}
		k.note(s, "health check, "+when+", from outside", "client1", servers["IPv4"])
	}
	local := "0"
	for _, pod := range []string{"pod-a", "pod-b", "pod-c"} {
		if nodeOf(pod) == "node1" {
			local = string(local[0] + 1)
		}
	}
	weight(local)
	checks("ready")
	s.setEndpoints("balanced", []string{"pod-a", "pod-b", "pod-c"}, func(e *discoveryv1.Endpoint) {
		e.Conditions = discoveryv1.EndpointConditions{Ready: ptr(false), Serving: ptr(true), Terminating: ptr(true)}
	})
	weight("0")
	checks("draining")

	for _, path := range []string{"/healthz", "/livez", "/", "/healthz/", "/metrics"} {
		k.note(s, "health "+path, "node1", healthURL+path)
	}
	k.note(s, "health over IPv6", "node1", "http://[::1]:10256/livez")
	k.note(s, "health from outside", "client1", fmt.Sprintf("http://%s:10256/livez", node.V4))
	for _, path := range []string{"/healthz", "/proxyMode", "/statusz", "/debug/pprof/", "/debug/flags/v", "/"} {
		k.note(s, "metrics "+path, "node1", metricsURL+path)
	}
	k.note(s, "metrics over IPv6", "node1", "http://[::1]:10249/proxyMode")
	k.note(s, "metrics from outside", "client1", fmt.Sprintf("http://%s:10249/proxyMode", node.V4))

	taint := func(taints ...corev1.Taint) {
		s.updateNode("node1", func(n *corev1.Node) { n.Spec.Taints = taints })
	}
	status := func(want int) {
		s.eventually(fmt.Sprintf("status %d", want), func() error {
			r, err := s.get("node1", healthURL+"/healthz")
			if r.status != want {
				return fmt.Errorf("%d (%v): %s", r.status, err, r.body)
			}
			return nil
		})
	}
	taint(corev1.Taint{Key: "ToBeDeletedByClusterAutoscaler", Effect: corev1.TaintEffectNoSchedule})
	status(http.StatusServiceUnavailable)
	k.note(s, "health of a node that leaves, /healthz", "node1", healthURL+"/healthz")
	k.note(s, "health of a node that leaves, /livez", "node1", healthURL+"/livez")
	taint()
	status(http.StatusOK)
	k.note(s, "health of a node that stays", "node1", healthURL+"/healthz")
	s.deleteService("balanced")
	s.eventually("the end of the health check", func() error {
		if _, err := s.get("node1", servers["IPv4"]); err == nil {
			return errors.New("it answers")
		}
		return nil
	})
	return k
}

// Load balancers, probes and scripts get the answers that they know.
func TestAnswersAreKubeProxys(t *testing.T) {
	inEachMode(t, func(s *site) {
		s.startKubeProxy()
		want := s.converse(31900)
		s.crash()
		s.must(s.objects.deleteAll(s.Context()))
		s.start()
		got := s.converse(31900)
		for _, what := range slices.Sorted(maps.Keys(want)) {
			if want[what] != got[what] {
				s.Errorf("%s: kube-proxy says\n%q\nsignalbox\n%q", what, want[what], got[what])
			}
		}
	})
}

// event waits for an Event about an object, of a reason.
func (s *site) event(namespace, kind, name, reason string) *eventsv1.Event {
	s.Helper()
	var found *eventsv1.Event
	s.eventually("Event "+reason, func() error {
		list, err := s.client.EventsV1().Events(namespace).List(s.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for i := range list.Items {
			if e := &list.Items[i]; e.Reason == reason && e.Regarding.Kind == kind && e.Regarding.Name == name {
				found = e
				return nil
			}
		}
		return fmt.Errorf("not among %d Events", len(list.Items))
	})
	return found
}

// forgetEvents removes those of an earlier proxy.
func (s *site) forgetEvents() {
	s.Helper()
	for _, namespace := range []string{metav1.NamespaceDefault, s.namespace} {
		s.must(s.client.EventsV1().Events(namespace).DeleteCollection(s.Context(), metav1.DeleteOptions{}, metav1.ListOptions{}))
	}
}

// take has a port of node1 listened on, by somebody else.
func (s *site) take(port int32) net.Listener {
	s.Helper()
	l, err := s.lab.Host("node1").Listen("tcp", fmt.Sprintf(":%d", port))
	s.must(err)
	s.Cleanup(func() { l.Close() })
	return l
}

// An operator is told on the objects, in kube-proxy's words where it has some.
func TestEvents(t *testing.T) {
	const port = 31901
	inEachMode(t, func(s *site) {
		taken := s.take(port)
		svc := s.createService("balanced", []string{"pod-a"}, asLoadBalancer, func(svc *corev1.Service) {
			svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
			svc.Spec.HealthCheckNodePort = port
		})
		words := func(start func(...string)) (said []string) {
			s.forgetEvents()
			start()
			for _, e := range []*eventsv1.Event{
				s.event(metav1.NamespaceDefault, "Node", "node1", "Starting"),
				s.event(s.namespace, "Service", "balanced", "FailedToStartServiceHealthcheck"),
			} {
				said = append(said, fmt.Sprint(e.Type, e.Reason, e.Action, e.ReportingController, e.ReportingInstance, e.Namespace, e.Regarding.APIVersion))
			}
			return said
		}
		want := words(s.startKubeProxy)
		s.crash()
		before, err := shared.Requests()
		s.must(err)
		got := words(s.start)
		if !slices.Equal(want, got) {
			s.Errorf("kube-proxy says %q, signalbox %q", want, got)
		}
		if uid := s.event(s.namespace, "Service", "balanced", "FailedToStartServiceHealthcheck").Regarding.UID; uid != svc.UID {
			s.Errorf("kubectl describe asks for Events about %s, this is about %q", svc.UID, uid)
		}
		s.reaches(svc, "pod-a") // served all the same
		taken.Close()
		s.eventually("the health check", func() error {
			r, err := s.get("node1", fmt.Sprintf("http://%s:%d", s.lab.Host("node1").Addr.V4, port))
			if err == nil && r.status != http.StatusOK {
				err = fmt.Errorf("%d: %s", r.status, r.body)
			}
			return err
		})

		// Two Services that claim one address: one of them is not served there.
		external := func(svc *corev1.Service) { svc.Spec.ExternalIPs = []string{"192.0.2.77"} }
		s.createService("first", []string{"pod-a"}, external)
		s.createService("second", []string{"pod-b"}, external)
		if e := s.event(s.namespace, "Service", "second", "NotFullyServed"); !strings.Contains(e.Note, "first") || !strings.Contains(e.Note, "node1") {
			s.Errorf("the Event says %q", e.Note)
		}
		requests, err := shared.Requests()
		s.must(err)
		for _, r := range requests[len(before):] {
			if r.Code == http.StatusUnauthorized || r.Code == http.StatusForbidden {
				s.Errorf("kube-proxy's rights do not suffice: %+v", r)
			}
		}
	})
}

// The Node object goes, and comes back.
func TestHealthFollowsTheNode(t *testing.T) {
	inEachMode(t, func(s *site) {
		s.start()
		status := func(path string, want int) {
			s.Helper()
			s.eventually(fmt.Sprintf("%s: %d", path, want), func() error {
				r, err := s.get("node1", healthURL+path)
				if err == nil && r.status != want {
					err = fmt.Errorf("%d: %s", r.status, r.body)
				}
				return err
			})
		}
		status("/healthz", http.StatusOK)
		s.deleteNode("node1")
		status("/healthz", http.StatusServiceUnavailable)
		status("/livez", http.StatusOK)
		s.createNode("node1", s.lab.Host("node1").Addr, netlab.NodePodNetwork("node1"))
		status("/healthz", http.StatusOK)
		// The API server is away: nothing waits to be programmed.
		s.relay.Cut()
		s.eventually("a failing source", func() error {
			r, err := s.get("node1", metricsURL+"/metrics")
			if err == nil && !strings.Contains(r.body, "signalbox_source_failing{resource=\"services\"} 1\n") {
				err = errors.New("services are not said to fail")
			}
			return err
		})
		status("/healthz", http.StatusOK)
		s.must(s.relay.Restore())
		s.eventually("a source that is well", func() error {
			r, err := s.get("node1", metricsURL+"/metrics")
			if err == nil && !strings.Contains(r.body, "signalbox_source_failing{resource=\"services\"} 0\n") {
				err = errors.New("services are still said to fail")
			}
			return err
		})
	})
}
