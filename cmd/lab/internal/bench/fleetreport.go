// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"gonum.org/v1/gonum/stat"
)

// FleetReport is what one run of RunFleet measured.
type FleetReport struct {
	Date     string   `json:"date"`
	Machine  string   `json:"machine"`
	Command  string   `json:"command"`
	Families []string `json:"families"`
	Size
	Rate    int           `json:"changesPerSecond"`
	Proxies []ProxyCost   `json:"proxies"`
	Fleets  []FleetResult `json:"fleets"`
}

func newFleetReport(cfg FleetConfig) *FleetReport {
	r := newReport(Config{Families: cfg.Families})
	return &FleetReport{Date: r.Date, Machine: r.Machine, Command: r.Command, Families: r.Families, Size: cfg.Size, Rate: cfg.Rate}
}

var fleetRows = []struct {
	title string
	unit  unit
	of    func(*FleetResult) float64
}{
	{"start of all, until the last has every Service", seconds, func(r *FleetResult) float64 { return r.StartWall }},
	{"the same, the API server's processor time", seconds, func(r *FleetResult) float64 { return r.StartCPU }},
	{"start of one, requests", count, func(r *FleetResult) float64 { return r.StartRequests }},
	{"start of one, bytes received", bytes, func(r *FleetResult) float64 { return r.StartBytes }},
	{"one change, the API server's processor time", seconds, func(r *FleetResult) float64 { return r.ChangeCPU }},
	{"one change, bytes to each daemon", bytes, func(r *FleetResult) float64 { return r.ChangeBytes }},
	{"one change, until the last daemon has it, median", seconds, func(r *FleetResult) float64 { return r.LastP50 }},
	{"the same, 99th percentile", seconds, func(r *FleetResult) float64 { return r.LastP99 }},
}

// Write writes fleet.json.
func (r *FleetReport) Write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "fleet.json"), append(text, '\n'), 0o644)
}

// Markdown is the report for people.
func (r *FleetReport) Markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Measured %s on %s, with\n\n    %s\n\n", r.Date, r.Machine, r.Command)
	fmt.Fprintf(&b, "%d Services with %d endpoints each, %s, %d changes a second.\n\n", r.Services, r.Endpoints, strings.Join(r.Families, " and "), r.Rate)
	r.proxies(&b)
	b.WriteString("| daemons |")
	for i := range r.Fleets {
		fmt.Fprintf(&b, " %d |", r.Fleets[i].Daemons)
	}
	fmt.Fprintf(&b, "\n| --- |%s\n", strings.Repeat(" --- |", len(r.Fleets)))
	for _, row := range fleetRows {
		fmt.Fprintf(&b, "| %s |", row.title)
		for i := range r.Fleets {
			fmt.Fprintf(&b, " %s |", row.unit.text(row.of(&r.Fleets[i])))
		}
		b.WriteString("\n")
	}
	r.estimate(&b)
	return b.String()
}

// proxies is the table of what one node asks for.
func (r *FleetReport) proxies(b *strings.Builder) {
	if len(r.Proxies) == 0 {
		return
	}
	b.WriteString("One node:\n\n| | requests at start | received at start | API server's processor time | received for a change | API server's processor time |\n" +
		"| --- | --- | --- | --- | --- | --- |\n")
	for _, p := range r.Proxies {
		fmt.Fprintf(b, "| %s %s | %d | %s | %s | %s | %s |\n", p.Program, p.Mode, p.StartRequests, bytes.text(p.StartBytes),
			seconds.text(p.StartCPU), bytes.text(p.ChangeBytes), seconds.text(p.ChangeCPU))
	}
	b.WriteString("\nFleets:\n\n")
}

// estimatedNodes is the largest cluster that Kubernetes promises to support.
const estimatedNodes = 5000

// estimate draws a line through the fleets, up to a cluster of estimatedNodes.
func (r *FleetReport) estimate(b *strings.Builder) {
	if len(r.Fleets) < 2 {
		return
	}
	line := func(of func(*FleetResult) float64) float64 {
		var daemons, values []float64
		for i := range r.Fleets {
			daemons, values = append(daemons, float64(r.Fleets[i].Daemons)), append(values, of(&r.Fleets[i]))
		}
		base, each := stat.LinearRegression(daemons, values, nil, false)
		return base + each*estimatedNodes
	}
	last := &r.Fleets[len(r.Fleets)-1]
	change := line(func(r *FleetResult) float64 { return r.ChangeCPU })
	fmt.Fprintf(b, "\nAn estimate for %d nodes, from straight lines through these figures:\n\n", estimatedNodes)
	fmt.Fprintf(b, "- All daemons start at once: %s of the API server's processor time, and %s sent.\n",
		seconds.text(line(func(r *FleetResult) float64 { return r.StartCPU })), bytes.text(estimatedNodes*last.StartBytes))
	fmt.Fprintf(b, "- One change: %s of processor time, and %s sent. %d changes a second keep %.1f processors busy.\n",
		seconds.text(change), bytes.text(estimatedNodes*last.ChangeBytes), r.Rate, change*float64(r.Rate))
}

const (
	fleetBegin = "<!-- lab fleet writes from here -->"
	fleetEnd   = "<!-- to here (lab fleet) -->"
)

// Embed replaces the part of a document between two marks by the report.
func (r *FleetReport) Embed(document string) error {
	return embed(document, fleetBegin, fleetEnd, r.Markdown())
}
