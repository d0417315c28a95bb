package nftables

import (
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Dataplane is the nftables mode.
type Dataplane struct{ proxier.ModeDefaults }

var _ proxier.Mode = Dataplane{}

// Name implements proxier.Mode.
func (Dataplane) Name() string { return Mode }

// Supported implements proxier.Mode.
func (Dataplane) Supported(f plan.Family) error { return Supported(f) }

// New implements proxier.Mode.
func (Dataplane) New(o proxier.Options) (proxier.Proxier, error) { return New(o) }

// Render implements proxier.Mode.
func (Dataplane) Render(o proxier.Options, p *plan.Plan) (string, error) { return Render(o, p), nil }

// Cleanup implements proxier.Mode. The table can go: conntrack keeps connections.
func (Dataplane) Cleanup(f plan.Family, _ bool) (removed bool, draining int, err error) {
	removed, err = Cleanup(f)
	return removed, 0, err
}

// Traits implements proxier.Mode. As with kube-proxy since 1.31, NodePorts are at
// the Node's own addresses.
func (Dataplane) Traits() proxier.Traits {
	return proxier.Traits{
		Automatic:   true,
		FileSection: "nftables",
		Series: []string{
			"sync_full_proxy_rules_duration_seconds", "sync_partial_proxy_rules_duration_seconds",
			"sync_proxy_rules_nftables_sync_failures_total", "sync_proxy_rules_nftables_cleanup_failures_total",
		},
		PrimaryNodePorts: true,
		Localhost:        proxier.LocalhostByRelay,
	}
}
