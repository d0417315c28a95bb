package nftables

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/nft/access"
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

// Cleanup removes this mode's table of the family, and nothing else. It is no
// error if there is none, and then nothing is written and removed is false.
func Cleanup(f plan.Family) (removed bool, err error) {
	w, err := dial(nft.FamilyOf(f), tableName)
	if err != nil {
		return false, err
	}
	defer w.Close()
	removed = w.DeleteTable()
	err = access.Commit(w)
	if errors.Is(err, unix.EINVAL) { // of nfnetlink, which knows no nf_tables
		return false, &proxier.UnsupportedError{Mode: Mode, Family: f, Missing: "nf_tables", Remedy: "the kernel needs CONFIG_NF_TABLES (module nf_tables)", Err: err}
	}
	if err != nil {
		return false, fmt.Errorf("delete table %s of %s: %w", tableName, f, err)
	}
	return removed, nil
}

// Render prints the table that New and one Sync would make of plan, in the form
// of `nft list table`. It touches no kernel. A plan that Sync would refuse
// renders as a comment that says why.
func Render(opts proxier.Options, plan *plan.Plan) string {
	f := nft.FamilyOf(opts.Family)
	rules := rulesetOf(f, opts.MasqueradeMark, plan.Node)
	err := access.ValidateNode(rules.IPFamily, rules.Node)
	var st *state
	if err == nil {
		st, err = newStateOf(f, plan, nil, nil)
	}
	if err != nil {
		return fmt.Sprintf("# cannot be programmed: %v\n", err)
	}
	return rules.render(st)
}

// render prints the table that holds st.
func (r ruleset) render(st *state) string {
	var elements []nft.Element
	emit := func(e nft.Element) { elements = append(elements, e) }
	for _, e := range r.NodeElements() {
		emit(e)
	}
	st.emitAll(emit)
	return nft.RenderTable(r.IPFamily, tableName, r.counters(), allSets, elements, r.chains(st))
}
