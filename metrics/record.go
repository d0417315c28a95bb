// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"strconv"
	"time"

	"signalbox/conntrack"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// Synced records a sync. It has the form of LoopOptions.Synced.
func (m *Metrics) Synced(r syncer.SyncReport) {
	family := r.Family.String()
	m.countSync(family, r)
	if r.Current {
		m.compatible.lastTimestamp.WithLabelValues(family).Set(seconds(m.now()))
	}
	if r.Repaired {
		m.own.repaired.WithLabelValues(family).Inc()
	}
	if !r.Queued.IsZero() {
		m.own.eventToKernel.WithLabelValues(family).Observe(m.now().Sub(r.Queued).Seconds())
	}
	for _, at := range r.Triggers {
		m.compatible.networkProgramming.WithLabelValues(family).Observe(m.now().Sub(at).Seconds())
	}
	m.own.quarantined.WithLabelValues(family).Set(float64(r.Quarantined))
	m.own.servicePorts.WithLabelValues(family).Set(float64(r.Totals.ServicePorts))
	m.own.endpoints.WithLabelValues(family).Set(float64(r.Totals.Endpoints))
	m.compatible.noLocalEndpoints.WithLabelValues("internal", family).Set(float64(r.Totals.NoLocalInternal))
	m.compatible.noLocalEndpoints.WithLabelValues("external", family).Set(float64(r.Totals.NoLocalExternal))
	for _, k := range r.Kernel {
		m.own.kernelObjects.WithLabelValues(k.Table, k.Kind, family).Set(float64(k.Count))
	}
}

func (m *Metrics) countSync(family string, r syncer.SyncReport) {
	scope, result := "change", "success"
	if r.All {
		scope = "everything"
	}
	if r.Err != nil {
		result = "failure"
	}
	m.own.syncs.WithLabelValues(scope, result, family).Inc()
	m.compatible.syncDuration.WithLabelValues(family).Observe(r.Took.Seconds())
	m.modes.synced(family, r)
}

// FlowsScanned counts a scan of the connection-tracking table. It has the form
// of conntrack.Options.Scanned.
func (m *Metrics) FlowsScanned(s conntrack.Scan) {
	family := s.Family.String()
	m.compatible.reconcilerDuration.WithLabelValues(family).Observe(s.Took.Seconds())
	m.compatible.reconcilerDeleted.WithLabelValues(family).Add(float64(s.Deleted))
	m.own.flowsRemoved.WithLabelValues(family).Add(float64(s.Deleted))
	if s.Err != nil {
		m.own.flowScanErrors.WithLabelValues(family).Inc()
	}
}

// ConntrackOpened records whether the connection-tracking table can be read. It has the form
// of conntrack.Options.Opened.
func (m *Metrics) ConntrackOpened(err error) {
	m.own.conntrackUnavailable.WithLabelValues().Set(oneIf(err != nil))
}

// Problem counts a part of an object that cannot be served. It has the form of LoopOptions.Report.
func (m *Metrics) Problem(p plan.Problem) { m.own.problems.WithLabelValues(p.Kind).Inc() }

// Healthz counts answers of /healthz by HTTP status.
func (m *Metrics) Healthz(status int) {
	m.compatible.healthz.WithLabelValues(strconv.Itoa(status)).Inc()
}

// Livez counts answers of /livez by HTTP status.
func (m *Metrics) Livez(status int) { m.compatible.livez.WithLabelValues(strconv.Itoa(status)).Inc() }

// Sysctl records whether a kernel setting, named with dots, could be set.
func (m *Metrics) Sysctl(name string, err error) {
	m.own.sysctlProblem.WithLabelValues(name).Set(oneIf(err != nil))
}

// ConfigurationRejected records whether the changed configuration is not in force.
func (m *Metrics) ConfigurationRejected(rejected bool) {
	m.own.configurationRejected.WithLabelValues().Set(oneIf(rejected))
}

// Source records whether a resource can be listed and watched at present.
func (m *Metrics) Source(resource string, err error) {
	m.own.sourceFailing.WithLabelValues(resource).Set(oneIf(err != nil))
}

// NodeMissing records whether no Node object has the name of this node.
func (m *Metrics) NodeMissing(missing bool) { m.own.nodeMissing.WithLabelValues().Set(oneIf(missing)) }

// ManifestProblems records how many files of the source directory have a fault.
func (m *Metrics) ManifestProblems(files int) {
	m.own.manifestProblems.WithLabelValues().Set(float64(files))
}

// SavedState records the last change of the saved state that is served; zero: none is.
func (m *Metrics) SavedState(since time.Time) {
	seconds := 0.0
	if !since.IsZero() {
		seconds = float64(since.Unix())
	}
	m.own.savedState.WithLabelValues().Set(seconds)
}

// FullAffinityLists records for how many endpoints the kernel's list of clients
// with session affinity is full.
func (m *Metrics) FullAffinityLists(lists int) {
	m.own.affinityListsFull.WithLabelValues().Set(float64(lists))
}

// RouteSourcesLeftOut records how many source addresses of routes are not used.
func (m *Metrics) RouteSourcesLeftOut(n int) {
	m.own.routeSourcesLeftOut.WithLabelValues().Set(float64(n))
}

// ForeignRules records whether rules of another service proxy may be in force.
func (m *Metrics) ForeignRules(family plan.Family, present bool) {
	m.own.foreignRules.WithLabelValues(family.String()).Set(oneIf(present))
}

// HealthChecks records how many Services have a healthCheckNodePort.
func (m *Metrics) HealthChecks(family plan.Family, services int) {
	m.own.healthChecks.WithLabelValues(family.String()).Set(float64(services))
}

// The servers of ListenFailed and ListenFailing.
const (
	HealthzServer       = "healthz"
	MetricsServer       = "metrics"
	ServiceHealthServer = "service-health"
)

// ListenFailed counts an attempt to listen that failed.
func (m *Metrics) ListenFailed(server string) { m.own.listenFailures.WithLabelValues(server).Inc() }

// ListenFailing records at how many addresses a server cannot listen at present.
func (m *Metrics) ListenFailing(server string, addresses int) {
	m.own.listenFailing.WithLabelValues(server).Set(float64(addresses))
}

// Event counts a Kubernetes Event by its result.
func (m *Metrics) Event(result string) { m.own.events.WithLabelValues(result).Inc() }

func oneIf(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}
