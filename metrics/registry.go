// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"net/http"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"k8s.io/component-base/metrics/legacyregistry"
	_ "k8s.io/component-base/metrics/prometheus/restclient" // rest_client_*

	"signalbox/internal/buildinfo"

	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// Metrics are the series of a process. Its counters continue when the
// configuration changes, because a dashboard takes a counter that begins at 0 for
// a restart. All methods but Serve may be called from any goroutine.
type Metrics struct {
	registry   *prometheus.Registry
	compatible compatible
	modes      seriesOfModes
	own        own
	now        func() time.Time

	// The arguments of the last Serve.
	mode     string
	families []plan.Family

	mu       sync.Mutex // guards what follows
	progress func() syncer.Progress
	// earlier are the changes that earlier Loops received.
	earlier   struct{ services, slices uint64 }
	relays    func() map[plan.Family]proxier.RelayStats
	localhost func() map[plan.Family]proxier.LocalhostStats
}

// New returns the series of a process that serves nothing yet.
func New() *Metrics {
	registry := prometheus.NewRegistry()
	r := factory{registry}
	m := &Metrics{
		registry: registry, compatible: newCompatible(r), modes: newSeriesOfModes(), own: newOwn(r), now: time.Now,
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

// Serve sets the mode and its families from now on. Their counters begin at 0, so
// that a dashboard sees the first increase, or continue. Gauges of a family or mode
// that is no longer served disappear. No sync may run meanwhile.
func (m *Metrics) Serve(mode proxier.Mode, families []plan.Family) {
	for _, old := range m.families {
		if mode.Name() != m.mode || !slices.Contains(families, old) {
			m.forget(old)
		}
	}
	m.modes.expose(m.registry, mode)
	m.mode, m.families = mode.Name(), families
	for _, g := range []*prometheus.GaugeVec{m.own.modeInfo, m.own.sysctlProblem, m.own.sourceFailing, m.own.foreignRules} {
		g.Reset()
	}
	for _, g := range m.own.conditions() {
		g.WithLabelValues().Set(0)
	}
	m.own.modeInfo.WithLabelValues(m.mode).Set(1)
	for _, family := range plan.Families {
		m.own.familyServed.WithLabelValues(family.String()).Set(oneIf(slices.Contains(families, family)))
	}
	for _, family := range families {
		m.begin(family.String())
	}
}

// forget deletes the gauges of a family that is no longer served, or was served
// by another mode.
func (m *Metrics) forget(family plan.Family) {
	of := prometheus.Labels{ipFamily: family.String()}
	for _, g := range []*prometheus.GaugeVec{
		m.compatible.lastTimestamp, m.compatible.noLocalEndpoints,
		m.own.quarantined, m.own.servicePorts, m.own.endpoints, m.own.kernelObjects, m.own.healthChecks,
	} {
		g.DeletePartialMatch(of)
	}
	m.modes.forget(family.String())
}

// begin creates the counters of a family, with 0 if they are new.
func (m *Metrics) begin(family string) {
	m.modes.begin(family)
	for _, counter := range []*prometheus.CounterVec{m.compatible.reconcilerDeleted, m.own.repaired, m.own.flowsRemoved, m.own.flowScanErrors} {
		counter.WithLabelValues(family).Add(0)
	}
	for _, scope := range []string{"change", "everything"} {
		for _, result := range []string{"success", "failure"} {
			m.own.syncs.WithLabelValues(scope, result, family).Add(0)
		}
	}
}

// KubernetesVersion sets the release of kubernetes_build_info, such as v1.36.3.
func (m *Metrics) KubernetesVersion(release string) {
	v := buildinfo.Info(release)
	m.compatible.buildInfo.Reset()
	m.compatible.buildInfo.WithLabelValues(
		v.Major, v.Minor, v.GitVersion, v.GitCommit, v.GitTreeState, v.BuildDate, v.GoVersion, v.Compiler, v.Platform,
	).Set(1)
}

// ReadProgress makes each scrape read the progress of a Loop. The Loop before it
// has ended.
func (m *Metrics) ReadProgress(progress func() syncer.Progress) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.progress != nil {
		last := m.progress()
		m.earlier.services += last.Services.Total
		m.earlier.slices += last.EndpointSlices.Total
	}
	m.progress = progress
}

// ReadRelays makes each scrape read what the relays of this process did, by family.
func (m *Metrics) ReadRelays(stats func() map[plan.Family]proxier.RelayStats) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.relays = stats
}

// ReadLocalhost makes each scrape read what serves NodePorts on loopback, by family.
func (m *Metrics) ReadLocalhost(stats func() map[plan.Family]proxier.LocalhostStats) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.localhost = stats
}

// Handler serves the series and those of the Kubernetes client, the Go runtime and
// the process.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(prometheus.Gatherers{m.registry, legacyregistry.DefaultGatherer}, promhttp.HandlerOpts{
		ErrorHandling: promhttp.ContinueOnError,
	})
}
