package nftables

import (
	"fmt"
	"slices"
	"strings"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Render prints the table that New and one Sync would make of plan, in the form
// of `nft list table`. It touches no kernel. A plan that Sync would refuse
// renders as a comment that says why.
func Render(opts proxier.Options, plan *plan.Plan) string {
	f := familyOf(opts.Family)
	rules := ruleset{f, opts.MasqueradeMark, plan.Node}
	err := rules.ValidateNode(rules.node)
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
	emit := func(e element) { elements[e.set] = append(elements[e.set], e.text(r.family)) }
	r.compileNode(emit)
	st.emitAll(emit)

	for i := range schemas {
		if schemas[i].shared {
			slices.Sort(elements[i])
		}
	}
	return renderTable(r.family, tableName, r.counters(), schemas, elements, r.chains(st))
}

// renderTable prints a table; elements are texts, by set.
func renderTable(f *family, name string, counters []string, schemas []*schema, elements [][]string, chains []chain) string {
	var b strings.Builder
	fmt.Fprintf(&b, "table %s %s {\n", f.word, name)
	for _, c := range counters {
		fmt.Fprintf(&b, "\tcounter %s {\n\t\tpackets 0 bytes 0\n\t}\n\n", c)
	}
	for i, s := range schemas {
		b.WriteString(s.text(f, elements[i]))
	}
	for _, c := range chains {
		b.WriteString(c.text())
	}
	b.WriteString("}\n")
	return b.String()
}

func (s *schema) text(f *family, elements []string) string {
	var b strings.Builder
	kind, types := "set", typeText(f, s.key)
	if s.verdicts {
		kind, types = "map", types+" : verdict"
	} else if s.data != nil {
		kind, types = "map", types+" : "+typeText(f, s.data)
	}
	fmt.Fprintf(&b, "\t%s %s {\n\t\ttype %s\n", kind, s.name, types)
	if s.dynamic {
		fmt.Fprintf(&b, "\t\tsize %d\n\t\tflags dynamic,timeout\n", affinitySize)
	}
	if s.interval {
		b.WriteString("\t\tflags interval\n")
	}
	if s.comment != "" {
		fmt.Fprintf(&b, "\t\tcomment %q\n", s.comment)
	}
	if len(elements) > 0 {
		fmt.Fprintf(&b, "\t\telements = { %s }\n", strings.Join(elements, ",\n\t\t\t     "))
	}
	b.WriteString("\t}\n\n")
	return b.String()
}

func (c chain) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\tchain %s {\n", c.name)
	if c.hook != nil {
		fmt.Fprintf(&b, "\t\t%s; policy accept;\n", c.hook.text)
	}
	for _, r := range c.rules {
		fmt.Fprintf(&b, "\t\t%s\n", r.text())
	}
	b.WriteString("\t}\n\n")
	return b.String()
}
