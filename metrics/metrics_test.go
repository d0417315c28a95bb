// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"encoding/json"
	"errors"
	"flag"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"signalbox/internal/alloctest"

	"github.com/google/go-cmp/cmp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"k8s.io/kube-proxy/config/v1alpha1"

	"signalbox/conntrack"
	"signalbox/modes"
	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
	"signalbox/proxier/syncer"
)

var update = flag.Bool("update", false, "write the golden file anew")

var now = time.Unix(1000, 0)

func modeNamed(name string) proxier.Mode {
	m, err := modes.Named(name)
	if err != nil {
		panic(err)
	}
	return m
}

// exercised are Metrics that were told everything once.
func exercised(mode string) *Metrics {
	m := New()
	m.Serve(modeNamed(mode), []plan.Family{plan.IPv4})
	m.now = func() time.Time { return now }
	m.ReadProgress(func() syncer.Progress {
		return syncer.Progress{
			Objects:  service.ObjectCounts{Services: 3, EndpointSlices: 4, Nodes: 1, ServiceCIDRs: 2},
			Services: syncer.EventCounts{Total: 5, Pending: 1}, EndpointSlices: syncer.EventCounts{Total: 7, Pending: 2},
			LastQueued: now.Add(-time.Second), Pending: map[plan.Family]time.Time{plan.IPv4: now.Add(-2 * time.Second)},
		}
	})
	m.ReadRelays(func() map[plan.Family]proxier.RelayStats {
		return map[plan.Family]proxier.RelayStats{plan.IPv4: {Connections: 1, Flows: 2, Accepted: 3, FlowsMade: 4, DialFailures: 5, NoEndpoint: 6, Refused: 7, AcceptFailures: 8, Transparent: 9, Lost: 10, MaxConnections: 11, MaxFlows: 12}}
	})
	m.ReadLocalhost(func() map[plan.Family]proxier.LocalhostStats {
		return map[plan.Family]proxier.LocalhostStats{plan.IPv4: {Serving: true, Listeners: 2, Failures: 1, Refused: map[plan.Protocol]uint64{plan.UDP: 3, plan.SCTP: 0}}}
	})
	m.Synced(syncer.SyncReport{
		Family: plan.IPv4, All: true, Current: true, Repaired: true, Took: 3 * time.Millisecond, Quarantined: 2, Queued: now.Add(-10 * time.Millisecond),
		Triggers: []time.Time{now.Add(-2500 * time.Millisecond), now.Add(-100 * time.Second)},
		Totals:   syncer.Totals{ServicePorts: 6, Endpoints: 12, NoLocalInternal: 1, NoLocalExternal: 3},
		Kernel: []proxier.KernelObjects{
			{Table: "nat", Kind: "rule", Count: 40, Written: 4}, {Table: "signalbox", Kind: "element", Count: 90}, {Kind: "virtual-server", Count: 9},
		},
	})
	m.Synced(syncer.SyncReport{Family: plan.IPv4, Took: time.Millisecond, Quarantined: 2, Err: errors.New("no"), Totals: syncer.Totals{ServicePorts: 6, Endpoints: 12, NoLocalInternal: 1, NoLocalExternal: 3}})
	m.FlowsScanned(conntrack.Scan{Family: plan.IPv4, Deleted: 11, Took: time.Millisecond})
	m.FlowsScanned(conntrack.Scan{Family: plan.IPv4, Took: time.Millisecond, Err: errors.New("no")})
	m.Problem(plan.Problem{Kind: "Service"})
	m.Healthz(200)
	m.Healthz(503)
	m.Livez(200)
	m.Sysctl("net.ipv4.ip_forward", errors.New("no"))
	m.Sysctl("net.ipv4.vs.conntrack", nil)
	m.Source("services", nil)
	m.Source("nodes", errors.New("no"))
	m.ConntrackOpened(errors.New("no"))
	m.ForeignRules(plan.IPv4, true)
	m.ForeignRules(plan.IPv6, false)
	m.HealthChecks(plan.IPv4, 13)
	m.ListenFailed(HealthzServer)
	m.ListenFailing(HealthzServer, 1)
	m.Event("sent")
	return m
}

func gather(t *testing.T, m *Metrics) map[string]*dto.MetricFamily {
	t.Helper()
	list, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	families := map[string]*dto.MetricFamily{}
	for _, f := range list {
		families[f.GetName()] = f
	}
	return families
}

