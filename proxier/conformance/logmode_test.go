// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// logMode is the mode that docs/adding-a-mode.md explains. It moves no packet: in
// place of a kernel it has a log of lines that come ("+") and go ("-"). Each node
// and family has its own log in dir.
type logMode struct {
	proxier.ModeDefaults
	dir string
}

var _ proxier.Mode = logMode{}

func (logMode) Name() string { return "log" }

func (m logMode) Supported(f plan.Family) error {
	if _, err := os.Stat(m.dir); err != nil {
		return &proxier.UnsupportedError{Mode: m.Name(), Family: f, Missing: "the directory of logs", Remedy: "create " + m.dir, Err: err}
	}
	return nil
}

func (m logMode) New(o proxier.Options) (proxier.Proxier, error) {
	path, err := m.path(o.Family)
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("mode %s cannot serve %s: %w", m.Name(), o.Family, err)
	}
	return &logProxier{mode: m.Name(), family: o.Family, log: log}, nil
}

// Render returns the lines that stand in the log once the plan is written.
func (logMode) Render(_ proxier.Options, p *plan.Plan) (string, error) {
	var lines []string
	for _, part := range compileLog(p, plan.Change{All: true}) {
		lines = append(lines, part...)
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n", nil
}

// Cleanup removes the log. Nothing drains, because no connection depends on it.
func (m logMode) Cleanup(f plan.Family, _ bool) (removed bool, draining int, err error) {
	path, err := m.path(f)
	if err != nil {
		return false, 0, err
	}
	err = os.Remove(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, 0, nil
	}
	return err == nil, 0, err
}

// path is the log of the node in whose network namespace it is called.
func (m logMode) path(f plan.Family) (string, error) {
	namespace, err := os.Readlink("/proc/thread-self/ns/net")
	return filepath.Join(m.dir, namespace+"-"+f.String()), err
}

// logProxier is the log mode at work in one IP family.
type logProxier struct {
	proxier.Defaults
	mode   string
	family plan.Family
	log    *os.File
	// Service port -> its lines in the log; the empty name has the node's.
	written map[plan.ServicePortName][]string
}

// Sync compiles what has changed, compares it with what it wrote before, and
// writes the difference. It remembers the new lines only once they are written.
func (l *logProxier) Sync(ctx context.Context, desired *plan.Plan, change plan.Change) error {
	if err := desired.Check(ctx, l.mode, l.family); err != nil {
		return err
	}
	var text bytes.Buffer
	before := l.written
	if change.All {
		text.WriteString("flush\n")
		before = nil
	}
	wanted := compileLog(desired, change)
	for _, name := range slices.SortedFunc(maps.Keys(wanted), plan.ServicePortName.Compare) {
		diffLog(&text, before[name], wanted[name])
	}
	if n, err := l.log.Write(text.Bytes()); err != nil {
		err = fmt.Errorf("mode %s: writing %d changed Service ports of %s: %w", l.mode, len(wanted), l.family, err)
		if n > 0 {
			err = fmt.Errorf("%w: %w", proxier.ErrUnknownState, err)
		}
		return err
	}
	l.remember(wanted, change.All)
	return nil
}

// Close leaves the log as it is.
func (l *logProxier) Close() error { return l.log.Close() }

// remember notes the lines that are in the log now.
func (l *logProxier) remember(written map[plan.ServicePortName][]string, all bool) {
	if all {
		l.written = map[plan.ServicePortName][]string{}
	}
	for name, lines := range written {
		if lines == nil {
			delete(l.written, name)
		} else {
			l.written[name] = lines
		}
	}
}

// compileLog returns the lines of everything that the change names; none for a
// Service port that the plan no longer has.
func compileLog(desired *plan.Plan, change plan.Change) map[plan.ServicePortName][]string {
	wanted := map[plan.ServicePortName][]string{}
	if change.All || change.Node {
		wanted[plan.ServicePortName{}] = nodeLines(desired.Node)
	}
	names := slices.Values(change.Services)
	if change.All {
		names = maps.Keys(desired.Services)
	}
	for name := range names {
		wanted[name] = serviceLines(desired.Services[name])
	}
	return wanted
}

func nodeLines(n plan.Node) []string {
	lines := []string{fmt.Sprintf("node pods %+v own %v", n.LocalPods, n.OwnPods), fmt.Sprintf("node ports at %+v", n.NodePortAddrs)}
	for _, p := range n.ServiceCIDRs {
		lines = append(lines, fmt.Sprintf("node drops unallocated %s", p))
	}
	for _, s := range n.RouteSources {
		lines = append(lines, fmt.Sprintf("node source by %s", s))
	}
	return lines
}

// serviceLines holds a line for each frontend, and for each endpoint of its sets.
func serviceLines(sp *plan.ServicePort) []string {
	if sp == nil {
		return nil
	}
	var lines []string
	for i := range sp.Frontends {
		f := &sp.Frontends[i]
		at := sp.Name.String() + " at " + f.Key(sp.Name.Protocol).String()
		lines = append(lines, fmt.Sprintf("%s affinity %s masquerade %s sources %v", at, sp.AffinityTimeout, f.Masquerade, f.Sources))
		lines = append(lines, endpointLines(at+" internal", f.Internal, f.WhenEmpty)...)
		lines = append(lines, endpointLines(at+" external", f.External, f.WhenEmpty)...)
	}
	return lines
}

func endpointLines(from string, set *plan.EndpointSet, whenEmpty plan.Verdict) []string {
	if set.Len() == 0 {
		return []string{fmt.Sprintf("%s %s", from, whenEmpty)}
	}
	var lines []string
	for _, e := range set.Endpoints {
		lines = append(lines, fmt.Sprintf("%s to %s", from, e))
	}
	return lines
}

// diffLog writes the lines that go and those that come.
func diffLog(text *bytes.Buffer, before, wanted []string) {
	for _, line := range before {
		if !slices.Contains(wanted, line) {
			fmt.Fprintf(text, "- %s\n", line)
		}
	}
	for _, line := range wanted {
		if !slices.Contains(before, line) {
			fmt.Fprintf(text, "+ %s\n", line)
		}
	}
}
