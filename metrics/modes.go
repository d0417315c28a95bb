// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"fmt"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"signalbox/proxier"
	"signalbox/proxier/syncer"
)

// modeSeries is a series that kube-proxy has only in some modes.
type modeSeries struct {
	prometheus.Collector
	synced func(family string, r syncer.SyncReport)
}

// seriesOfModes are the series that kube-proxy has only in some modes. They are
// exposed while such a mode runs, and continue when it runs again.
type seriesOfModes struct {
	byName  map[string]modeSeries // without the prefix
	exposed []string
}

func newSeriesOfModes() seriesOfModes {
	s := seriesOfModes{byName: map[string]modeSeries{}}
	r := factory{prometheus.NewRegistry()} // not exposed itself: expose registers the series
	duration := func(name, help string, all bool) {
		v := r.histogram(kubeproxy, name, help, syncBuckets, ipFamily)
		s.byName[name] = modeSeries{v, func(family string, r syncer.SyncReport) {
			if r.All == all {
				v.WithLabelValues(family).Observe(r.Took.Seconds())
			}
		}}
	}
	duration("sync_full_proxy_rules_duration_seconds", "Time that a sync of everything took.", true)
	duration("sync_partial_proxy_rules_duration_seconds", "Time that a sync of changes took.", false)
	count := func(name, help string, counts func(r syncer.SyncReport) bool) {
		v := r.counter(kubeproxy, name, help, ipFamily)
		s.byName[name] = modeSeries{v, func(family string, r syncer.SyncReport) {
			if counts(r) {
				v.WithLabelValues(family).Inc()
			}
		}}
	}
	failed := func(r syncer.SyncReport) bool { return r.Err != nil }
	count("sync_proxy_rules_iptables_restore_failures_total", "Syncs that failed.", failed)
	count("sync_proxy_rules_iptables_partial_restore_failures_total", "Syncs of changes that failed.",
		func(r syncer.SyncReport) bool { return r.Err != nil && !r.All })
	count("sync_proxy_rules_nftables_sync_failures_total", "Syncs that failed.", failed)
	count("sync_proxy_rules_nftables_cleanup_failures_total", "Failed removals of unused objects. Always 0: each sync removes what it makes unused.",
		func(syncer.SyncReport) bool { return false })
	rules := func(name, help string, value func(proxier.KernelObjects) int) {
		v := r.gauge(kubeproxy, name, help, "table", ipFamily)
		s.byName[name] = modeSeries{v, func(family string, r syncer.SyncReport) {
			for _, k := range r.Kernel {
				if k.Kind == "rule" {
					v.WithLabelValues(k.Table, family).Set(float64(value(k)))
				}
			}
		}}
	}
	rules("sync_proxy_rules_iptables_total", "Rules of this mode in a table of iptables.", func(k proxier.KernelObjects) int { return k.Count })
	rules("sync_proxy_rules_iptables_last", "Rules that the last sync wrote into a table of iptables.", func(k proxier.KernelObjects) int { return k.Written })
	return s
}

// expose replaces the series of one mode by another's. Series of both modes are
// exposed all the time.
func (s *seriesOfModes) expose(r prometheus.Registerer, mode proxier.Mode) {
	next := mode.Traits().Series
	for _, name := range s.exposed {
		if !slices.Contains(next, name) {
			r.Unregister(s.byName[name].Collector)
		}
	}
	for _, name := range next {
		series, ok := s.byName[name]
		if !ok {
			panic(fmt.Sprintf("mode %s has the series %s, which package metrics does not know", mode.Name(), name))
		}
		if !slices.Contains(s.exposed, name) {
			r.MustRegister(series.Collector)
		}
	}
	s.exposed = next
}

// begin creates the counters of a family, with 0 if they are new.
func (s *seriesOfModes) begin(family string) {
	for _, name := range s.exposed {
		if counter, ok := s.byName[name].Collector.(*prometheus.CounterVec); ok {
			counter.WithLabelValues(family).Add(0)
		}
	}
}

// forget deletes the gauges of a family that is no longer served.
func (s *seriesOfModes) forget(family string) {
	for _, series := range s.byName {
		if gauge, ok := series.Collector.(*prometheus.GaugeVec); ok {
			gauge.DeletePartialMatch(prometheus.Labels{ipFamily: family})
		}
	}
}

func (s *seriesOfModes) synced(family string, r syncer.SyncReport) {
	for _, name := range s.exposed {
		s.byName[name].synced(family, r)
	}
}