// text is what is exposed of the named series, without the comments and the
// histograms' buckets.
func text(t *testing.T, m *Metrics, keep func(name string) bool) string {
	t.Helper()
	var b strings.Builder
	families := gather(t, m)
	for _, name := range slices.Sorted(maps.Keys(families)) {
		if !keep(name) {
			continue
		}
		if _, err := expfmt.MetricFamilyToText(&b, families[name]); err != nil {
			t.Fatal(err)
		}
	}
	return regexp.MustCompile(`(?m)^(#.*|.*_bucket.*)\n`).ReplaceAllString(b.String(), "")
}

func TestValues(t *testing.T) {
	got := text(t, exercised("iptables"), func(name string) bool { return !strings.HasSuffix(name, "build_info") })
	want, err := os.ReadFile("testdata/values.txt")
	if *update {
		err = os.WriteFile("testdata/values.txt", []byte(got), 0o644)
		want = []byte(got)
	}
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// Each mode has the series that kube-proxy's has.
func TestSeriesOfModes(t *testing.T) {
	of := map[string]string{
		"kubeproxy_sync_full_proxy_rules_duration_seconds":                   "iptables nftables",
		"kubeproxy_sync_partial_proxy_rules_duration_seconds":                "iptables nftables",
		"kubeproxy_sync_proxy_rules_iptables_restore_failures_total":         "iptables ipvs",
		"kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total": "iptables",
		"kubeproxy_sync_proxy_rules_iptables_total":                          "iptables",
		"kubeproxy_sync_proxy_rules_iptables_last":                           "iptables",
		"kubeproxy_sync_proxy_rules_nftables_sync_failures_total":            "nftables",
		"kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total":         "nftables",
		"kubeproxy_sync_proxy_rules_duration_seconds":                        "iptables nftables ipvs userspace",
		"kubeproxy_conntrack_reconciler_deleted_entries_total":               "iptables nftables ipvs userspace",
	}
	for _, mode := range []string{"iptables", "nftables", "ipvs", "userspace"} {
		families := gather(t, exercised(mode))
		for name, modes := range of {
			if want := slices.Contains(strings.Fields(modes), mode); want != (families[name] != nil) {
				t.Errorf("mode %s has %s: %v, want %v", mode, name, !want, want)
			}
		}
	}
}

// Dashboards are written from the page; so it names what there is, all of it
// and nothing else.
func TestEverySeriesIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../docs/observability.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, name := range regexp.MustCompile(`\b(kubeproxy|signalbox)_[a-z0-9_]+`).FindAllString(string(page), -1) {
		documented[strings.TrimSuffix(name, "_bucket")] = true
	}
	exposed := map[string]bool{}
	for _, mode := range []string{"iptables", "nftables", "ipvs", "userspace"} {
		for name := range gather(t, exercised(mode)) {
			exposed[name] = true
			if strings.HasPrefix(name, "kubernetes_") {
				continue
			}
			if !documented[name] {
				t.Errorf("%s is not in docs/observability.md", name)
			}
		}
	}
	for name := range documented {
		if !exposed[name] && !strings.HasSuffix(name, "_") {
			t.Errorf("docs/observability.md names %s, which is not exposed", name)
		}
	}
}

// A counter that nothing has happened to is there, so that its first increase
// is one.
func TestCountersBeginAtZero(t *testing.T) {
	m := New()
	m.Serve(modeNamed("nftables"), []plan.Family{plan.IPv4})
	families := gather(t, m)
	for _, name := range []string{
		"signalbox_syncs_total", "signalbox_drift_repaired_total", "signalbox_flows_removed_total", "signalbox_listen_failures_total",
		"kubeproxy_sync_proxy_rules_nftables_sync_failures_total", "kubeproxy_conntrack_reconciler_deleted_entries_total",
	} {
		if families[name] == nil || families[name].Metric[0].GetCounter().GetValue() != 0 {
			t.Errorf("%s: %v", name, families[name])
		}
	}
	served := map[string]float64{}
	for _, metric := range families["signalbox_family_served"].Metric {
		served[metric.Label[0].GetValue()] = metric.GetGauge().GetValue()
	}
	if diff := cmp.Diff(map[string]float64{"IPv4": 1, "IPv6": 0}, served); diff != "" {
		t.Errorf("served (-want +got)\n%s", diff)
	}
}

