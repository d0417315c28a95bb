package conformance_test

import (
	"bytes"
	"context"
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
// place of a kernel it has a log of lines that come ("+") and go ("-"). Each
// node and family has its own log.
const logMode = "log"

// logProxier is the log mode in one IP family.
type logProxier struct {
	proxier.Defaults
	family plan.Family
	log    *os.File
	// Service port -> its lines in the log; the empty name has the node's.
	written map[plan.ServicePortName][]string
}

// newLog opens the log of the node in whose network namespace it is called.
func newLog(dir string, o proxier.Options) (*logProxier, error) {
	path, err := logPath(dir, o.Family)
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("mode %s cannot serve %s: %w", logMode, o.Family, err)
	}
	return &logProxier{family: o.Family, log: log}, nil
}

func logPath(dir string, f plan.Family) (string, error) {
	namespace, err := os.Readlink("/proc/thread-self/ns/net")
	return filepath.Join(dir, namespace+"-"+f.String()), err
}

// Sync compiles what has changed, compares it with what it wrote before, and
// writes the difference. It remembers the new lines only once they are written.
func (l *logProxier) Sync(ctx context.Context, desired *plan.Plan, change plan.Change) error {
	if err := desired.For(ctx, logMode, l.family); err != nil {
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
		err = fmt.Errorf("mode %s: writing %d changed Service ports of %s: %w", logMode, len(wanted), l.family, err)
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

// replayLog returns the lines that a log leaves, sorted. A line that comes twice or
// goes without having come is among them as a fault.
func replayLog(text string) string {
	lines := map[string]bool{}
	for entry := range strings.Lines(text) {
		sign, line, _ := strings.Cut(entry, " ")
		switch {
		case entry == "flush\n":
			clear(lines)
		case sign == "+" && !lines[line]:
			lines[line] = true
		case sign == "-" && lines[line]:
			delete(lines, line)
		default:
			lines["fault: "+entry] = true
		}
	}
	return strings.Join(slices.Sorted(maps.Keys(lines)), "")
}

// dumpLog is the log mode's Dump.
func dumpLog(dir string, f plan.Family) string {
	path, err := logPath(dir, f)
	if err != nil {
		return err.Error()
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return replayLog(string(text))
}
