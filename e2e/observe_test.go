package e2e

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"signalbox/e2e/cluster"
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
	client := http.Client{Timeout: patience, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			err = s.lab.Host(from).Do(func() error {
				c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
				return err
			})
			return c, err
		},
	}}
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

// notExposed says why a series of kube-proxy's is not signalbox's.
var notExposed = map[string]string{}

// Dashboards and alerts for kube-proxy go on working: what the real one
// exposes, signalbox exposes in the same shape.
func TestSeriesAreKubeProxys(t *testing.T) {
	inEachMode(t, func(s *site) {
		s.startKubeProxy()
		s.exercise()
		want := s.scrapeOnce()
		s.save()
		s.crash()
		s.must(s.objects.deleteAll(s.Context()))

		s.start()
		s.exercise()
		got := s.scrapeOnce()
		for _, name := range slices.Sorted(maps.Keys(want)) {
			prefix, _, _ := strings.Cut(name, "_")
			reason, excused := notExposed[name]
			switch f := got[name]; {
			case prefix == "go" && !strings.HasPrefix(name, "go_memstats") && name != "go_goroutines" && name != "go_threads" && name != "go_info" && name != "go_gc_duration_seconds":
				// The rest of the runtime's differ with the release of Go.
			case f == nil && !excused:
				s.Errorf("%s %s is not exposed", name, shape(want[name]))
			case f != nil && excused:
				s.Errorf("%s is exposed, although %s", name, reason)
			case f != nil && shape(want[name]) != shape(f) && (prefix == "kubeproxy" || prefix == "kubernetes" || prefix == "rest"):
				s.Errorf("%s: kube-proxy's is\n%s, signalbox's\n%s", name, shape(want[name]), shape(f))
			}
		}
	})
}

// save writes what kube-proxy answers into the directory that KUBE_PROXY_SAYS
// names, for whoever wants to read it.
func (s *site) save() {
	dir := os.Getenv("KUBE_PROXY_SAYS")
	if dir == "" {
		return
	}
	for path, base := range map[string]string{
		"/metrics": metricsURL, "/metrics/slis": metricsURL, "/healthz": metricsURL, "/proxyMode": metricsURL, "/configz": metricsURL, "/statusz": metricsURL, "/flagz": metricsURL,
	} {
		r, err := s.get("node1", base+path)
		text := fmt.Sprintf("%v %d %v\n%s", err, r.status, r.header, r.body)
		s.must(os.WriteFile(filepath.Join(dir, s.mode+strings.ReplaceAll(path, "/", "-")), []byte(text), 0o644))
	}
	for _, path := range []string{"/healthz", "/livez", "/other"} {
		r, err := s.get("node1", healthURL+path)
		text := fmt.Sprintf("%v %d %v\n%s", err, r.status, r.header, r.body)
		s.must(os.WriteFile(filepath.Join(dir, s.mode+"-10256"+strings.ReplaceAll(path, "/", "-")), []byte(text), 0o644))
	}
}
