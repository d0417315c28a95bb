package iptables

import (
	"bytes"
	"cmp"
	"slices"
	"sort"
)

// script is input of iptables-restore, with a note of what its lines are
// about. Each table in it takes effect at once when its COMMIT is read.
type script struct {
	bytes.Buffer
	lines   int
	commits []int // numbers of the lines that say COMMIT
	spans   []span
	rules   counts // lines that write one
}

// span says whose the lines from first to the next span are; owner is empty
// for lines of no Service.
type span struct {
	first int
	owner string
}

func (s *script) line(owner string, parts ...string) {
	s.lines++
	if n := len(s.spans); n == 0 || s.spans[n-1].owner != owner {
		s.spans = append(s.spans, span{s.lines, owner})
	}
	for _, p := range parts {
		s.WriteString(p)
	}
	s.WriteByte('\n')
}

// table adds edits of one table; nothing where there are none. Naming a chain
// empties it, or makes it, so that a removal never fails for want of a chain.
//
// Chains come before those that jump to them, each with its rules at once, and
// those of one level in falling order of their names. The nft variant walks
// the sorted list of all chains named so far, up to the one it looks for, at
// every line: in this order it finds nearly every one at the begin. In the
// order in which Services come, ten thousand of them take four times as long.
//
// The jumps of the table are put in front of what their built-in chains hold.
func (s *script) table(t table, edits []edit, jumps ...jump) {
	if len(edits) == 0 {
		return
	}
	first := jumpLines(t, jumps)
	for _, e := range edits {
		s.rules[t] += len(e.rules)
	}
	s.rules[t] += len(first)
	s.section(t.String(), edits, first)
}

// jumpLines put the jumps of one table in.
func jumpLines(t table, jumps []jump) []string {
	var lines []string
	for _, j := range jumps {
		if j.table == t {
			lines = append(lines, "-I "+j.from+j.rule())
		}
	}
	return lines
}

// section is table with whole lines about rules of built-in chains.
func (s *script) section(table string, edits []edit, builtin []string) {
	slices.SortFunc(edits, func(a, b edit) int {
		return cmp.Or(cmp.Compare(a.level, b.level), cmp.Compare(b.name, a.name))
	})
	s.line("", "*", table)
	for _, e := range edits {
		s.line("", ":", e.name, " - [0:0]")
		for _, rule := range e.rules {
			s.line(rule.owner, "-A ", e.name, rule.text)
		}
	}
	for _, line := range builtin {
		s.line("", line)
	}
	for _, e := range edits {
		if e.gone {
			s.line("", "-X ", e.name)
		}
	}
	s.line("", "COMMIT")
	s.commits = append(s.commits, s.lines)
}

// owner is the Service that a line is about, or "".
func (s *script) owner(line int) string {
	i := sort.Search(len(s.spans), func(i int) bool { return s.spans[i].first > line })
	if i == 0 {
		return ""
	}
	return s.spans[i-1].owner
}

// committedBefore says whether a table was committed before the line was read.
func (s *script) committedBefore(line int) bool {
	return len(s.commits) > 0 && s.commits[0] < line
}
