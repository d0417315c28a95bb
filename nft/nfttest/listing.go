// SPDX-License-Identifier: Apache-2.0

package nfttest

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// Listing is all that an nf_tables holds, as text to compare: that of a Kernel whose
// Connection is an option, or of the network namespace. What has no order is sorted.
func Listing(options ...nftables.ConnOption) (string, error) {
	conn, err := nftables.New(options...)
	if err != nil {
		return "", err
	}
	tables, err := conn.ListTables()
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, t := range tables {
		fmt.Fprintf(&b, "table %d %s\n", t.Family, t.Name)
		for _, list := range []func(*strings.Builder, *nftables.Conn, *nftables.Table) error{listCounters, listSets, listChains} {
			if err := list(&b, conn, t); err != nil {
				return "", err
			}
		}
	}
	return b.String(), nil
}

func listCounters(b *strings.Builder, conn *nftables.Conn, t *nftables.Table) error {
	counters, err := conn.GetNamedObjects(t)
	for _, c := range counters {
		fmt.Fprintf(b, "counter %s\n", c.(*nftables.NamedObj).Name)
	}
	return err
}

func listSets(b *strings.Builder, conn *nftables.Conn, t *nftables.Table) error {
	sets, err := conn.GetSets(t)
	if err != nil {
		return err
	}
	slices.SortFunc(sets, func(a, b *nftables.Set) int { return cmp.Compare(a.Name, b.Name) })
	for _, s := range sets {
		elements, err := conn.GetSetElements(s)
		if err != nil {
			return err
		}
		shown := *s
		shown.Table = nil
		if s.DataType.Name == nftables.TypeVerdict.Name {
			shown.DataType.Bytes = 0 // Linux answers with the size of a struct of its own
		}
		var lines []string
		for _, e := range elements {
			e.Expires = 0
			lines = append(lines, fmt.Sprintf("%+v\n", e))
		}
		slices.Sort(lines)
		fmt.Fprintf(b, "set %+v\n%s", shown, strings.Join(lines, ""))
	}
	return nil
}

func listChains(b *strings.Builder, conn *nftables.Conn, t *nftables.Table) error {
	chains, err := conn.ListChainsOfTableFamily(t.Family)
	if err != nil {
		return err
	}
	slices.SortFunc(chains, func(a, b *nftables.Chain) int { return cmp.Compare(a.Name, b.Name) })
	for _, c := range chains {
		if c.Table.Name != t.Name {
			continue
		}
		fmt.Fprintf(b, "chain %s %s\n", c.Name, c.Type)
		if c.Hooknum != nil {
			fmt.Fprintf(b, "hook %d priority %d policy %d\n", *c.Hooknum, *c.Priority, *c.Policy)
		}
		rules, err := conn.GetRules(t, c)
		if err != nil {
			return err
		}
		for _, r := range rules {
			fmt.Fprintf(b, "rule %q", r.UserData)
			for _, e := range r.Exprs {
				if nat, ok := e.(*expr.NAT); ok { // Linux adds what was left out
					nat.RegAddrMax, nat.RegProtoMax, nat.Specified = 0, 0, false
				}
				b.WriteString(register.ReplaceAllStringFunc(fmt.Sprintf(" %T%+v", e, e), registerOf16))
			}
			b.WriteString("\n")
		}
	}
	return nil
}

var register = regexp.MustCompile(`Reg\w*:(8|12|16|20)\b`)

// registerOf16 names the register of 16 bytes that begins where one of 4 bytes does, as Linux
// lists it.
func registerOf16(text string) string {
	name, number, _ := strings.Cut(text, ":")
	return name + ":" + map[string]string{"8": "1", "12": "2", "16": "3", "20": "4"}[number]
}
