// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
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

// Differences says how the kernel's table differs from these chains and from the elements
// that wanted hands out. An element is written as nft writes it: with "-" if the kernel lacks
// it, and with "+" if it is not wanted. With part, wanted hands out a part of the table's
// elements. Then the kernel is asked for these and for others with the same keys, and holds
// are those that are as wanted.
func (t *Table) Differences(chains []Chain, wanted func(emit func(Element)), part bool) (lines, holds []string, err error) {
	contents, err := t.Inspect()
	if err != nil {
		return nil, nil, err
	}
	lines, err = t.CompareChains(contents, chains)
	if err != nil || contents == nil {
		return lines, nil, err
	}
	read, list := func() (KernelElements, error) { return t.ReadElements() }, wanted
	if part {
		p := t.partOf(wanted)
		read, list = p.read, p.each
	}
	have, err := read()
	if err != nil {
		return nil, nil, err
	}
	text := func(sign string, e *Element) string {
		s := t.sets[e.Set]
		return fmt.Sprintf("%selement %s %s %s { %s }", sign, t.IPFamily.Word, t.table.Name, s.Name, s.ElementText(e, t.IPFamily))
	}
	list(func(e Element) {
		switch as := have.use(t.sets[e.Set], &e); {
		case !as:
			lines = append(lines, text("-", &e))
		case part:
			holds = append(holds, text("", &e))
		}
	})
	for place, e := range have {
		if !place.closes {
			lines = append(lines, text("+", t.elementOf(place, &e)))
		}
	}
	slices.Sort(lines)
	slices.Sort(holds)
	return lines, holds, nil
}

// part has some elements of a table, each once, and their keys. Keys of several fields mean
// the same in each set with these fields. Keys of one field, such as a number, mean another
// thing in each set.
type part struct {
	table    *Table
	elements map[ElementID]Element
	keys     map[string]map[string]bool // by keysOf
}

func (t *Table) partOf(elements func(emit func(Element))) *part {
	p := &part{t, map[ElementID]Element{}, map[string]map[string]bool{}}
	elements(func(e Element) {
		p.elements[e.ID()] = e
		keys := t.sets[e.Set].keysOf()
		if p.keys[keys] == nil {
			p.keys[keys] = map[string]bool{}
		}
		p.keys[keys][e.Key] = true
	})
	return p
}

// keysOf names what the set's keys mean.
func (s *Set) keysOf() string {
	if len(s.Key) == 1 {
		return s.Name
	}
	return fmt.Sprintf("%d", s.Key)
}

func (p *part) each(emit func(Element)) {
	for _, e := range p.elements {
		emit(e)
	}
}

// maxQuestions is how many elements of a set are asked for one by one. More than that take
// longer than a listing of a large set.
const maxQuestions = 2000

// read reads the elements that have the part's keys. Ranges are not asked for by their
// start: the kernel answers with a range around it.
func (p *part) read() (KernelElements, error) {
	k := make(KernelElements)
	for i, s := range p.table.sets {
		keys, id := p.keys[s.keysOf()], SetID(i)
		if len(keys) == 0 || s.Dynamic {
			continue
		}
		read := func() ([]nftables.SetElement, error) { return p.table.readKeys(id, keys) }
		if s.Interval || len(keys) > maxQuestions {
			read = func() ([]nftables.SetElement, error) { return p.table.Read(id) }
		}
		elements, err := read()
		if err != nil {
			return nil, err
		}
		for i := range elements {
			if keys[string(elements[i].Key)] || elements[i].IntervalEnd {
				k[placeOf(id, &elements[i])] = elements[i]
			}
		}
	}
	return k, nil
}

// elementOf is an element that was read. It has no datum of another size than the set's:
// other software may have declared another set.
func (t *Table) elementOf(place elementPlace, have *nftables.SetElement) *Element {
	e := &Element{Set: place.set, Key: place.key, End: place.end, Comment: have.Comment, Chain: verdictChain(have.Val)}
	size := 0
	for _, field := range t.sets[place.set].Data {
		size += field.Size(t.IPFamily)
	}
	e.Data = string(append(slices.Clone(have.Val), make([]byte, size)...)[:size])
	return e
}

// use removes an element, and says whether it was there in the same form.
func (k KernelElements) use(s *Set, e *Element) bool {
	all := true
	for _, part := range s.LibraryElements(e, nil) {
		place := placeOf(e.Set, &part)
		if have, present := k[place]; present && same(&have, &part) {
			delete(k, place)
		} else {
			all = false
		}
	}
	return all
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
