// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"signalbox/internal/xtables"
)

// model does what iptables-restore --noflush and the kernel do with a script,
// and is as strict.
type model [tableCount]map[string][]string // chain -> rules

func newModel() *model {
	m := &model{}
	for t := range m {
		m[t] = map[string][]string{}
		for _, name := range []string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"} {
			m[t][name] = nil
		}
	}
	return m
}

// apply takes a script, table by table: seen is called after each COMMIT.
func (m *model) apply(input string, seen func()) error {
	var chains map[string][]string
	for n, line := range strings.Split(strings.TrimSuffix(input, "\n"), "\n") {
		if input == "" {
			return nil
		}
		fail := func(why string) error { return fmt.Errorf("line %d: %s: %s", n+1, line, why) }
		word, rest, _ := strings.Cut(line, " ")
		switch {
		case line[0] == '*':
			chains = m[slices.Index(tableNames[:], line[1:])]
		case line[0] == ':':
			if len(word)-1 > 28 {
				return fail("name too long")
			}
			chains[word[1:]] = nil
		case word == "-A", word == "-I":
			name, rule, _ := strings.Cut(rest, " ")
			rules, ok := chains[name]
			if !ok {
				return fail("no such chain")
			}
			if target := xtables.JumpTarget(rule); !isBuiltinTarget(target) {
				if _, ok := chains[target]; !ok {
					return fail("no such target")
				}
			}
			if word == "-I" {
				chains[name] = slices.Insert(rules, 0, rule)
			} else {
				chains[name] = append(rules, rule)
			}
		case word == "-X":
			if rules, ok := chains[rest]; !ok || len(rules) > 0 {
				return fail("missing or not empty")
			}
			for name, rules := range chains {
				if slices.ContainsFunc(rules, func(r string) bool { return xtables.JumpTarget(r) == rest }) {
					return fail("in use by " + name)
				}
			}
			delete(chains, rest)
		case line == "COMMIT":
			if seen != nil {
				seen()
			}
		default:
			return fail("not understood")
		}
	}
	return nil
}

func isBuiltinTarget(s string) bool {
	return slices.Contains([]string{"ACCEPT", "DROP", "RETURN", "REJECT", "MARK", "MASQUERADE", "DNAT", "SNAT"}, s)
}

func (m *model) mustApply(t testing.TB, input string) {
	t.Helper()
	if err := m.apply(input, nil); err != nil {
		t.Fatal(err)
	}
}

// dump is the model as text.
func (m *model) dump() string {
	var b strings.Builder
	for t := range m {
		for _, name := range slices.Sorted(maps.Keys(m[t])) {
			fmt.Fprintf(&b, "%s %s\n", table(t), name)
			for _, rule := range m[t][name] {
				fmt.Fprintf(&b, "\t%s\n", rule)
			}
		}
	}
	return b.String()
}
