package ipvs

import (
	"context"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Dataplane is the ipvs mode.
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

// Cleanup implements proxier.Mode. A connection ends with its virtual server.
func (Dataplane) Cleanup(f plan.Family, drain bool) (removed bool, draining int, err error) {
	return leave(f, drain)
}

// Init implements proxier.Mode.
func (Dataplane) Init(o proxier.Options, _ bool) error { return Init(o) }

// KubeProxy implements proxier.Mode.
func (Dataplane) KubeProxy() []proxier.Remnant {
	return []proxier.Remnant{{
		What:  "kube-proxy's IPVS servers, addresses and ipsets",
		Found: func(_ context.Context, f plan.Family, _ proxier.TakenOver) bool { return HasKubeProxy(f) },
		Remove: func(f plan.Family, taken proxier.TakenOver, drain bool) (removed bool, draining int, err error) {
			return CleanupKubeProxy(f, taken.IPVS, drain)
		},
	}}
}

// Traits implements proxier.Mode. IPVS has no transactions, by which two processes
// could notice each other, and an earlier process ends virtual servers that have
// drained.
func (Dataplane) Traits() proxier.Traits {
	return proxier.Traits{
		FileSection:          "ipvs",
		FeatureGate:          "KubeProxyIPVS",
		Series:               []string{"sync_proxy_rules_iptables_restore_failures_total"},
		Schedulers:           true,
		RewriteAfterTakeover: true,
	}
}
