package nftables

import (
	"fmt"
	"strings"
)

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
		fmt.Fprintf(&b, "\t\tsize %d\n\t\tflags dynamic,timeout\n", s.size)
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
