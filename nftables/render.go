package nftables

import (
	"fmt"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

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
	return nft.RenderTable(r.IPFamily, tableName, r.counters(), schemas, elements, r.chains(st))
}
