package bench

import (
	"fmt"
	"os"
	"path"
	"strings"
	"time"

	"signalbox/cmd/lab/internal/measure"
)

// unit is what a figure counts.
type unit uint8

const (
	seconds unit = iota
	bytes
	share // of one processor
)

func (u unit) text(v float64) string {
	switch u {
	case bytes:
		if v < 10<<20 {
			return fmt.Sprintf("%.0f KiB", v/(1<<10))
		}
		return fmt.Sprintf("%.0f MiB", v/(1<<20))
	case share:
		return fmt.Sprintf("%.1f %%", 100*v)
	}
	if v <= 0 {
		return "0"
	}
	return measure.Brief(time.Duration(v * float64(time.Second)))
}

// shownFigures are the rows of a table.
var shownFigures = []struct {
	key, title string
	unit       unit
}{
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
	{"connect_p50", "connect through the virtual IP, from a Pod, median", seconds},
	{"connect_p99", "the same, 99th percentile", seconds},
	{"connect_added", "added to connect, from a Pod, median", seconds},
	{"node_connect_added", "added to connect, from the node, median", seconds},
	{"connect_direct", "connect to a Pod without a Service, median", seconds},
	{"connect_plain", "the same before the proxy starts, median", seconds},
	{"exchange_p50", "question and answer on an open connection, median", seconds},
}

// markdown is the report for people. The charts are in a directory relative to it.
func (r *Report) markdown(charts string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Measured %s on %s, with\n\n    %s\n\n", r.Date, r.Machine, r.Command)
	fmt.Fprintf(&b, "Each figure is the median of %d round(s); %s. In parentheses is its ratio to kube-proxy's in the same\n"+
		"mode, or to the first other proxy's. `~` marks a figure whose rounds differ by more than %.0f %%: the\n"+
		"machine was too noisy to tell. The floor is what no proxy can avoid: list and decode the objects, write\n"+
		"as many elements in one transaction, hear of a change.\n",
		r.Rounds, strings.Join(r.Families, " and "), 100*noisySpread)
	for _, chart := range chartNames() {
		fmt.Fprintf(&b, "\n![%s](%s)\n", strings.TrimSuffix(chart, ".svg"), path.Join(charts, chart))
	}
	for i := range r.Sizes {
		r.Sizes[i].markdown(&b)
	}
	return b.String()
}

func (s *SizeResult) markdown(b *strings.Builder) {
	fmt.Fprintf(b, "\n### %d Services with %d endpoints each\n\n| |", s.Services, s.Endpoints)
	for i := range s.Proxies {
		fmt.Fprintf(b, " %s |", s.Proxies[i].name())
	}
	fmt.Fprintf(b, " floor |\n| --- |%s --- |\n", strings.Repeat(" --- |", len(s.Proxies)))
	for _, f := range shownFigures {
		fmt.Fprintf(b, "| %s |", f.title)
		for i := range s.Proxies {
			fmt.Fprintf(b, " %s |", s.cell(&s.Proxies[i], f.key, f.unit))
		}
		floor, has := median(s.Floors[f.key])
		text := ""
		if has {
			text = f.unit.text(floor)
		}
		fmt.Fprintf(b, " %s |\n", text)
	}
	s.multiples(b)
	for i := range s.Proxies {
		if p := &s.Proxies[i]; p.Failed != "" {
			fmt.Fprintf(b, "\n%s failed: %s\n", p.name(), strings.SplitN(p.Failed, "\n", 2)[0])
		}
	}
}

func (s *SizeResult) cell(p *ProxyResult, key string, u unit) string {
	v, has := median(p.Figures[key])
	if !has {
		return "-"
	}
	text := u.text(v)
	if noisy(p.Figures[key]) {
		text = "~" + text
	}
	if ref := s.reference(p); ref != nil {
		if base, has := median(ref.Figures[key]); has && base > 0 {
			text += fmt.Sprintf(" (%s)", ratioText(v/base))
		}
	}
	return text
}

// ratioText has two significant digits.
func ratioText(r float64) string { return fmt.Sprintf("%.2g", r) }

// multiples says how often each proxy needs the floor.
func (s *SizeResult) multiples(b *strings.Builder) {
	fmt.Fprintf(b, "\nAs a multiple of the floor:\n\n| |%s\n| --- |%s\n", columns(s.Proxies), strings.Repeat(" --- |", len(s.Proxies)))
	for _, f := range shownFigures {
		floor, has := median(s.Floors[f.key])
		if !has || floor == 0 {
			continue
		}
		fmt.Fprintf(b, "| %s |", f.title)
		for i := range s.Proxies {
			text := "-"
			if v, has := median(s.Proxies[i].Figures[f.key]); has {
				text = ratioText(v / floor)
			}
			fmt.Fprintf(b, " %s |", text)
		}
		b.WriteString("\n")
	}
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
	text, err := os.ReadFile(document)
	if err != nil {
		return err
	}
	before, rest, found := strings.Cut(string(text), sectionBegin)
	_, after, ended := strings.Cut(rest, sectionEnd)
	if !found || !ended {
		return fmt.Errorf("%s has no lines %q and %q", document, sectionBegin, sectionEnd)
	}
	return os.WriteFile(document, []byte(before+sectionBegin+"\n\n"+r.markdown(charts)+"\n"+sectionEnd+after), 0o644)
}
