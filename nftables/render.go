package nftables

import (
	"fmt"
	"slices"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Render prints the table that New and one Sync would make of plan, in the form
// of `nft list table`. It touches no kernel. A plan that Sync would refuse
// renders as a comment that says why.
func Render(opts proxier.Options, plan *plan.Plan) string {
	f := familyOf(opts.Family)
	rules := ruleset{f, opts.MasqueradeMark, plan.Node}
	err := ValidateNode(rules.family, rules.node)
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
	elements := make([][]string, setCount)
	emit := func(e element) { elements[e.set] = append(elements[e.set], schemas[e.set].elementText(&e, r.family)) }
	r.compileNode(emit)
	st.emitAll(emit)

	for i := range schemas {
		if schemas[i].shared {
			slices.Sort(elements[i])
		}
	}
	return renderTable(r.family, tableName, r.counters(), schemas, elements, r.chains(st))
}