// Another mode, or other families, take the place of what served, and come back:
// counters go on, and no gauge says what is not so any more.
func TestCountersGoOn(t *testing.T) {
	m := exercised("iptables")
	series := func(name string) (all map[string]float64) {
		all = map[string]float64{}
		for _, s := range gather(t, m)[name].GetMetric() {
			var labels []string
			for _, l := range s.Label {
				labels = append(labels, l.GetValue())
			}
			all[strings.Join(labels, ",")] = s.GetGauge().GetValue() + s.GetCounter().GetValue() + float64(s.GetHistogram().GetSampleCount())
		}
		return all
	}
	want := func(name string, want map[string]float64) {
		t.Helper()
		if diff := cmp.Diff(want, series(name)); diff != "" {
			t.Errorf("%s (-want +got)\n%s", name, diff)
		}
	}
	loop := func(services, slices uint64) {
		m.ReadProgress(func() syncer.Progress {
			return syncer.Progress{Services: syncer.EventCounts{Total: services}, EndpointSlices: syncer.EventCounts{Total: slices}}
		})
	}
	type values = map[string]float64
	// The same again: what was so is so.
	m.Serve(modeNamed("iptables"), []plan.Family{plan.IPv4})
	want("signalbox_service_ports", values{"IPv4": 6})
	want("kubeproxy_sync_proxy_rules_iptables_total", values{"IPv4,nat": 40})
	want("signalbox_sysctl_problem", values{})
	want("signalbox_conntrack_unavailable", values{"": 0})

	m.Serve(modeNamed("nftables"), []plan.Family{plan.IPv4, plan.IPv6})
	loop(2, 1)
	want("signalbox_mode_info", values{"nftables": 1})
	want("signalbox_service_ports", values{})
	want("signalbox_kernel_objects", values{})
	want("kubeproxy_sync_full_proxy_rules_duration_seconds", values{"IPv4": 1})
	want("kubeproxy_sync_proxy_rules_iptables_restore_failures_total", values{})
	want("kubeproxy_sync_proxy_rules_nftables_sync_failures_total", values{"IPv4": 0, "IPv6": 0})
	want("kubeproxy_sync_proxy_rules_service_changes_total", values{"": 7})
	m.Synced(syncer.SyncReport{Family: plan.IPv6, All: true, Current: true, Err: errors.New("no")})
	want("kubeproxy_sync_full_proxy_rules_duration_seconds", values{"IPv4": 1, "IPv6": 1})

	m.Serve(modeNamed("iptables"), []plan.Family{plan.IPv4})
	loop(3, 4)
	want("signalbox_family_served", values{"IPv4": 1, "IPv6": 0})
	want("kubeproxy_sync_proxy_rules_last_timestamp_seconds", values{})
	want("kubeproxy_sync_proxy_rules_iptables_restore_failures_total", values{"IPv4": 1})
	want("kubeproxy_sync_proxy_rules_service_changes_total", values{"": 10})
	want("kubeproxy_sync_proxy_rules_endpoint_changes_total", values{"": 12})
	want("signalbox_syncs_total", values{
		"IPv4,success,everything": 1, "IPv4,failure,change": 1, "IPv4,failure,everything": 0, "IPv4,success,change": 0,
		"IPv6,success,everything": 0, "IPv6,failure,change": 0, "IPv6,failure,everything": 1, "IPv6,success,change": 0,
	})
	want("kubeproxy_proxy_healthz_total", values{"200": 1, "503": 1})
}

func ask(h http.Handler, method, path, body string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
	return w
}

