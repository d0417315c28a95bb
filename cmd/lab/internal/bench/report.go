// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"math"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
)

// unit is what a figure counts.
type unit uint8

const (
	seconds unit = iota
	bytes
	share // of one processor, or of the rate without a Service
	rate  // in a second
	count
)

func (u unit) text(v float64) string { return u.textBeside(v, v) }

// textBeside is the text of a figure in a row. The row's largest figure decides whether
// all of them are in ms or s, in KiB or MiB.
func (u unit) textBeside(v, largest float64) string {
	switch {
	case u == share:
		return fmt.Sprintf("%.1f %%", 100*v)
	case u == rate:
		return fmt.Sprintf("%.0f", v)
	case u == count:
		return strconv.FormatFloat(math.Round(100*v)/100, 'f', -1, 64)
	case v <= 0:
		return "0"
	case u == bytes && largest < 10<<10:
		return threeDigits(v) + " B"
	case u == bytes && largest < 10<<20:
		return threeDigits(v/(1<<10)) + " KiB"
	case u == bytes:
		return threeDigits(v/(1<<20)) + " MiB"
	case largest < 1e-3:
		return threeDigits(v*1e6) + " µs"
	case largest < 1:
		return threeDigits(v*1e3) + " ms"
	}
	return threeDigits(v) + " s"
}

// threeDigits has three significant digits, and never an exponent.
func threeDigits(v float64) string {
	decimals := 0
	if v > 0 {
		decimals = max(0, 2-int(math.Floor(math.Log10(v))))
	}
	return strconv.FormatFloat(v, 'f', decimals, 64)
}

// row is a figure as a row of a table.
type row struct {
	key, title string
	unit       unit
}

// proxyRows are figures of a proxy.
var proxyRows = []row{
	{"cold_wall", "cold start until every virtual IP answers", seconds},
	{"cold_cpu", "cold start, processor time", seconds},
	{"restart_wall", "restart with nothing changed, until synced", seconds},
	{"restart_cpu", "the same, processor time", seconds},
	{"changed_wall", "restart after changes, until they work", seconds},
	{"changed_cpu", "the same, processor time", seconds},
	{"move_p50", "one endpoint moves: API write to first packet, median", seconds},
	{"move_p99", "the same, 99th percentile", seconds},
	{"move_cpu", "the same, processor time for one move", seconds},
	{"storm_p50", "a move during 100 changes a second, median", seconds},
	{"storm_p99", "the same, 99th percentile", seconds},
	{"storm_cpu", "processor during 100 changes a second", share},
	{"cold_bytes", "from the API server at cold start", bytes},
	{"storm_bytes", "from the API server in a second of the storm", bytes},
	{"rest_cpu", "processor time in a minute at rest", seconds},
	{"memory_peak", "memory of the process, peak at start", bytes},
	{"memory_settled", "memory of the process, settled", bytes},
	{"memory_kernel", "memory of the kernel for the process and its tools, settled", bytes},
}

// connectionRows are figures that each family has.
var connectionRows = []row{
	{"connect_p50", "connect through the virtual IP, from a Pod, median", seconds},
	{"connect_p99", "the same, 99th percentile", seconds},
	{"connect_added", "added to connect, from a Pod, median", seconds},
	{"node_connect_added", "added to connect, from the node, median", seconds},
	{"connect_direct", "connect to a Pod without a Service, median", seconds},
	{"connect_plain", "the same before the proxy starts, median", seconds},
	{"new_rate", "new connections in a second", rate},
	{"new_share", "the same, of the rate straight to the Pod", share},
	{"exchange_p50", "question and answer on an open connection, median", seconds},
	{"bulk_rate", "bytes in a second over one connection", bytes},
	{"bulk_share", "the same, of the rate straight to the Pod", share},
	{"datagram_p50", "first datagram of a UDP flow and its answer, median", seconds},
	{"datagram_p99", "the same, 99th percentile", seconds},
	{"datagram_added", "added to it by the Service, median", seconds},
}

// rows are all rows for some families.
func rows(families []string) []row {
	all := slices.Clone(proxyRows)
	for _, f := range families {
		for _, r := range connectionRows {
			all = append(all, row{ofFamily(r.key, f), f + ": " + r.title, r.unit})
		}
	}
	return all
}

// markdown is the report for people. The charts are in a directory relative to it.
func (r *Report) markdown(charts string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Measured %s on %s, with\n\n    %s\n\n", r.Date, r.Machine, r.Command)
	fmt.Fprintf(&b, "Each figure is the median of its size's rounds. The ratio in parentheses is to kube-proxy in\n"+
		"the same mode, or to the first other proxy. With one more flag, it is to signalbox without this flag.\n"+
		"`~` marks a figure whose rounds differ by more than %.0f %%: the machine was too noisy to tell. The floor\n"+
		"is what no proxy can avoid: list and decode the objects, write as many elements in one transaction, and\n"+
		"hear of a change. A proxy with the legacy iptables tools has a floor of its own. The table of multiples\n"+
		"shows it in parentheses.\n",
		100*noisySpread)
	if r.NoKernelMemory != "" {
		fmt.Fprintf(&b, "\nMemory of the kernel is left out: %s.\n", r.NoKernelMemory)
	}
	for _, chart := range chartNames() {
		fmt.Fprintf(&b, "\n![%s](%s)\n", strings.TrimSuffix(chart, ".svg"), path.Join(charts, chart))
	}
	for i := range r.Sizes {
		r.Sizes[i].markdown(&b, rows(r.Families))
	}
	return b.String()
}

