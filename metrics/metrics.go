package metrics

import (
	"github.com/prometheus/client_golang/prometheus"
)

// What the names begin with: kubeproxy_ where the name, type, labels and
// buckets are kube-proxy's, signalbox_ for what it has not.
const (
	kubeproxy = "kubeproxy"
	signalbox = "signalbox"
)

const ipFamily = "ip_family"

// The buckets of kube-proxy's histograms, in seconds.
var (
	syncBuckets    = prometheus.ExponentialBuckets(0.001, 2, 15)
	networkBuckets = concat(
		[]float64{0, 0.25, 0.5},
		prometheus.LinearBuckets(1, 1, 59),
		prometheus.LinearBuckets(60, 5, 12),
		prometheus.LinearBuckets(120, 30, 7),
	)
)

// kernelBuckets are finer than kube-proxy's: half a millisecond to a minute.
var kernelBuckets = prometheus.ExponentialBuckets(0.0005, 2, 18)

// compatible are the series that kube-proxy has, in every mode.
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
		networkProgramming: r.histogram(kubeproxy, "network_programming_duration_seconds", "Time from a change of a Service's endpoints, as its EndpointSlice tells it, to its being in the kernel.",
			networkBuckets, ipFamily),
		lastTimestamp: r.gauge(kubeproxy, "sync_proxy_rules_last_timestamp_seconds", "When the kernel was last brought to what is wanted, in Unix time.",
			ipFamily),
		noLocalEndpoints: r.gauge(kubeproxy, "sync_proxy_rules_no_local_endpoints_total", "Service ports with the traffic policy Local that have endpoints, but none on this node.",
			"traffic_policy", ipFamily),
		healthz: r.counter(kubeproxy, "proxy_healthz_total", "Answers of /healthz by HTTP status.", "code"),
		livez:   r.counter(kubeproxy, "proxy_livez_total", "Answers of /livez by HTTP status.", "code"),
		reconcilerDuration: r.histogram(kubeproxy, "conntrack_reconciler_sync_duration_seconds", "Time that a pass over the connection-tracking table took.",
			syncBuckets, ipFamily),
		reconcilerDeleted: r.counter(kubeproxy, "conntrack_reconciler_deleted_entries_total", "Flows to endpoints that are gone that were removed from the connection-tracking table.",
			ipFamily),
		buildInfo: r.gauge("kubernetes", "build_info", "1 for the release of Kubernetes: the API server's, or else the one that this behaves like.",
			"major", "minor", "git_version", "git_commit", "git_tree_state", "build_date", "go_version", "compiler", "platform"),
	}
}

// own are the series that kube-proxy has not.
type own struct {
	syncs          *prometheus.CounterVec
	eventToKernel  *prometheus.HistogramVec
	repaired       *prometheus.CounterVec
	setAside       *prometheus.GaugeVec
	servicePorts   *prometheus.GaugeVec
	endpoints      *prometheus.GaugeVec
	kernelObjects  *prometheus.GaugeVec
	problems       *prometheus.CounterVec
	flowsRemoved   *prometheus.CounterVec
	flowPassErrors *prometheus.CounterVec

	buildInfo, modeInfo, familyServed *prometheus.GaugeVec
	configurationRejected             *prometheus.GaugeVec
	sysctlProblem                     *prometheus.GaugeVec
	sourceFailing                     *prometheus.GaugeVec
	nodeMissing, manifestProblems     *prometheus.GaugeVec
	affinityListsFull                 *prometheus.GaugeVec
	leftovers                         *prometheus.GaugeVec
	flowsUnseen                       *prometheus.GaugeVec
	healthChecks                      *prometheus.GaugeVec
	listenFailing                     *prometheus.GaugeVec
	listenFailures                    *prometheus.CounterVec
	events                            *prometheus.CounterVec
}

