// SPDX-License-Identifier: Apache-2.0

package xtables

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// This file compares rules that were written with rules that iptables-save prints. The
// tools print other words than they read, each version in its own. So both are brought
// into one form: see canonical.

// Compare adds to c how the chains of a table differ, as commands of iptables. Rules by
// chain are wanted, as in Chain.Rules, or in Listing.OwnRules. With about, it leaves out the
// wanted chains and rules for which that is false; the rule of a chain itself is "".
func (t *Tools) Compare(c *proxier.Comparison, table string, wanted, have map[string][]string, about func(chain, rule string) bool) {
	line := func(chain, rule string) string {
		command := CommandName(t.Family) + " -t " + table
		if rule == "" {
			return command + " -N " + chain
		}
		return command + " -A " + chain + " " + strings.TrimSpace(rule)
	}
	add := func(list *[]string, sign, chain string, rules ...string) {
		for _, rule := range rules {
			if sign == "+" || about == nil || about(chain, rule) {
				*list = append(*list, sign+line(chain, rule))
			}
		}
	}
	chains := maps.Clone(wanted)
	maps.Copy(chains, have)
	for _, chain := range slices.Sorted(maps.Keys(chains)) {
		want, exists := wanted[chain]
		found, present := have[chain]
		switch {
		case !present:
			add(&c.Differences, "-", chain, append([]string{""}, want...)...)
			continue
		case !exists:
			add(&c.Differences, "+", chain, append([]string{""}, found...)...)
			continue
		}
		missing, foreign, same, ordered := compareRules(want, found)
		add(&c.Differences, "-", chain, missing...)
		add(&c.Differences, "+", chain, foreign...)
		if !ordered && (about == nil || about(chain, "")) {
			c.Differences = append(c.Differences, fmt.Sprintf("table %s: the rules of %s have another order", table, chain))
		}
		if about != nil {
			add(&c.Holds, "", chain, same...)
		}
	}
}

// compareRules says which rules a chain lacks, which it has too much, and whether it has the
// others in the order in which they are wanted.
func compareRules(want, found []string) (missing, foreign, same []string, ordered bool) {
	left := map[string]int{}
	forms := make([]string, len(found))
	for i, rule := range found {
		forms[i] = canonical(rule)
		left[forms[i]]++
	}
	var wantedOrder, foundOrder []string
	expected := map[string]int{}
	for _, rule := range want {
		form := canonical(rule)
		if left[form] == 0 {
			missing = append(missing, rule)
			continue
		}
		left[form]--
		expected[form]++
		same, wantedOrder = append(same, rule), append(wantedOrder, form)
	}
	for i, form := range forms {
		if expected[form] == 0 {
			foreign = append(foreign, found[i])
			continue
		}
		expected[form]--
		foundOrder = append(foundOrder, form)
	}
	return missing, foreign, same, slices.Equal(wantedOrder, foundOrder)
}

// option is an option of a rule with its value. Flags have none.
type option struct {
	negated     bool
	name, value string
}

// canonical is a form of a rule in which the same rule has the same text, whoever wrote it
// and in whatever order its matches and options stand.
func canonical(rule string) string {
	var base, target []string
	matches := map[string][]string{}
	match := ""
	options(rule, func(o option) {
		switch o.name {
		case "-m":
			match = o.value
			if !slices.ContainsFunc(plan.Protocols, func(p plan.Protocol) bool { return p.String() == match }) {
				matches[match] = append(matches[match], "") // without options, too
			}
			return
		case "-j", "-g":
			match = ""
			target = append(target, o.name+" "+o.value)
			return
		}
		text := o.canonical()
		switch {
		case text == "":
		case len(o.name) == 2:
			base = append(base, text)
		case match == "":
			target = append(target, text)
		default:
			matches[match] = append(matches[match], text)
		}
	})
	slices.Sort(base)
	parts := base
	for _, name := range slices.Sorted(maps.Keys(matches)) {
		slices.Sort(matches[name])
		parts = append(append(parts, "-m "+name), matches[name]...)
	}
	slices.Sort(target)
	return strings.Join(append(parts, target...), "\x00")
}

// passing are targets after which a packet goes on to the next rule.
var passing = []string{"", "AUDIT", "CLASSIFY", "CONNMARK", "CONNSECMARK", "CT", "DSCP", "HL", "HMARK", "IDLETIMER", "LED", "LOG", "MARK",
	"NFLOG", "NOTRACK", "RATEEST", "SECMARK", "SET", "TEE", "TOS", "TRACE", "TTL", "ULOG"}

