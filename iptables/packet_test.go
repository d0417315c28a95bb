// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"signalbox/internal/xtables"
	"signalbox/proxier/plan"
)

// packet is the first packet of a connection.
type packet struct {
	src, dst           netip.Addr
	proto              plan.Protocol
	dport              uint16
	in                 string // interface; "" for packets of the node
	srcLocal, dstLocal bool   // the address is one of the node's
	translated         bool   // the nat table has chosen the destination
	// known is the endpoint chain whose list of clients the source is on.
	known string
}

// outcomes is everything that can become of a packet, random choices taken
// both ways: "-> endpoint", with "masqueraded" before it where it is marked,
// "DROP", "REJECT" or "pass".
type outcomes map[string]float64 // and with what probability

// walker takes one packet through one table of a model.
type walker struct {
	chains map[string][]string
	packet packet
	steps  int  // rules looked at
	marked bool // where nothing else became of the packet, it was marked
}

type position struct {
	chain string
	rule  int
}

// run is what chain makes of the packet.
func (m *model) run(t table, chain string, p packet) (outcomes, int) {
	w := &walker{chains: m[t], packet: p}
	out := outcomes{}
	w.walk([]position{{chain, 0}}, "", 1, out)
	return out, w.steps
}

func (w *walker) walk(stack []position, mark string, probability float64, out outcomes) {
	for len(stack) > 0 {
		at := &stack[len(stack)-1]
		rules := w.chains[at.chain]
		if at.rule >= len(rules) {
			stack = stack[:len(stack)-1]
			continue
		}
		rule := rules[at.rule]
		at.rule++
		w.steps++
		matches, chance := w.match(rule)
		if !matches {
			continue
		}
		if chance < 1 {
			w.walk(slices.Clone(stack), mark, probability*(1-chance), out)
			probability *= chance
		}
		switch target := xtables.JumpTarget(rule); target {
		case "RETURN":
			stack = stack[:len(stack)-1]
		case "MARK":
			mark = "masqueraded "
		case "DNAT":
			words := strings.Fields(rule)
			out[mark+"-> "+words[len(words)-1]] += probability
			return
		case "DROP", "REJECT", "ACCEPT":
			out[target] += probability
			return
		default:
			if strings.Contains(rule, " -g ") {
				stack = stack[:len(stack)-1]
			}
			stack = append(stack, position{target, 0})
		}
	}
	out["pass"] += probability
	w.marked = w.marked || mark != ""
}

// match says whether the rule takes the packet, and with what probability.
func (w *walker) match(rule string) (matches bool, chance float64) {
	p := &w.packet
	words := split(rule)
	matches, chance = true, 1
	invert := false
	is := func(ok bool) { matches, invert = matches && ok != invert, false }
	for i := 0; i < len(words); i++ {
		arg := ""
		if i+1 < len(words) {
			arg = words[i+1]
		}
		switch words[i] {
		case "!":
			invert = true
			continue
		case "-s":
			is(masked(p.src, arg))
		case "-d":
			is(masked(p.dst, arg))
		case "-i":
			name, isPrefix := strings.CutSuffix(arg, "+")
			is(p.in == name || isPrefix && strings.HasPrefix(p.in, name))
		case "-p":
			is(p.proto.String() == arg)
		case "--dport":
			low, high, _ := strings.Cut(arg+":"+arg, ":")
			high, _, _ = strings.Cut(high, ":")
			l, _ := strconv.Atoi(low)
			h, _ := strconv.Atoi(high)
			is(l <= int(p.dport) && int(p.dport) <= h)
		case "--src-type":
			is(p.srcLocal)
		case "--dst-type":
			is(p.dstLocal)
		case "--ctstate":
			is(strings.Contains(arg, "NEW") || arg == "DNAT" && p.translated)
		case "--mark":
			is(false)
		case "--probability":
			chance, _ = strconv.ParseFloat(arg, 64)
		case "--rcheck":
			is(p.known != "" && strings.Contains(rule, p.known))
			continue
		case "--set", "--rsource", "--reap", "--random-fully":
			continue
		case "-m", "--comment", "--name", "--seconds", "--mode", "-j", "-g":
		case "--to-destination", "--or-mark", "--xor-mark":
		default:
			panic(fmt.Sprintf("%q in rule %q is not understood", words[i], rule))
		}
		i++
	}
	return matches, chance
}

// split divides a rule into words, quoted ones without their quotes.
func split(rule string) []string {
	var words []string
	for i, part := range strings.Split(rule, `"`) {
		if i%2 == 1 {
			words = append(words, part)
		} else {
			words = append(words, strings.Fields(part)...)
		}
	}
	return words
}

// masked compares under a mask that may have holes.
func masked(a netip.Addr, with string) bool {
	addr, mask, _ := strings.Cut(with, "/")
	want := netip.MustParseAddr(addr).AsSlice()
	have := a.AsSlice()
	bits := make([]byte, len(want))
	if n, err := strconv.Atoi(mask); err == nil {
		for i := range n {
			bits[i/8] |= 0x80 >> (i % 8)
		}
	} else {
		bits = netip.MustParseAddr(mask).AsSlice()
	}
	for i := range bits {
		if have[i]&bits[i] != want[i]&bits[i] {
			return false
		}
	}
	return true
}

// fate is what becomes of a new connection: the nat table chooses an endpoint,
// or the filter table judges what it left alone, in the order of the jumps.
func (m *model) fate(p packet) (outcomes, int) {
	out, steps := m.run(nat, servicesChain, p)
	steps += m.hairpin(p, out)
	left := out["pass"]
	if left == 0 {
		return out, steps
	}
	delete(out, "pass")
	chains := []string{proxyFirewallChain, nodePortsChain, externalServicesChain} // INPUT
	if !p.dstLocal {
		chains = []string{proxyFirewallChain, servicesChain, externalServicesChain} // FORWARD
	}
	if p.srcLocal {
		chains = slices.Concat([]string{proxyFirewallChain, servicesChain}, chains) // OUTPUT before
	}
	for _, chain := range chains {
		judged, n := m.run(filter, chain, p)
		steps += n
		if judged["pass"] == 0 {
			for verdict, probability := range judged {
				out[verdict] += left * probability
			}
			return out, steps
		}
	}
	out["pass"] = left
	return out, steps
}

// hairpin takes what was sent to endpoints through KUBE-POSTROUTING, as far as it
// depends on the endpoint.
func (m *model) hairpin(p packet, out outcomes) (steps int) {
	for _, key := range out.keys() {
		to, ok := strings.CutPrefix(key, "-> ")
		if !ok {
			continue
		}
		chosen := netip.MustParseAddrPort(to)
		p.dst, p.dport, p.translated = chosen.Addr(), chosen.Port(), true
		w := &walker{chains: m[nat], packet: p}
		w.walk([]position{{postroutingChain, 0}}, "", 1, outcomes{})
		steps = max(steps, w.steps)
		if w.marked {
			out["masqueraded "+key] += out[key]
			delete(out, key)
		}
	}
	return steps
}

func (o outcomes) keys() []string { return slices.Sorted(maps.Keys(o)) }