func (s *SizeResult) markdown(b *strings.Builder, rows []row) {
	rounds := "1 round"
	if s.Rounds != 1 {
		rounds = fmt.Sprintf("%d rounds", s.Rounds)
	}
	fmt.Fprintf(b, "\n### %d Services with %d endpoints each, %s\n\n| |", s.Services, s.Endpoints, rounds)
	for i := range s.Proxies {
		fmt.Fprintf(b, " %s |", s.Proxies[i].name())
	}
	fmt.Fprintf(b, " floor |\n| --- |%s --- |\n", strings.Repeat(" --- |", len(s.Proxies)))
	for _, r := range rows {
		s.row(b, r)
	}
	s.multiples(b, rows)
	for i := range s.Proxies {
		if p := &s.Proxies[i]; p.Failed != "" {
			fmt.Fprintf(b, "\n%s failed: %s\n", p.name(), strings.SplitN(p.Failed, "\n", 2)[0])
		}
	}
}

// row writes nothing for a figure that no proxy has.
func (s *SizeResult) row(b *strings.Builder, r row) {
	if !slices.ContainsFunc(s.Proxies, func(p ProxyResult) bool { return len(p.Figures[r.key]) > 0 }) {
		return
	}
	floor, hasFloor := median(s.Floors[r.key])
	largest := floor
	for i := range s.Proxies {
		v, _ := median(s.Proxies[i].Figures[r.key])
		largest = max(largest, v)
	}
	fmt.Fprintf(b, "| %s |", r.title)
	for i := range s.Proxies {
		fmt.Fprintf(b, " %s |", s.cell(&s.Proxies[i], r, largest))
	}
	text := ""
	if hasFloor {
		text = r.unit.textBeside(floor, largest)
	}
	fmt.Fprintf(b, " %s |\n", text)
}

func (s *SizeResult) cell(p *ProxyResult, r row, largest float64) string {
	v, has := median(p.Figures[r.key])
	if !has {
		return "-"
	}
	text := r.unit.textBeside(v, largest)
	if noisy(p.Figures[r.key]) {
		text = "~" + text
	}
	if ref := s.reference(p); ref != nil {
		if base, has := median(ref.Figures[r.key]); has && base > 0 {
			text += fmt.Sprintf(" (%s)", ratioText(v/base))
		}
	}
	return text
}

// ratioText has two significant digits, and no exponent for a large ratio.
func ratioText(r float64) string {
	if r >= 99.5 {
		return fmt.Sprintf("%.0f", r)
	}
	return fmt.Sprintf("%.2g", r)
}

// multiples says how often each proxy needs the floor.
func (s *SizeResult) multiples(b *strings.Builder, rows []row) {
	fmt.Fprintf(b, "\nAs a multiple of the floor:\n\n| |%s\n| --- |%s\n", columns(s.Proxies), strings.Repeat(" --- |", len(s.Proxies)))
	for _, r := range rows {
		has := func(p ProxyResult) bool { return len(p.Floors[r.key]) > 0 }
		if len(s.Floors[r.key]) == 0 && !slices.ContainsFunc(s.Proxies, has) {
			continue
		}
		fmt.Fprintf(b, "| %s |", r.title)
		for i := range s.Proxies {
			fmt.Fprintf(b, " %s |", s.multiple(&s.Proxies[i], r))
		}
		b.WriteString("\n")
	}
}

// multiple names the floor where it is the proxy's own.
func (s *SizeResult) multiple(p *ProxyResult, r row) string {
	v, has := median(p.Figures[r.key])
	own, hasOwn := median(p.Floors[r.key])
	floor, hasFloor := median(s.Floors[r.key])
	switch {
	case !has:
		return "-"
	case hasOwn && own > 0:
		return fmt.Sprintf("%s (%s)", ratioText(v/own), r.unit.text(own))
	case hasFloor && floor > 0:
		return ratioText(v / floor)
	}
	return ""
}

func columns(proxies []ProxyResult) string {
	var b strings.Builder
	for i := range proxies {
		fmt.Fprintf(&b, " %s |", proxies[i].name())
	}
	return b.String()
}

const (
	sectionBegin = "<!-- lab bench writes from here -->"
	sectionEnd   = "<!-- to here -->"
)

// Embed replaces the part of a document between the two marks by the report, whose
// charts are in a directory below the document's.
func (r *Report) Embed(document, charts string) error {
	return embed(document, sectionBegin, sectionEnd, r.markdown(charts))
}

// embed replaces what stands between two marks in a document.
func embed(document, begin, end, text string) error {
	old, err := os.ReadFile(document)
	if err != nil {
		return err
	}
	before, rest, found := strings.Cut(string(old), begin)
	_, after, ended := strings.Cut(rest, end)
	if !found || !ended {
		return fmt.Errorf("%s has no lines %q and %q", document, begin, end)
	}
	return os.WriteFile(document, []byte(before+begin+"\n\n"+text+"\n"+end+after), 0o644)
}