func newOwn(r factory) own {
	o := own{
		syncs: r.counter(signalbox, "syncs_total", "Syncs by what was to be written (change, everything) and how they ended (success, failure).",
			"scope", "result", ipFamily),
		eventToKernel: r.histogram(signalbox, "event_to_kernel_duration_seconds", "Time from an update's arrival in this process to its being in the kernel; of updates written together, the oldest counts.",
			kernelBuckets, ipFamily),
		repaired: r.counter(signalbox, "drift_repaired_total", "How often the kernel's state had become unknown, or was not what had been written, and everything was written anew.",
			ipFamily),
		setAside: r.gauge(signalbox, "service_ports_set_aside", "Service ports in quarantine: the kernel refuses their rules, and what was served there before still is; or their Service is too large.",
			ipFamily),
		servicePorts: r.gauge(signalbox, "service_ports", "Service ports that are served.", ipFamily),
		endpoints:    r.gauge(signalbox, "endpoints", "Endpoints that answer, counted for each Service port that they serve.", ipFamily),
		kernelObjects: r.gauge(signalbox, "kernel_objects", "What the mode keeps in the kernel, by table (empty for what is in none) and kind.",
			"table", "kind", ipFamily),
		problems: r.counter(signalbox, "object_problems_total", "Parts of objects that were found not to be servable, by the object's kind.",
			"kind"),
		flowsRemoved:   r.counter(signalbox, "flows_removed_total", "UDP flows to endpoints that are gone that were removed.", ipFamily),
		flowPassErrors: r.counter(signalbox, "flow_pass_failures_total", "Passes over the connection-tracking table that failed and are made again.", ipFamily),

		buildInfo:             r.gauge(signalbox, "build_info", "1 for the release at work.", "version", "revision", "go_version"),
		modeInfo:              r.gauge(signalbox, "mode_info", "1 for the mode at work.", "mode"),
		familyServed:          r.gauge(signalbox, "family_served", "1 for an IP family that is served, 0 for one that is not.", ipFamily),
		configurationRejected: r.gauge(signalbox, "configuration_rejected", "1 while the configuration file says something that cannot be used, or not yet, so that what it said before is in force."),
		sysctlProblem:         r.gauge(signalbox, "sysctl_problem", "1 for a kernel setting that could not be made.", "sysctl"),
		sourceFailing: r.gauge(signalbox, "source_failing", "1 for a resource that the API server at present does not tell of, 0 for one that it does.",
			"resource"),
		nodeMissing:       r.gauge(signalbox, "node_missing", "1 while no Node object has the name of this node."),
		manifestProblems:  r.gauge(signalbox, "manifest_problems", "Files of the --source directory that are not served as they are, because they cannot be read or have a fault."),
		affinityListsFull: r.gauge(signalbox, "affinity_lists_full", "Mode iptables: endpoints with session affinity whose list of clients is full, so that a new client drives another out."),
		flowsUnseen:       r.gauge(signalbox, "conntrack_unavailable", "1 where the connection-tracking table cannot be had, so that stale UDP flows are not removed."),
		leftovers: r.gauge(signalbox, "leftovers", "1 while rules of others for Services are there that may be obeyed: they could not be removed, or a kube-proxy that was started later wrote them.",
			ipFamily),
		healthChecks: r.gauge(signalbox, "service_health_checks", "Services with a healthCheckNodePort.", ipFamily),
		listenFailing: r.gauge(signalbox, "listen_failing", "Addresses at which a server (healthz, metrics, service-health) should listen and at present cannot.",
			"server"),
		listenFailures: r.counter(signalbox, "listen_failures_total", "Attempts to listen that failed.", "server"),
		events:         r.counter(signalbox, "events_total", "Kubernetes Events by what became of them: sent, dropped to stay within the rate, or failed.", "result"),
	}
	for _, g := range []*prometheus.GaugeVec{o.flowsUnseen, o.nodeMissing, o.manifestProblems, o.affinityListsFull} {
		g.WithLabelValues().Set(0)
	}
	o.configurationRejected.WithLabelValues().Set(0)
	return o
}

