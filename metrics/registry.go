package metrics

import (
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"k8s.io/component-base/metrics/legacyregistry"
	_ "k8s.io/component-base/metrics/prometheus/restclient" // rest_client_*

	"signalbox/internal/buildinfo"
	"signalbox/internal/localhost"
	"signalbox/proxier"
	"signalbox/userspace"
)

// Metrics are the series of a process. Its counters go on whatever takes
// another's place in it: a dashboard takes a counter that begins anew for a
// restart. What it is told may come from any goroutine, but for Serve.
type Metrics struct {
	registry   *prometheus.Registry
	compatible compatible
	single     single
	own        own
	scraped    scraped
	now        func() time.Time

	// What is served, as Serve was last told.
	mode     string
	families []proxier.Family

	mu       sync.Mutex // guards what follows
	progress func() proxier.Progress
	// before is what Loops were told that others have taken the place of.
	before    struct{ services, slices uint64 }
	relays    func() map[proxier.Family]userspace.Stats
	localhost func() map[proxier.Family]localhost.Stats
}

// New makes the series of a process that serves nothing yet.
func New() *Metrics {
	registry := prometheus.NewRegistry()
	r := factory{registry}
	m := &Metrics{
		registry: registry, compatible: newCompatible(r), single: newSingle(), own: newOwn(r), scraped: newScraped(), now: time.Now,
	}
	registry.MustRegister(m)
	m.KubernetesVersion(buildinfo.Release())
	m.own.buildInfo.WithLabelValues(buildinfo.Version, buildinfo.Revision(), runtime.Version()).Set(1)
	for _, server := range []string{HealthzServer, MetricsServer, ServiceHealthServer} {
		m.own.listenFailing.WithLabelValues(server).Set(0)
		m.own.listenFailures.WithLabelValues(server).Add(0)
	}
	return m
}

// Serve notes which mode serves which families from now on. Counters begin at 0
// for each of them, so that their first increase is seen, or go on; gauges say
// nothing any more that is not so for a family and a mode that stay. Nothing may
// be synced meanwhile.
func (m *Metrics) Serve(mode string, families []proxier.Family) {
	for _, old := range m.families {
		if mode != m.mode || !slices.Contains(families, old) {
			m.forget(old)
		}
	}
	m.single.expose(m.registry, m.mode, mode)
	m.mode, m.families = mode, families
	for _, g := range []*prometheus.GaugeVec{m.own.modeInfo, m.own.sysctlProblem, m.own.sourceFailing, m.own.leftovers} {
		g.Reset()
	}
	for _, g := range []*prometheus.GaugeVec{m.own.flowsUnseen, m.own.nodeMissing, m.own.manifestProblems, m.own.affinityListsFull} {
		g.WithLabelValues().Set(0)
	}
	m.own.modeInfo.WithLabelValues(mode).Set(1)
	for _, family := range proxier.Families {
		m.own.familyServed.WithLabelValues(family.String()).Set(oneIf(slices.Contains(families, family)))
	}
	for _, family := range families {
		m.begin(family.String())
	}
}

// forget drops what was so of a family that is not served any more, or by
// another mode.
func (m *Metrics) forget(family proxier.Family) {
	of := prometheus.Labels{ipFamily: family.String()}
	for _, g := range []*prometheus.GaugeVec{
		m.compatible.lastTimestamp, m.compatible.noLocalEndpoints, m.single.iptablesTotal, m.single.iptablesLast,
		m.own.setAside, m.own.servicePorts, m.own.endpoints, m.own.kernelObjects, m.own.healthChecks,
	} {
		g.DeletePartialMatch(of)
	}
}

func (m *Metrics) begin(family string) {
	m.single.begin(m.mode, family)
	for _, counter := range []*prometheus.CounterVec{m.compatible.reconcilerDeleted, m.own.repaired, m.own.flowsRemoved, m.own.flowPassErrors} {
		counter.WithLabelValues(family).Add(0)
	}
	for _, scope := range []string{"change", "everything"} {
		for _, result := range []string{"success", "failure"} {
			m.own.syncs.WithLabelValues(scope, result, family).Add(0)
		}
	}
}

// KubernetesVersion has kubernetes_build_info tell of this release, as v1.36.3.
func (m *Metrics) KubernetesVersion(release string) {
	v := buildinfo.Info(release)
	m.compatible.buildInfo.Reset()
	m.compatible.buildInfo.WithLabelValues(
		v.Major, v.Minor, v.GitVersion, v.GitCommit, v.GitTreeState, v.BuildDate, v.GoVersion, v.Compiler, v.Platform,
	).Set(1)
}

// ReadProgress has each scrape ask how far a Loop has come, in the place of the
// Loop before, which has ended.
func (m *Metrics) ReadProgress(progress func() proxier.Progress) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.progress != nil {
		last := m.progress()
		m.before.services += last.Services.Total
		m.before.slices += last.EndpointSlices.Total
	}
	m.progress = progress
}