// final are targets after which a packet meets no other rule of a built-in chain.
var final = []string{"ACCEPT", "DNAT", "DROP", "NETMAP", "NFQUEUE", "QUEUE", "REDIRECT", "REJECT", "RETURN"}

// Takes says whether a rule of a built-in chain may keep packets from the next rule, and
// whether it keeps every packet from it. A chain to which it jumps may keep some.
func Takes(rule string) (some, every bool) {
	target, matches := "", false
	options(rule, func(o option) {
		switch {
		case target != "": // an option of the target
		case o.name == "-j" || o.name == "-g":
			target, every = o.value, o.name == "-g" || slices.Contains(final, o.value)
		case o.name != "-A" && o.name != "--comment" && (o.name != "-m" || o.value != "comment"):
			matches = true
		}
	})
	return !slices.Contains(passing, target), every && !matches
}

// flags are the options without a value.
var flags = []string{"--rcheck", "--set", "--update", "--reap", "--rsource", "--rdest", "--random-fully"}

// options reads a rule.
func options(rule string, each func(option)) {
	words := words(rule)
	for i := 0; i < len(words); i++ {
		o := option{name: words[i]}
		if o.name == "!" && i+1 < len(words) {
			i++
			o.negated, o.name = true, words[i]
		}
		if strings.HasPrefix(o.name, "-") && !slices.Contains(flags, o.name) && i+1 < len(words) {
			i++
			o.value = words[i]
		}
		each(o)
	}
}

// words splits a rule. A word in quotation marks may have blanks, and a backslash before a
// quotation mark.
func words(rule string) (list []string) {
	var word strings.Builder
	quoted, begun := false, false
	for i := 0; i < len(rule); i++ {
		switch c := rule[i]; {
		case c == '\\' && i+1 < len(rule):
			i++
			word.WriteByte(rule[i])
		case c == '"':
			quoted, begun = !quoted, true
		case c == ' ' && !quoted:
			if begun {
				list = append(list, word.String())
				word.Reset()
			}
			begun = false
		default:
			begun = true
			word.WriteByte(c)
		}
	}
	if begun {
		list = append(list, word.String())
	}
	return list
}

// canonical is the option's text, or "" if leaving it out means the same.
func (o option) canonical() string {
	switch o.name {
	case "-s", "-d", "--ctorigsrc":
		if o.value = network(o.value); strings.Trim(o.value[strings.IndexByte(o.value, '/')+1:], "0") == "" && !o.negated {
			return "" // any address
		}
	case "--mask": // of recent
		if o.value == "255.255.255.255" || o.value == "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff" {
			return ""
		}
	case "--reject-with":
		if strings.HasSuffix(o.value, "-port-unreachable") {
			return ""
		}
	case "--or-mark":
		o.name, o.value = "--set-xmark", o.value+"/"+o.value
	case "--xor-mark":
		o.name, o.value = "--set-xmark", o.value+"/0"
	case "--probability":
		p, _ := strconv.ParseFloat(o.value, 64)
		o.value = fmt.Sprint(math.Round(p * (1 << 31))) // as the kernel keeps it
	case "--ctstate", "--ctstatus":
		states := strings.Split(o.value, ",")
		slices.Sort(states)
		o.value = strings.Join(states, ",")
	}
	if o.name == "--mark" || o.name == "--set-xmark" {
		o.value = marks(o.value)
	}
	text := o.name + " " + o.value
	if o.negated {
		return "! " + text
	}
	return text
}

// network is an address and its mask as hexadecimal numbers.
func network(text string) string {
	address, mask, _ := strings.Cut(text, "/")
	a, err := netip.ParseAddr(address)
	if err != nil {
		return text + "/?"
	}
	bits := a.AsSlice()
	if m, err := netip.ParseAddr(mask); err == nil {
		bits = m.AsSlice()
	} else {
		n, err := strconv.Atoi(cmp.Or(mask, strconv.Itoa(a.BitLen())))
		if err != nil || n < 0 || n > a.BitLen() {
			return text + "/?"
		}
		for i := range bits {
			ones := min(max(n-8*i, 0), 8)
			bits[i] = byte(0xff << (8 - ones))
		}
	}
	return fmt.Sprintf("%x/%x", a.AsSlice(), bits)
}

// marks has the numbers of a mark and its mask.
func marks(text string) string {
	value, mask, found := strings.Cut(text, "/")
	if !found {
		mask = "0xffffffff"
	}
	v, err1 := strconv.ParseUint(value, 0, 32)
	m, err2 := strconv.ParseUint(mask, 0, 32)
	if err1 != nil || err2 != nil {
		return text
	}
	return fmt.Sprintf("%#x/%#x", v, m)
}