// The names of what is read at each scrape.
type scraped struct {
	lastQueued                            *prometheus.Desc
	serviceChanges, serviceChangesPending *prometheus.Desc
	sliceChanges, sliceChangesPending     *prometheus.Desc
	objects, pendingAge                   *prometheus.Desc
	relayConnections, relayFlows          *prometheus.Desc
	relayAccepted, relayFlowsMade         *prometheus.Desc
	relayDialFailures, relayNoEndpoint    *prometheus.Desc
	relayRefused, relayAcceptFailures     *prometheus.Desc
	relayTransparent, relayLost           *prometheus.Desc
	relayMaxConnections, relayMaxFlows    *prometheus.Desc

	localhostListeners, localhostFailures, localhostRefused *prometheus.Desc
}

func newScraped() scraped {
	desc := func(prefix, name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(prefix+"_"+name, help, labels, nil)
	}
	return scraped{
		lastQueued:            desc(kubeproxy, "sync_proxy_rules_last_queued_timestamp_seconds", "When something to do last came in, in Unix time.", ipFamily),
		serviceChanges:        desc(kubeproxy, "sync_proxy_rules_service_changes_total", "Additions, changes and deletions of Services that came in."),
		serviceChangesPending: desc(kubeproxy, "sync_proxy_rules_service_changes_pending", "Those of them that no sync has ended yet."),
		sliceChanges:          desc(kubeproxy, "sync_proxy_rules_endpoint_changes_total", "Additions, changes and deletions of EndpointSlices that came in."),
		sliceChangesPending:   desc(kubeproxy, "sync_proxy_rules_endpoint_changes_pending", "Those of them that no sync has ended yet."),

		objects:    desc(signalbox, "objects", "Objects that are held, by kind.", "kind"),
		pendingAge: desc(signalbox, "oldest_pending_update_age_seconds", "How long the oldest update has waited that is not in the kernel yet; 0 where none waits.", ipFamily),

		relayConnections:    desc(signalbox, "relay_open_connections", "Mode userspace: TCP connections that are open.", ipFamily),
		relayFlows:          desc(signalbox, "relay_open_flows", "Mode userspace: UDP flows that are open.", ipFamily),
		relayAccepted:       desc(signalbox, "relay_connections_total", "Mode userspace: TCP connections that were accepted.", ipFamily),
		relayFlowsMade:      desc(signalbox, "relay_flows_total", "Mode userspace: UDP flows that were made.", ipFamily),
		relayDialFailures:   desc(signalbox, "relay_dial_failures_total", "Mode userspace: attempts to reach an endpoint that failed.", ipFamily),
		relayNoEndpoint:     desc(signalbox, "relay_no_endpoint_total", "Mode userspace: connections and datagrams that no endpoint was found for.", ipFamily),
		relayRefused:        desc(signalbox, "relay_refused_total", "Mode userspace: connections and datagrams that found as many open as there may be.", ipFamily),
		relayAcceptFailures: desc(signalbox, "relay_accept_failures_total", "Mode userspace: connections that could not be accepted, for want of file descriptors most likely.", ipFamily),
		relayMaxConnections: desc(signalbox, "relay_max_connections", "Mode userspace: as many TCP connections may be open.", ipFamily),
		relayMaxFlows:       desc(signalbox, "relay_max_flows", "Mode userspace: as many UDP flows may be open.", ipFamily),
		relayLost:           desc(signalbox, "relay_lost_datagrams_total", "Mode userspace: datagrams of clients and answers that found no room on this node, or that it would not send.", ipFamily),
		relayTransparent:    desc(signalbox, "relay_transparent_total", "Mode userspace: connections and flows that bore their client's address to the endpoint.", ipFamily),

		localhostListeners: desc(kubeproxy, "nftables_localhost_nodeport_listeners", "TCP NodePorts that have a listener on loopback.", ipFamily),
		localhostFailures:  desc(kubeproxy, "nftables_localhost_nodeport_listener_creation_failures_total", "Attempts to listen at a NodePort on loopback that failed.", ipFamily),
		localhostRefused:   desc(kubeproxy, "nftables_localhost_nodeport_rejected_packets_total", "Packets to NodePorts on loopback that were refused, because the relay there carries TCP alone.", ipFamily, "protocol"),
	}
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

func concat(parts ...[]float64) (all []float64) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}
