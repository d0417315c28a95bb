package nft

import (
	"fmt"
	"strings"
)

// RenderTable prints a table as `nft list table` does.
func RenderTable(f *IPFamily, name string, counters []string, sets []*Set, elements []Element, chains []Chain) string {
	texts := make([][]string, len(sets))
	for i := range elements {
		e := &elements[i]
		texts[e.Set] = append(texts[e.Set], sets[e.Set].ElementText(e, f))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "table %s %s {\n", f.Word, name)
	for _, c := range counters {
		fmt.Fprintf(&b, "\tcounter %s {\n\t\tpackets 0 bytes 0\n\t}\n\n", c)
	}
	for i, s := range sets {
		b.WriteString(s.Text(f, texts[i]))
	}
	for _, c := range chains {
		b.WriteString(c.Text())
	}
	b.WriteString("}\n")
	return b.String()
}

// Text is the set with its elements as `nft list` writes it.
func (s *Set) Text(f *IPFamily, elements []string) string {
	var b strings.Builder
	kind, types := "set", typeText(f, s.Key)
	if s.Verdicts {
		kind, types = "map", types+" : verdict"
	} else if s.Data != nil {
		kind, types = "map", types+" : "+typeText(f, s.Data)
	}
	fmt.Fprintf(&b, "\t%s %s {\n\t\ttype %s\n", kind, s.Name, types)
	if s.Dynamic {
		fmt.Fprintf(&b, "\t\tsize %d\n\t\tflags dynamic,timeout\n", s.Size)
	}
	if s.Interval {
		b.WriteString("\t\tflags interval\n")
	}
	if s.Comment != "" {
		fmt.Fprintf(&b, "\t\tcomment %q\n", s.Comment)
	}
	if len(elements) > 0 {
		fmt.Fprintf(&b, "\t\telements = { %s }\n", strings.Join(elements, ",\n\t\t\t     "))
	}
	b.WriteString("\t}\n\n")
	return b.String()
}

// Text is the chain with its rules as `nft list` writes it.
func (c Chain) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\tchain %s {\n", c.Name)
	if c.Hook != nil {
		fmt.Fprintf(&b, "\t\t%s; policy accept;\n", c.Hook.text)
	}
	for _, r := range c.Rules {
		fmt.Fprintf(&b, "\t\t%s\n", r.text())
	}
	b.WriteString("\t}\n\n")
	return b.String()
}
