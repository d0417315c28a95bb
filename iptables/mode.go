package iptables

import (
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Dataplane is the iptables mode.
type Dataplane struct{ proxier.ModeDefaults }

var _ proxier.Mode = Dataplane{}

// Name implements proxier.Mode.
func (Dataplane) Name() string { return Mode }

// Supported implements proxier.Mode.
func (Dataplane) Supported(f plan.Family) error { return Supported(f) }

// New implements proxier.Mode.
func (Dataplane) New(o proxier.Options) (proxier.Proxier, error) { return New(o) }

// Render implements proxier.Mode.
func (Dataplane) Render(o proxier.Options, p *plan.Plan) (string, error) { return Render(o, p) }

// Cleanup implements proxier.Mode. The rules can go: conntrack keeps connections.
func (Dataplane) Cleanup(f plan.Family, _ bool) (removed bool, draining int, err error) {
	removed, err = Cleanup(f)
	return removed, 0, err
}

// Init implements proxier.Mode.
func (Dataplane) Init(o proxier.Options, localhost bool) error { return Init(o, localhost) }

// FullAffinityLists implements proxier.Mode.
func (Dataplane) FullAffinityLists() (int, error) { return FullAffinityLists() }

// Traits implements proxier.Mode.
func (Dataplane) Traits() proxier.Traits {
	return proxier.Traits{
		Automatic:   true,
		FileSection: "iptables",
		Series: []string{
			"sync_full_proxy_rules_duration_seconds", "sync_partial_proxy_rules_duration_seconds",
			"sync_proxy_rules_iptables_restore_failures_total", "sync_proxy_rules_iptables_partial_restore_failures_total",
			"sync_proxy_rules_iptables_total", "sync_proxy_rules_iptables_last",
		},
		Localhost: proxier.LocalhostByRoute,
	}
}

// Is lets errors.Is find proxier.ErrUnknownOwner.
func (*UnknownOwnerError) Is(target error) bool { return target == proxier.ErrUnknownOwner }
