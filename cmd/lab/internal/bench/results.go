// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"signalbox/internal/measure"
	"signalbox/internal/testbed"
)

// Report is everything that one run measured. Times are in seconds, memory in bytes.
type Report struct {
	Date     string   `json:"date"`
	Machine  string   `json:"machine"`
	Command  string   `json:"command"`
	Families []string `json:"families"`
	// NoKernelMemory says why the memory of the kernel is not measured.
	NoKernelMemory string       `json:"noKernelMemory,omitempty"`
	Sizes          []SizeResult `json:"sizes"`
}

// SizeResult is what was measured at one size.
type SizeResult struct {
	Size
	Rounds  int           `json:"rounds"`
	Proxies []ProxyResult `json:"proxies"`
	// Floors are, by the name of a figure, what no proxy can go below; one for each round.
	Floors map[string][]float64 `json:"floors"`
}

// ProxyResult holds the figures of one proxy, one for each round.
type ProxyResult struct {
	Program string               `json:"program"`
	Mode    string               `json:"mode"`
	Variant string               `json:"variant,omitempty"`
	Failed  string               `json:"failed,omitempty"`
	Figures map[string][]float64 `json:"figures"`
	// Floors are those of this proxy alone, which count instead of those of the size.
	Floors map[string][]float64 `json:"floors,omitempty"`
	// Moves are the latencies of all moves at rest.
	Moves []float64 `json:"moves"`
}

func (r *ProxyResult) name() string {
	return strings.TrimSpace(r.Program + " " + r.Mode + " " + r.Variant)
}

func newProxyResult(p testbed.Proxy) ProxyResult {
	return ProxyResult{Program: p.Program, Mode: p.Mode, Variant: p.Variant, Figures: map[string][]float64{}, Floors: map[string][]float64{}}
}

// add adds the figures of one round.
func add(all map[string][]float64, round map[string]float64) {
	for name, v := range round {
		all[name] = append(all[name], v)
	}
}

func newReport(cfg Config) *Report {
	r := &Report{Date: today(), Machine: machine(), Command: strings.Join(os.Args, " ")}
	for _, f := range cfg.Families {
		r.Families = append(r.Families, f.String())
	}
	return r
}

// machine names the processors and the kernel.
func machine() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Sprintf("%d processors", runtime.NumCPU())
	}
	model := "processors"
	text, _ := os.ReadFile("/proc/cpuinfo") // without it, the number is enough
	for line := range strings.Lines(string(text)) {
		if name, value, found := strings.Cut(line, ":"); found && strings.TrimSpace(name) == "model name" {
			model = strings.TrimSpace(value)
			break
		}
	}
	return fmt.Sprintf("%d x %s, Linux %s", runtime.NumCPU(), model, unix.ByteSliceToString(u.Release[:]))
}

func (r *Report) writeJSON(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// Read reads a report.json.
func Read(path string) (*Report, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := new(Report)
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// median is the middle of the rounds' values. has is false without values.
func median(values []float64) (m float64, has bool) { return measure.Median(values), len(values) > 0 }

// noisySpread is the spread of a figure over the rounds, as a share of its median, from
// which on the figure tells nothing.
const noisySpread = 0.5

// noisy says whether the rounds differ too much.
func noisy(values []float64) bool {
	m, has := median(values)
	return has && m > 0 && (slices.Max(values)-slices.Min(values))/m > noisySpread
}

// reference is the proxy that p is compared with: the same without its variant, kube-proxy
// in the same mode, haproxy for the userspace mode, or else the first other program. It is
// nil for that proxy itself.
func (s *SizeResult) reference(p *ProxyResult) *ProxyResult {
	var other *ProxyResult
	for i := range s.Proxies {
		q := &s.Proxies[i]
		switch {
		case q.Failed != "" || q == p || q.Variant != "":
		case p.Variant != "":
			if q.Program == p.Program && q.Mode == p.Mode {
				return q
			}
		case p.Program != testbed.SignalboxProgram || q.Program == testbed.SignalboxProgram:
		case q.Mode == p.Mode || p.Mode == "userspace" && q.Program == haproxyProgram:
			return q
		case other == nil:
			other = q
		}
	}
	return other
}
