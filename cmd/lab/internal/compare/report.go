// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Difference is a probe with different outcomes in the two labs.
type Difference struct {
	Case                 Case
	State                int
	Probe                Probe
	KubeProxy, Signalbox Outcome
	// Rule is the deliberate difference that explains it, or nil.
	Rule *Rule
}

// Report is what a comparison has found.
type Report struct {
	Cases, Probes int
	// Fleeting counts differences that a repetition did not show. Unconfirmed counts
	// further differences of a case with many, which were not repeated.
	Fleeting, Unconfirmed int
	// NoSCTP says why no probe uses SCTP, or is nil.
	NoSCTP      error
	differences []Difference
}

func (r *Report) add(d Difference) { r.differences = append(r.differences, d) }

// unexplained are the cases with a difference that is not deliberate.
func (r *Report) unexplained() []Case {
	var all []Case
	for _, d := range r.differences {
		if d.Rule == nil && !slices.ContainsFunc(all, func(c Case) bool { return c.Name == d.Case.Name }) {
			all = append(all, d.Case)
		}
	}
	return all
}

func (r *Report) counts() string {
	open := 0
	for _, d := range r.differences {
		if d.Rule == nil {
			open++
		}
	}
	return fmt.Sprintf("%d probes, %d deliberate differences, %d others, %d seen once", r.Probes, len(r.differences)-open, open, r.Fleeting)
}

// write writes the deliberate differences with their reasons, then each case with
// others and its objects.
func (r *Report) write(out io.Writer, cfg Config) error {
	var b strings.Builder
	fmt.Fprintf(&b, "signalbox (%s) beside kube-proxy (%s), %d of %d cases: %s\n", cfg.Mode, cfg.KubeProxyMode, r.Cases, len(cfg.Cases), r.counts())
	if r.NoSCTP != nil {
		fmt.Fprintf(&b, "SCTP was not compared: %v\n", r.NoSCTP)
	}
	if r.Unconfirmed > 0 {
		fmt.Fprintf(&b, "%d further differences in these cases were not repeated\n", r.Unconfirmed)
	}
	r.writeDeliberate(&b)
	for _, c := range r.unexplained() {
		fmt.Fprintf(&b, "\n== %s\n", c.Name)
		for _, group := range r.groups(c.Name) {
			b.WriteString(group)
		}
		if err := WriteCase(&b, c); err != nil {
			return err
		}
	}
	_, err := io.WriteString(out, b.String())
	return err
}

func (r *Report) writeDeliberate(b *strings.Builder) {
	counts := map[*Rule]int{}
	for _, d := range r.differences {
		if d.Rule != nil {
			counts[d.Rule]++
		}
	}
	var rules []*Rule
	for rule := range counts {
		rules = append(rules, rule)
	}
	slices.SortFunc(rules, func(a, b *Rule) int { return cmp.Or(counts[b]-counts[a], strings.Compare(a.Reason, b.Reason)) })
	for _, rule := range rules {
		fmt.Fprintf(b, "\n%d times: kube-proxy: %s; signalbox: %s.\n  Reason: %s\n", counts[rule], rule.KubeProxy, rule.Signalbox, rule.Reason)
	}
}

// groups are the unexplained differences of a case, those of equal outcomes together.
func (r *Report) groups(name string) []string {
	var heads []string
	probes := map[string][]string{}
	for _, d := range r.differences {
		if d.Case.Name != name || d.Rule != nil {
			continue
		}
		head := fmt.Sprintf("in state %d, kube-proxy: %s; signalbox: %s\n", d.State, d.KubeProxy, d.Signalbox)
		heads = add(heads, head)
		probes[head] = append(probes[head], fmt.Sprintf("  %s\n", d.Probe))
	}
	for i, head := range heads {
		heads[i] = head + strings.Join(probes[head], "")
	}
	return heads
}
