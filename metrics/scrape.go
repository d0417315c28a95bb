// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"signalbox/proxier"
	"signalbox/proxier/syncer"
)

// reading is a series whose value each scrape reads from a T.
type reading[T any] struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(T) float64
}

func counterOf[T any](prefix, name, help string, value func(T) float64, labels ...string) reading[T] {
	return reading[T]{prometheus.NewDesc(prefix+"_"+name, help, labels, nil), prometheus.CounterValue, value}
}

func gaugeOf[T any](prefix, name, help string, value func(T) float64, labels ...string) reading[T] {
	return reading[T]{prometheus.NewDesc(prefix+"_"+name, help, labels, nil), prometheus.GaugeValue, value}
}

func (r reading[T]) send(ch chan<- prometheus.Metric, from T, labels ...string) {
	ch <- prometheus.MustNewConstMetric(r.desc, r.kind, r.value(from), labels...)
}

var progressReadings = []reading[syncer.Progress]{
	counterOf(kubeproxy, "sync_proxy_rules_service_changes_total", "Additions, changes and deletions of Services that came in.",
		func(p syncer.Progress) float64 { return float64(p.Services.Total) }),
	gaugeOf(kubeproxy, "sync_proxy_rules_service_changes_pending", "Changes of Services that no sync has written yet.",
		func(p syncer.Progress) float64 { return float64(p.Services.Pending) }),
	counterOf(kubeproxy, "sync_proxy_rules_endpoint_changes_total", "Additions, changes and deletions of EndpointSlices that came in.",
		func(p syncer.Progress) float64 { return float64(p.EndpointSlices.Total) }),
	gaugeOf(kubeproxy, "sync_proxy_rules_endpoint_changes_pending", "Changes of EndpointSlices that no sync has written yet.",
		func(p syncer.Progress) float64 { return float64(p.EndpointSlices.Pending) }),
}

var (
	objects = gaugeOf(signalbox, "objects", "Objects that are held, by kind.",
		func(n int) float64 { return float64(n) }, "kind")
	pendingAge = gaugeOf(signalbox, "oldest_pending_update_age_seconds", "Age of the oldest update that is not in the kernel yet; 0 if there is none.",
		time.Duration.Seconds, ipFamily)
	lastQueued = gaugeOf(kubeproxy, "sync_proxy_rules_last_queued_timestamp_seconds", "Unix time at which the last change came in.",
		seconds, ipFamily)
)

var relayReadings = []reading[proxier.RelayStats]{
	gaugeOf(signalbox, "relay_open_connections", "Mode userspace: open TCP connections.",
		func(s proxier.RelayStats) float64 { return float64(s.Connections) }, ipFamily),
	gaugeOf(signalbox, "relay_open_flows", "Mode userspace: open UDP flows.",
		func(s proxier.RelayStats) float64 { return float64(s.Flows) }, ipFamily),
	gaugeOf(signalbox, "relay_max_connections", "Mode userspace: limit of open TCP connections.",
		func(s proxier.RelayStats) float64 { return float64(s.MaxConnections) }, ipFamily),
	gaugeOf(signalbox, "relay_max_flows", "Mode userspace: limit of open UDP flows.",
		func(s proxier.RelayStats) float64 { return float64(s.MaxFlows) }, ipFamily),
	counterOf(signalbox, "relay_connections_total", "Mode userspace: TCP connections that were accepted.",
		func(s proxier.RelayStats) float64 { return float64(s.Accepted) }, ipFamily),
	counterOf(signalbox, "relay_flows_total", "Mode userspace: UDP flows that were opened.",
		func(s proxier.RelayStats) float64 { return float64(s.FlowsMade) }, ipFamily),
	counterOf(signalbox, "relay_dial_failures_total", "Mode userspace: attempts to reach an endpoint that failed.",
		func(s proxier.RelayStats) float64 { return float64(s.DialFailures) }, ipFamily),
	counterOf(signalbox, "relay_no_endpoint_total", "Mode userspace: connections and datagrams for which no endpoint was found.",
		func(s proxier.RelayStats) float64 { return float64(s.NoEndpoint) }, ipFamily),
	counterOf(signalbox, "relay_refused_total", "Mode userspace: connections and datagrams beyond the limit of open ones.",
		func(s proxier.RelayStats) float64 { return float64(s.Refused) }, ipFamily),
	counterOf(signalbox, "relay_accept_failures_total", "Mode userspace: connections that could not be accepted, most likely for lack of file descriptors.",
		func(s proxier.RelayStats) float64 { return float64(s.AcceptFailures) }, ipFamily),
	counterOf(signalbox, "relay_lost_datagrams_total", "Mode userspace: datagrams of clients and answers that this node had no room for, or did not send.",
		func(s proxier.RelayStats) float64 { return float64(s.Lost) }, ipFamily),
	counterOf(signalbox, "relay_transparent_total", "Mode userspace: connections and flows that reached the endpoint with their client's address.",
		func(s proxier.RelayStats) float64 { return float64(s.Transparent) }, ipFamily),
}

var localhostReadings = []reading[proxier.LocalhostStats]{
	gaugeOf(kubeproxy, "nftables_localhost_nodeport_listeners", "TCP NodePorts that have a listener on loopback.",
		func(s proxier.LocalhostStats) float64 { return float64(s.Listeners) }, ipFamily),
	counterOf(kubeproxy, "nftables_localhost_nodeport_listener_creation_failures_total", "Attempts to listen at a NodePort on loopback that failed.",
		func(s proxier.LocalhostStats) float64 { return float64(s.Failures) }, ipFamily),
}

var localhostRefused = counterOf(kubeproxy, "nftables_localhost_nodeport_rejected_packets_total", "Packets to NodePorts on loopback that were refused, because the relay there carries only TCP.",
	func(packets uint64) float64 { return float64(packets) }, ipFamily, "protocol")

// Describe implements prometheus.Collector. It announces no series: a mode
// without a relay has none of a relay's.
func (m *Metrics) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.progress != nil {
		m.collectProgress(ch, m.progress())
	}
	if m.relays != nil {
		for family, stats := range m.relays() {
			for _, r := range relayReadings {
				r.send(ch, stats, family.String())
			}
		}
	}
	if m.localhost != nil {
		for family, stats := range m.localhost() {
			for _, r := range localhostReadings {
				r.send(ch, stats, family.String())
			}
			for protocol, packets := range stats.Refused {
				localhostRefused.send(ch, packets, family.String(), strings.ToUpper(protocol.String()))
			}
		}
	}
}

func (m *Metrics) collectProgress(ch chan<- prometheus.Metric, p syncer.Progress) {
	p.Services.Total += m.earlier.services
	p.EndpointSlices.Total += m.earlier.slices
	for _, r := range progressReadings {
		r.send(ch, p)
	}
	objects.send(ch, p.Objects.Services, "Service")
	objects.send(ch, p.Objects.EndpointSlices, "EndpointSlice")
	objects.send(ch, p.Objects.Nodes, "Node")
	objects.send(ch, p.Objects.ServiceCIDRs, "ServiceCIDR")
	for family, since := range p.Pending {
		age := time.Duration(0)
		if !since.IsZero() {
			age = m.now().Sub(since)
		}
		pendingAge.send(ch, age, family.String())
		if !p.LastQueued.IsZero() {
			lastQueued.send(ch, p.LastQueued, family.String())
		}
	}
}

func seconds(t time.Time) float64 { return float64(t.UnixNano()) / float64(time.Second) }
