// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"
)

// Prefixes of names: kubeproxy_ for series with kube-proxy's name, type, labels
// and buckets, signalbox_ for the others.
const (
	kubeproxy = "kubeproxy"
	signalbox = "signalbox"
)

const ipFamily = "ip_family"

// The buckets of kube-proxy's histograms, in seconds.
var (
	syncBuckets    = prometheus.ExponentialBuckets(0.001, 2, 15)
	networkBuckets = slices.Concat(
		[]float64{0, 0.25, 0.5},
		prometheus.LinearBuckets(1, 1, 59),
		prometheus.LinearBuckets(60, 5, 12),
		prometheus.LinearBuckets(120, 30, 7),
	)
)

// kernelBuckets are finer than kube-proxy's: half a millisecond to a minute.
var kernelBuckets = prometheus.ExponentialBuckets(0.0005, 2, 18)

// compatible are the series that kube-proxy has in every mode.
type compatible struct {
	syncDuration       *prometheus.HistogramVec
	networkProgramming *prometheus.HistogramVec
	lastTimestamp      *prometheus.GaugeVec
	noLocalEndpoints   *prometheus.GaugeVec
	healthz, livez     *prometheus.CounterVec
	reconcilerDuration *prometheus.HistogramVec
	reconcilerDeleted  *prometheus.CounterVec

	buildInfo *prometheus.GaugeVec
}

func newCompatible(r factory) compatible {
	return compatible{
		syncDuration: r.histogram(kubeproxy, "sync_proxy_rules_duration_seconds", "Time that a sync of one IP family took.",
			syncBuckets, ipFamily),
		networkProgramming: r.histogram(kubeproxy, "network_programming_duration_seconds", "Time from a change of a Service's endpoints, as its EndpointSlice says, until the kernel has it.",
			networkBuckets, ipFamily),
		lastTimestamp: r.gauge(kubeproxy, "sync_proxy_rules_last_timestamp_seconds", "Unix time of the last sync after which the kernel was up to date.",
			ipFamily),
		noLocalEndpoints: r.gauge(kubeproxy, "sync_proxy_rules_no_local_endpoints_total", "Service ports with the traffic policy Local that have endpoints, but none on this node.",
			"traffic_policy", ipFamily),
		healthz: r.counter(kubeproxy, "proxy_healthz_total", "Answers of /healthz by HTTP status.", "code"),
		livez:   r.counter(kubeproxy, "proxy_livez_total", "Answers of /livez by HTTP status.", "code"),
		reconcilerDuration: r.histogram(kubeproxy, "conntrack_reconciler_sync_duration_seconds", "Time that a scan of the connection-tracking table took.",
			syncBuckets, ipFamily),
		reconcilerDeleted: r.counter(kubeproxy, "conntrack_reconciler_deleted_entries_total", "Stale flows that were removed from the connection-tracking table: UDP, and with --reset-removed-endpoints TCP.",
			ipFamily),
		buildInfo: r.gauge("kubernetes", "build_info", "1 for the release of Kubernetes: the API server's, or the one that this process behaves like.",
			"major", "minor", "git_version", "git_commit", "git_tree_state", "build_date", "go_version", "compiler", "platform"),
	}
}

// own are the series that kube-proxy does not have.
type own struct {
	syncs          *prometheus.CounterVec
	eventToKernel  *prometheus.HistogramVec
	repaired       *prometheus.CounterVec
	quarantined    *prometheus.GaugeVec
	servicePorts   *prometheus.GaugeVec
	endpoints      *prometheus.GaugeVec
	kernelObjects  *prometheus.GaugeVec
	problems       *prometheus.CounterVec
	flowsRemoved   *prometheus.CounterVec
	flowScanErrors *prometheus.CounterVec

	buildInfo, modeInfo, familyServed *prometheus.GaugeVec
	configurationRejected             *prometheus.GaugeVec
	sysctlProblem                     *prometheus.GaugeVec
	sourceFailing                     *prometheus.GaugeVec
	nodeMissing, manifestProblems     *prometheus.GaugeVec
	savedState                        *prometheus.GaugeVec
	affinityListsFull                 *prometheus.GaugeVec
	routeSourcesLeftOut               *prometheus.GaugeVec
	foreignRules                      *prometheus.GaugeVec
	conntrackUnavailable              *prometheus.GaugeVec
	healthChecks                      *prometheus.GaugeVec
	listenFailing                     *prometheus.GaugeVec
	listenFailures                    *prometheus.CounterVec
	events                            *prometheus.CounterVec
}

