package userspace

import (
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Dataplane is the userspace mode.
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

// Cleanup implements proxier.Mode. Connections end with the relay, and not with
// its rules; see proxier.Traits.RelaysByRules.
func (Dataplane) Cleanup(f plan.Family, _ bool) (removed bool, draining int, err error) {
	removed, err = Cleanup(f)
	return removed, 0, err
}

// Traits implements proxier.Mode.
func (Dataplane) Traits() proxier.Traits {
	return proxier.Traits{Localhost: proxier.LocalhostByRelay, RelaysByRules: true}
}
