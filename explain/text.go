// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"signalbox/proxier/plan"
)

// Print writes the answer for people. The last line is the verdict; a question about
// several connections has a line for each.
func (a *Answer) Print(w io.Writer) {
	fmt.Fprintf(w, "%s, on node %s in mode %s (%s)\n", a.Question, a.Node, a.Mode, a.Origin)
	for _, p := range a.Problems {
		fmt.Fprintf(w, "problem: %s\n", p)
	}
	for i := range a.Ports {
		a.Ports[i].print(w)
	}
	for i := range a.Compared {
		a.Compared[i].print(w)
	}
	fmt.Fprintln(w)
	for _, p := range a.Ports {
		for _, c := range p.Connections {
			fmt.Fprintln(w, c.Sentence)
		}
	}
	if a.Sentence != "" {
		fmt.Fprintln(w, a.Sentence)
	}
	for _, doubt := range a.Doubts {
		fmt.Fprintf(w, "%s, so the verdict above may be wrong.\n", doubt)
	}
}

// maxHolds is how many lines are printed of what the kernel has as written.
const maxHolds = 10

func (c *Compared) print(w io.Writer) {
	fmt.Fprintf(w, "\nIn the kernel, %s: as written: %d, differences: %d\n", c.Family, c.HoldsCount, c.DifferencesCount)
	shown := c.Holds[:min(len(c.Holds), maxHolds)]
	for _, line := range slices.Concat(shown, c.Differences) {
		fmt.Fprintf(w, "  %s\n", line)
	}
	if more := c.HoldsCount + c.DifferencesCount - len(shown) - len(c.Differences); more > 0 {
		fmt.Fprintf(w, "  and %d more\n", more)
	}
	if len(c.Before) > 0 {
		fmt.Fprintln(w, "  rules of other software come first, and may take packets:")
	}
	for _, line := range c.Before {
		fmt.Fprintf(w, "    %s\n", line)
	}
	if c.Error != "" {
		fmt.Fprintf(w, "  not compared: %s\n", c.Error)
	}
}

func (p *Port) print(w io.Writer) {
	name := p.Service
	if p.Port != "" {
		name += ":" + p.Port
	}
	fmt.Fprintf(w, "\nService %s, %s, %s\n", name, p.Protocol, p.Family)
	lines := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, c := range p.Connections {
		fmt.Fprintf(lines, "  %s\t%s\tfrom %s\t%s\n", c.Kind, c.Address, strings.Join(c.From, ", "), c.Text)
		if len(c.Masquerade) > 0 {
			fmt.Fprintf(lines, "  \t\t\tthe source address is rewritten for traffic from %s\n", strings.Join(c.Masquerade, ", "))
		}
		if c.SourceRanges != nil {
			fmt.Fprintf(lines, "  \t\t\tsource ranges: %s\n", list(c.SourceRanges))
		}
	}
	lines.Flush()
	if p.AffinitySeconds > 0 {
		fmt.Fprintf(w, "  session affinity: ClientIP for %v\n", time.Duration(p.AffinitySeconds)*time.Second)
	}
	for _, h := range p.Hints {
		fmt.Fprintf(w, "  hints for a %s (here: %q): %s; %d ready endpoints have such a hint, %d have none\n", h.Kind, h.Here, h.Text, h.With, h.Without)
	}
	p.Kernel.print(w)
	for _, s := range p.Sets {
		s.print(w, len(p.Sets) > 1)
	}
	p.printSlices(w)
	p.Tracked.print(w)
}

func (t *Tracked) print(w io.Writer) {
	if t == nil || t.Count == 0 && t.Client == "" {
		return
	}
	from := ""
	if t.Client != "" {
		from = " from " + t.Client
	}
	fmt.Fprintf(w, "  tracked connections%s: %d\n", from, t.Count)
	lines := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, f := range t.Flows {
		source := ""
		if f.Source != f.Client {
			source = " as " + f.Source
		}
		fmt.Fprintf(lines, "    %s%s\t-> %s\t-> %s\n", f.Client, source, f.Frontend, f.Endpoint)
	}
	lines.Flush()
}

func (k *Kernel) print(w io.Writer) {
	if k == nil {
		return
	}
	if k.Written != nil {
		fmt.Fprintf(w, "  last written %s, in %v\n", k.Written.Format(time.RFC3339), time.Duration(k.TookMillis*float64(time.Millisecond)).Round(time.Microsecond))
	}
	if k.Problem != "" {
		fmt.Fprintf(w, "  the mode serves it otherwise: %s\n", k.Problem)
	}
}

func (s *Set) print(w io.Writer, several bool) {
	if len(s.Endpoints) == 0 {
		fmt.Fprintln(w, "  no endpoints")
		return
	}
	heading := "endpoints"
	if several {
		heading += " for policy " + s.Policy
	}
	fmt.Fprintf(w, "  %s\n", heading)
	lines := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, e := range s.Endpoints {
		part := "left out"
		if e.Used {
			part = "used"
		}
		fmt.Fprintf(lines, "    %s\t%s\t%s\t%s\t%s\n", part, e.Address, dash(e.Node), dash(e.Target), e.Text)
	}
	lines.Flush()
}

// printSlices leaves out slices of the other IP family if there are endpoints: each
// Service of two families has them.
func (p *Port) printSlices(w io.Writer) {
	endpoints := slices.ContainsFunc(p.Sets, func(s Set) bool { return len(s.Endpoints) > 0 })
	for _, s := range p.SlicesLeftOut {
		if s.Reason == plan.OtherFamily.String() && endpoints {
			continue
		}
		fmt.Fprintf(w, "  slice %s is left out (endpoints: %d): %s; it has %s\n", s.Slice, s.Endpoints, s.Text, list(s.Ports))
	}
}

// dash stands for what is not known.
func dash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}