func newOwn(r factory) own {
	o := own{
		syncs: r.counter(signalbox, "syncs_total", "Syncs by scope (change, everything) and result (success, failure).",
			"scope", "result", ipFamily),
		eventToKernel: r.histogram(signalbox, "event_to_kernel_duration_seconds", "Time from an update's arrival in this process until the kernel has it; of updates written together, the oldest counts.",
			kernelBuckets, ipFamily),
		repaired: r.counter(signalbox, "drift_repaired_total", "Repairs because another program had changed what the mode has in the kernel, or because the kernel's state was unknown.",
			ipFamily),
		quarantined: r.gauge(signalbox, "service_ports_quarantined", "Service ports in quarantine: the kernel refuses their rules, and keeps the earlier ones; or their Service is too large.",
			ipFamily),
		servicePorts: r.gauge(signalbox, "service_ports", "Service ports that are served.", ipFamily),
		endpoints:    r.gauge(signalbox, "endpoints", "Endpoints that answer, counted for each Service port that they serve.", ipFamily),
		kernelObjects: r.gauge(signalbox, "kernel_objects", "Objects of the mode in the kernel, by table (empty for objects without one) and kind.",
			"table", "kind", ipFamily),
		problems: r.counter(signalbox, "object_problems_total", "Parts of objects that cannot be served, by the object's kind.",
			"kind"),
		flowsRemoved:   r.counter(signalbox, "flows_removed_total", "Stale flows that were removed: UDP, and with --reset-removed-endpoints TCP.", ipFamily),
		flowScanErrors: r.counter(signalbox, "flow_scan_failures_total", "Scans of the connection-tracking table that failed; they are repeated.", ipFamily),

		buildInfo:             r.gauge(signalbox, "build_info", "1 for the running release.", "version", "revision", "go_version"),
		modeInfo:              r.gauge(signalbox, "mode_info", "1 for the running mode.", "mode"),
		familyServed:          r.gauge(signalbox, "family_served", "1 for an IP family that is served, 0 for one that is not.", ipFamily),
		configurationRejected: r.gauge(signalbox, "configuration_rejected", "1 while the configuration file cannot be used, or not yet, and the configuration before it is in force."),
		sysctlProblem:         r.gauge(signalbox, "sysctl_problem", "1 for a kernel setting that could not be set.", "sysctl"),
		sourceFailing: r.gauge(signalbox, "source_failing", "1 for a resource that cannot be listed or watched at present, otherwise 0.",
			"resource"),
		nodeMissing:          r.gauge(signalbox, "node_missing", "1 while no Node object has the name of this node."),
		manifestProblems:     r.gauge(signalbox, "manifest_problems", "Files of the --source directory that cannot be read or have a fault."),
		savedState:           r.gauge(signalbox, "saved_state_timestamp_seconds", "Unix time of the last change in the saved state that is served because the API server does not answer or lists no objects; 0 if none is."),
		affinityListsFull:    r.gauge(signalbox, "affinity_lists_full", "Mode iptables: endpoints with session affinity whose list of clients is full; a new client replaces another."),
		routeSourcesLeftOut:  r.gauge(signalbox, "route_sources_left_out", "Source addresses of routes for which masquerade chooses instead: there are too many, or rules cannot name their interface."),
		conntrackUnavailable: r.gauge(signalbox, "conntrack_unavailable", "1 if the connection-tracking table cannot be read, so that stale flows are not removed."),
		foreignRules: r.gauge(signalbox, "foreign_rules", "1 while rules of another service proxy may be in force: they could not be removed, or a kube-proxy that was started later wrote them.",
			ipFamily),
		healthChecks: r.gauge(signalbox, "service_health_checks", "Services with a healthCheckNodePort.", ipFamily),
		listenFailing: r.gauge(signalbox, "listen_failing", "Addresses at which a server (healthz, metrics, service-health) cannot listen at present.",
			"server"),
		listenFailures: r.counter(signalbox, "listen_failures_total", "Attempts to listen that failed.", "server"),
		events:         r.counter(signalbox, "events_total", "Kubernetes Events by result: sent, dropped to stay within the rate, or failed.", "result"),
	}
	for _, g := range append(o.conditions(), o.configurationRejected) {
		g.WithLabelValues().Set(0)
	}
	return o
}

// conditions are the series without labels that begin at 0 with each
// configuration.
func (o *own) conditions() []*prometheus.GaugeVec {
	return []*prometheus.GaugeVec{o.conntrackUnavailable, o.nodeMissing, o.manifestProblems, o.savedState, o.affinityListsFull, o.routeSourcesLeftOut}
}

// factory makes vectors and registers them.
type factory struct{ prometheus.Registerer }

func (r factory) counter(prefix, name, help string, labels ...string) *prometheus.CounterVec {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: prefix, Name: name, Help: help}, labels)
	r.MustRegister(v)
	return v
}

func (r factory) gauge(prefix, name, help string, labels ...string) *prometheus.GaugeVec {
	v := prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: prefix, Name: name, Help: help}, labels)
	r.MustRegister(v)
	return v
}

func (r factory) histogram(prefix, name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	v := prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: prefix, Name: name, Help: help, Buckets: buckets}, labels)
	r.MustRegister(v)
	return v
}
