package metrics

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"signalbox/proxier/syncer"
)

// The modes whose series differ; the names are those of --mode.
const (
	modeIPTables = "iptables"
	modeNFTables = "nftables"
	modeIPVS     = "ipvs"
)

// modeSeries are the series that kube-proxy has only in some modes. They are
// exposed while such a mode runs, and continue when it runs again.
type modeSeries struct {
	fullSyncDuration, partialSyncDuration *prometheus.HistogramVec

	iptablesTotal, iptablesLast *prometheus.GaugeVec
	restoreFailures             *prometheus.CounterVec
	partialRestoreFailures      *prometheus.CounterVec
	nftablesFailures            *prometheus.CounterVec
	nftablesCleanupFailures     *prometheus.CounterVec
}

func newModeSeries() modeSeries {
	r := factory{prometheus.NewRegistry()} // not exposed itself: expose registers the series
	return modeSeries{
		fullSyncDuration: r.histogram(kubeproxy, "sync_full_proxy_rules_duration_seconds", "Time that a sync of everything took.",
			syncBuckets, ipFamily),
		partialSyncDuration: r.histogram(kubeproxy, "sync_partial_proxy_rules_duration_seconds", "Time that a sync of changes took.",
			syncBuckets, ipFamily),
		iptablesTotal:           r.gauge(kubeproxy, "sync_proxy_rules_iptables_total", "Rules of this mode in a table of iptables.", "table", ipFamily),
		iptablesLast:            r.gauge(kubeproxy, "sync_proxy_rules_iptables_last", "Rules that the last sync wrote into a table of iptables.", "table", ipFamily),
		restoreFailures:         r.counter(kubeproxy, "sync_proxy_rules_iptables_restore_failures_total", "Syncs that failed.", ipFamily),
		partialRestoreFailures:  r.counter(kubeproxy, "sync_proxy_rules_iptables_partial_restore_failures_total", "Syncs of changes that failed.", ipFamily),
		nftablesFailures:        r.counter(kubeproxy, "sync_proxy_rules_nftables_sync_failures_total", "Syncs that failed.", ipFamily),
		nftablesCleanupFailures: r.counter(kubeproxy, "sync_proxy_rules_nftables_cleanup_failures_total", "Failed removals of unused objects. Always 0: each sync removes what it makes unused.", ipFamily),
	}
}

// of returns the series of a mode.
func (s *modeSeries) of(mode string) []prometheus.Collector {
	switch mode {
	case modeIPTables:
		return []prometheus.Collector{
			s.fullSyncDuration, s.partialSyncDuration, s.restoreFailures, s.partialRestoreFailures, s.iptablesTotal, s.iptablesLast,
		}
	case modeNFTables:
		return []prometheus.Collector{s.fullSyncDuration, s.partialSyncDuration, s.nftablesFailures, s.nftablesCleanupFailures}
	case modeIPVS:
		return []prometheus.Collector{s.restoreFailures}
	}
	return nil
}

// expose replaces the series of one mode by another's. Series of both modes are
// exposed all the time.
func (s *modeSeries) expose(r prometheus.Registerer, before, mode string) {
	old, next := s.of(before), s.of(mode)
	for _, c := range old {
		if !slices.Contains(next, c) {
			r.Unregister(c)
		}
	}
	for _, c := range next {
		if !slices.Contains(old, c) {
			r.MustRegister(c)
		}
	}
}

// begin creates the counters of a mode and a family, with 0 if they are new.
func (s *modeSeries) begin(mode, family string) {
	for _, c := range s.of(mode) {
		if counter, ok := c.(*prometheus.CounterVec); ok {
			counter.WithLabelValues(family).Add(0)
		}
	}
}

func (s *modeSeries) synced(mode, family string, r syncer.SyncReport) {
	switch mode {
	case modeIPTables, modeNFTables:
		kind := s.partialSyncDuration
		if r.All {
			kind = s.fullSyncDuration
		}
		kind.WithLabelValues(family).Observe(r.Took.Seconds())
	}
	if r.Err == nil {
		return
	}
	switch mode {
	case modeIPTables:
		s.restoreFailures.WithLabelValues(family).Inc()
		if !r.All {
			s.partialRestoreFailures.WithLabelValues(family).Inc()
		}
	case modeIPVS:
		s.restoreFailures.WithLabelValues(family).Inc()
	case modeNFTables:
		s.nftablesFailures.WithLabelValues(family).Inc()
	}
}