// ReadRelays has each scrape ask what the relays of each family did, which a
// process ever had.
func (m *Metrics) ReadRelays(stats func() map[proxier.Family]userspace.Stats) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.relays = stats
}

// ReadLocalhost has each scrape ask what serves NodePorts on loopback, by family.
func (m *Metrics) ReadLocalhost(stats func() map[proxier.Family]localhost.Stats) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.localhost = stats
}

// Handler serves the series, with those of the Kubernetes client, the Go
// runtime and the process, which are one for all that this process ever runs.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(prometheus.Gatherers{m.registry, legacyregistry.DefaultGatherer}, promhttp.HandlerOpts{
		ErrorHandling: promhttp.ContinueOnError,
	})
}

// Describe implements prometheus.Collector for what is read at each scrape.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	s := &m.scraped
	for _, d := range []*prometheus.Desc{
		s.lastQueued, s.serviceChanges, s.serviceChangesPending, s.sliceChanges, s.sliceChangesPending, s.objects, s.pendingAge,
		s.relayConnections, s.relayFlows, s.relayAccepted, s.relayFlowsMade, s.relayDialFailures, s.relayNoEndpoint,
		s.relayRefused, s.relayAcceptFailures, s.relayTransparent, s.relayLost, s.relayMaxConnections, s.relayMaxFlows,
		s.localhostListeners, s.localhostFailures, s.localhostRefused,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := sender{ch}
	if m.progress != nil {
		m.collectProgress(s, m.progress())
	}
	if m.relays != nil {
		for family, stats := range m.relays() {
			m.collectRelay(s, family.String(), stats)
		}
	}
	if m.localhost != nil {
		for family, stats := range m.localhost() {
			m.collectLocalhost(s, family.String(), stats)
		}
	}
}

func (m *Metrics) collectProgress(s sender, p proxier.Progress) {
	d := &m.scraped
	s.counter(d.serviceChanges, float64(m.before.services+p.Services.Total))
	s.gauge(d.serviceChangesPending, float64(p.Services.Pending))
	s.counter(d.sliceChanges, float64(m.before.slices+p.EndpointSlices.Total))
	s.gauge(d.sliceChangesPending, float64(p.EndpointSlices.Pending))
	for kind, n := range map[string]int{
		"Service": p.Held.Services, "EndpointSlice": p.Held.EndpointSlices, "Node": p.Held.Nodes, "ServiceCIDR": p.Held.ServiceCIDRs,
	} {
		s.gauge(d.objects, float64(n), kind)
	}
	now := m.now()
	for family, since := range p.Pending {
		age := 0.0
		if !since.IsZero() {
			age = now.Sub(since).Seconds()
		}
		s.gauge(d.pendingAge, age, family.String())
		if !p.LastQueued.IsZero() {
			s.gauge(d.lastQueued, seconds(p.LastQueued), family.String())
		}
	}
}

func (m *Metrics) collectRelay(s sender, family string, r userspace.Stats) {
	d := &m.scraped
	s.gauge(d.relayConnections, float64(r.Connections), family)
	s.gauge(d.relayFlows, float64(r.Flows), family)
	s.counter(d.relayAccepted, float64(r.Accepted), family)
	s.counter(d.relayFlowsMade, float64(r.FlowsMade), family)
	s.counter(d.relayDialFailures, float64(r.DialFailures), family)
	s.counter(d.relayNoEndpoint, float64(r.NoEndpoint), family)
	s.counter(d.relayRefused, float64(r.Refused), family)
	s.counter(d.relayAcceptFailures, float64(r.AcceptFailures), family)
	s.counter(d.relayTransparent, float64(r.Transparent), family)
	s.counter(d.relayLost, float64(r.Lost), family)
	s.gauge(d.relayMaxConnections, float64(r.MaxConnections), family)
	s.gauge(d.relayMaxFlows, float64(r.MaxFlows), family)
}

func (m *Metrics) collectLocalhost(s sender, family string, l localhost.Stats) {
	d := &m.scraped
	s.gauge(d.localhostListeners, float64(l.Listeners), family)
	s.counter(d.localhostFailures, float64(l.Failures), family)
	for protocol, packets := range l.Refused {
		s.counter(d.localhostRefused, float64(packets), family, strings.ToUpper(protocol.String()))
	}
}

// sender hands values to a scrape.
type sender struct{ ch chan<- prometheus.Metric }

func (s sender) counter(d *prometheus.Desc, v float64, labels ...string) {
	s.ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
}

func (s sender) gauge(d *prometheus.Desc, v float64, labels ...string) {
	s.ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

func seconds(t time.Time) float64 { return float64(t.UnixNano()) / float64(time.Second) }
