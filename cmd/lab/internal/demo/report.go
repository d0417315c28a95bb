// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"

	"signalbox/internal/measure"
	"signalbox/internal/netlab"
)

// printer writes what the demo has to say, as it goes.
type printer struct {
	out io.Writer
	err error // the first that writing met; nothing is written after it
	// stop ends the demo, as nobody reads what it finds out any more.
	stop func()
}

func (p *printer) printf(format string, args ...any) {
	if p.err == nil {
		if _, p.err = fmt.Fprintf(p.out, format, args...); p.err != nil {
			p.stop()
		}
	}
}

// line writes an indented line of progress.
func (p *printer) line(format string, args ...any) { p.printf("  "+format+"\n", args...) }

func (p *printer) opening(c *Config, connections int) {
	var names, families []string
	for _, m := range c.Modes {
		names = append(names, m.Name)
	}
	for _, f := range c.Families {
		families = append(families, f.String())
	}
	p.printf("signalbox demo: modes %s over %s, %d connections from each client to each place over TCP and over UDP\n",
		strings.Join(names, ", "), strings.Join(families, " and "), connections)
}

func (p *printer) heading(mode string) { p.printf("\nmode %s\n", mode) }

// columns writes rows of cells, each padded to its column's width.
func (p *printer) columns(rows [][]string) {
	if p.err != nil {
		return
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, cells := range rows {
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	w.Flush() // a strings.Builder takes everything
	for line := range strings.Lines(b.String()) {
		p.line("%s", strings.TrimRight(line, " \n"))
	}
}

// table shows which Pods answered at each place and whom they saw.
func (p *printer) table(mode string, f *familyResult, connections int) {
	p.printf("\n  %s over %s: of %d connections, how many each Pod answered (TCP/UDP)\n", mode, f.family, connections)
	head := []string{"through", "at", "from"}
	head = append(append(head, allPods...), "source that the Pods saw", "")
	rows := [][]string{head}
	for i := range f.rows {
		rows = append(rows, f.rows[i].cells())
	}
	p.columns(rows)
}

func (r *row) cells() []string {
	cells := []string{r.through, r.at.String(), r.from}
	for _, pod := range allPods {
		cells = append(cells, r.share(func(t *tally) int { return t.answers[pod] }))
	}
	verdict := ""
	if len(r.wrong()) > 0 {
		verdict = "WRONG"
	}
	return append(cells, r.seen(), verdict)
}

// share writes a count over TCP and over UDP.
func (r *row) share(count func(*tally) int) string {
	tcp, udp := count(r.tallies["tcp"]), count(r.tallies["udp"])
	if tcp+udp == 0 {
		return "-"
	}
	return fmt.Sprintf("%d/%d", tcp, udp)
}

// seen says whose addresses the Pods saw, and what became of connections that
// nobody answered.
func (r *row) seen() string {
	sources := map[netip.Addr]bool{}
	others := map[netlab.Outcome]bool{}
	for _, t := range r.tallies {
		for a := range t.sources {
			sources[a] = true
		}
		for o := range t.others {
			others[o] = true
		}
	}
	var parts []string
	if len(sources) > 0 {
		parts = append(parts, r.whose(slices.SortedFunc(maps.Keys(sources), netip.Addr.Compare)))
	}
	for _, o := range slices.Sorted(maps.Keys(others)) {
		parts = append(parts, fmt.Sprintf("%s %s", r.share(func(t *tally) int { return t.others[o] }), o))
	}
	return strings.Join(parts, "; ")
}

// whose writes addresses with their owner, as far as it is the expected one.
func (r *row) whose(addrs []netip.Addr) string {
	texts := make([]string, len(addrs))
	for i, a := range addrs {
		texts[i] = a.String()
	}
	list := strings.Join(texts, ", ")
	if slices.ContainsFunc(addrs, func(a netip.Addr) bool { return !slices.Contains(r.owned, a) }) {
		return list
	}
	if r.source == own {
		return "the client: " + list
	}
	return nodeUnderTest + ": " + list
}

func (p *printer) changes(f *familyResult) {
	p.printf("\n")
	p.line("changed manifest to the first packet that obeys: median %s of %d changes (%s to %s)",
		measure.Brief(measure.Median(f.changes)), len(f.changes), measure.Brief(slices.Min(f.changes)), measure.Brief(slices.Max(f.changes)))
}

func (p *printer) connects(f *familyResult) {
	through, direct := f.connects.Through, f.connects.Direct
	p.line("connect through the ClusterIP: median %s, p99 %s; straight to the same Pod: median %s, p99 %s; ratio %.2f",
		measure.Brief(measure.Median(through)), measure.Brief(measure.Quantile(through, 0.99)), measure.Brief(measure.Median(direct)), measure.Brief(measure.Quantile(direct, 0.99)),
		measure.Ratio(measure.Median(through), measure.Median(direct)))
}

// comparison shows all modes side by side.
func (p *printer) comparison(results []*modeResult) {
	p.printf("\nside by side\n")
	type column struct {
		m *modeResult
		f *familyResult
	}
	head := []string{""}
	var columns []column
	for _, m := range results {
		for _, f := range m.families {
			columns = append(columns, column{m, f})
			head = append(head, fmt.Sprintf("%s %s", m.mode, f.family))
		}
	}
	metrics := []struct {
		name string
		of   func(*modeResult, *familyResult) string
	}{
		{"as it must be", func(_ *modeResult, f *familyResult) string { return f.score() }},
		{"start to the first answer", func(_ *modeResult, f *familyResult) string { return measure.Brief(f.serving) }},
		{"change to the first packet, median", func(_ *modeResult, f *familyResult) string { return measure.Brief(measure.Median(f.changes)) }},
		{"connect through the ClusterIP, median", func(_ *modeResult, f *familyResult) string { return measure.Brief(measure.Median(f.connects.Through)) }},
		{"  p99", func(_ *modeResult, f *familyResult) string {
			return measure.Brief(measure.Quantile(f.connects.Through, 0.99))
		}},
		{"connect straight to the Pod, median", func(_ *modeResult, f *familyResult) string { return measure.Brief(measure.Median(f.connects.Direct)) }},
		{"  p99", func(_ *modeResult, f *familyResult) string {
			return measure.Brief(measure.Quantile(f.connects.Direct, 0.99))
		}},
		{"ratio of the medians", func(_ *modeResult, f *familyResult) string {
			return timesOrNone(measure.Ratio(measure.Median(f.connects.Through), measure.Median(f.connects.Direct)))
		}},
		{"peak memory of the whole daemon", func(m *modeResult, _ *familyResult) string { return mebibytes(m.memory) }},
		{"processor time of the whole daemon", func(m *modeResult, _ *familyResult) string { return measure.Brief(m.processor) }},
	}
	rows := [][]string{head}
	for _, metric := range metrics {
		cells := []string{metric.name}
		for _, c := range columns {
			cells = append(cells, metric.of(c.m, c.f))
		}
		rows = append(rows, cells)
	}
	if len(columns) > 0 {
		p.columns(rows)
	}
	for _, m := range results {
		for _, err := range m.unsupported {
			p.line("not shown: %v", err)
		}
	}
}

// score says how many rows are right.
func (f *familyResult) score() string {
	right := 0
	for i := range f.rows {
		if len(f.rows[i].wrong()) == 0 {
			right++
		}
	}
	return fmt.Sprintf("%d of %d rows", right, len(f.rows))
}

func timesOrNone(r float64) string {
	if r == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", r)
}

func mebibytes(n int64) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}