func TestPages(t *testing.T) {
	var verbosity int
	pages := Pages{
		Mode: "userspace", Profiling: true, Started: time.Now().Add(-26*time.Hour - 3*time.Minute), Flags: map[string]string{"v": "2", "master": "", "config": "/etc/x"},
		Config:       &v1alpha1.KubeProxyConfiguration{Mode: "iptables"},
		SetVerbosity: func(v int) { verbosity = v },
	}
	pages.Config.Kind, pages.Config.APIVersion = "KubeProxyConfiguration", "kubeproxy.config.k8s.io/v1alpha1"
	mux := exercised("userspace").Mux(pages)
	for _, path := range []string{"/healthz", "/proxyMode", "/configz"} {
		w := ask(mux, "GET", path, "")
		if w.Code != 200 || w.Header().Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: %d, %v", path, w.Code, w.Header())
		}
	}
	if got := ask(mux, "GET", "/proxyMode", "").Body.String(); got != "userspace" {
		t.Errorf("/proxyMode: %q", got)
	}
	if got := ask(mux, "GET", "/healthz", "").Body.String(); got != "ok" {
		t.Errorf("/healthz: %q", got)
	}
	var configz map[string]v1alpha1.KubeProxyConfiguration
	if err := json.Unmarshal(ask(mux, "GET", "/configz", "").Body.Bytes(), &configz); err != nil {
		t.Error(err)
	}
	if got := configz["kubeproxy.config.k8s.io"]; got.Mode != "iptables" || got.Kind != "KubeProxyConfiguration" {
		t.Errorf("/configz: %+v", configz)
	}
	flags := ask(mux, "GET", "/flagz", "").Body.String()
	if !strings.HasPrefix(flags, "\nkube-proxy flagz\nWarning: ") || !strings.HasSuffix(flags, "purposes only.\nconfig=/etc/x\nmaster=\nv=2\n") {
		t.Errorf("/flagz: %q", flags)
	}
	status := ask(mux, "GET", "/statusz", "").Body.String()
	for _, part := range []string{"\nkube-proxy statusz\nWarning: ", "\nUp: 26 hr 03 min 0", "\nGo version: go1", "\nBinary version: 1.37.2+signalbox.", "\nEmulation version: 1.37\n", "/debug/pprof"} {
		if !strings.Contains(status, part) {
			t.Errorf("/statusz has no %q: %s", part, status)
		}
	}
	if w := ask(mux, "PUT", "/debug/flags/v", "4\n"); w.Code != 200 || verbosity != 4 {
		t.Errorf("/debug/flags/v: %d %s, the verbosity is %d", w.Code, w.Body, verbosity)
	}
	for method, body := range map[string]string{"GET": "5", "PUT": "much"} {
		if w := ask(mux, method, "/debug/flags/v", body); w.Code < 400 || verbosity != 4 {
			t.Errorf("%s %s: %d %s, the verbosity is %d", method, body, w.Code, w.Body, verbosity)
		}
	}
	if w := ask(mux, "GET", "/debug/pprof/goroutine?debug=1", ""); w.Code != 200 || !strings.Contains(w.Body.String(), "goroutine profile") {
		t.Errorf("/debug/pprof: %d", w.Code)
	}
	if w := ask(mux, "GET", "/metrics/slis", ""); w.Code != 200 {
		t.Errorf("/metrics/slis: %d", w.Code)
	}
}

func TestNothingIsProfiledUnasked(t *testing.T) {
	mux := exercised("nftables").Mux(Pages{Mode: "nftables"})
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap", "/debug/flags/v", "/", "/other"} {
		if w := ask(mux, "GET", path, ""); w.Code != 404 {
			t.Errorf("%s: %d", path, w.Code)
		}
	}
}

// All that is exposed, ours and the libraries', in one answer.
func TestScrape(t *testing.T) {
	mux := exercised("nftables").Mux(Pages{Mode: "nftables"})
	body, err := io.ReadAll(ask(mux, "GET", "/metrics", "").Result().Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"kubeproxy_sync_proxy_rules_service_changes_total 5\n", "signalbox_mode_info{mode=\"nftables\"} 1\n", "\ngo_goroutines ", "\nprocess_open_fds ",
		`kubernetes_build_info{build_date="",compiler="gc",git_commit="`, `git_version="v1.37.2+signalbox.devel"`,
	} {
		if !strings.Contains(string(body), line) {
			t.Errorf("%q is not exposed", line)
		}
	}
}

// TestAllocationsOfOneScrape guards what every scrape of every node costs.
func TestAllocationsOfOneScrape(t *testing.T) {
	mux := exercised("iptables").Mux(Pages{Mode: "iptables"})
	alloctest.Check(t, 5530, func() { ask(mux, "GET", "/metrics", "") })
}

// A scrape costs the same whatever a node holds: what is exposed does not grow.
func BenchmarkScrape(b *testing.B) {
	mux := exercised("iptables").Mux(Pages{Mode: "iptables"})
	b.ReportAllocs()
	for b.Loop() {
		if w := ask(mux, "GET", "/metrics", ""); w.Code != 200 {
			b.Fatal(w.Code)
		}
	}
}
