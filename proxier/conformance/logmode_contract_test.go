// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"context"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"signalbox/proxier"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// TestLogMode runs what the contract has for a mode that moves no packet.
func TestLogMode(t *testing.T) {
	conformance.Run(t, logContract(logMode{dir: t.TempDir()}))
}

func logContract(m logMode) conformance.Mode {
	return conformance.Mode{
		Name:           m.Name(),
		New:            m.New,
		Supported:      m.Supported,
		Dump:           m.dump,
		WithoutPackets: true,
	}
}

// dump returns the lines that the log of a node leaves.
func (m logMode) dump(f plan.Family) string {
	path, err := m.path(f)
	if err != nil {
		return err.Error()
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return replayLog(string(text))
}

// replayLog returns the lines that a log leaves, sorted. A line that comes twice, or
// goes without having come, is among them as a fault.
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

// faultyLog is the log mode with one fault in what it makes of a change.
type faultyLog struct {
	*logProxier
	spoil func(*logProxier, *plan.Change)
}

func (f faultyLog) Sync(ctx context.Context, desired *plan.Plan, change plan.Change) error {
	f.spoil(f.logProxier, &change)
	return f.logProxier.Sync(ctx, desired, change)
}

// TestLogModeFaultsAreFound breaks the log mode, and wants the contract to find it.
func TestLogModeFaultsAreFound(t *testing.T) {
	for _, c := range []struct {
		fault, scenario string
		spoil           func(*logProxier, *plan.Change)
	}{
		{"misses changes of Services", "change-endpoints", func(_ *logProxier, c *plan.Change) { c.Services = nil }},
		{"misses changes of the node", "route-source", func(_ *logProxier, c *plan.Change) { c.Node = false }},
		{"forgets what it wrote", "change-endpoints", func(l *logProxier, _ *plan.Change) { clear(l.written) }},
		{"cannot write", "clusterip-basic", func(l *logProxier, _ *plan.Change) { l.log.Close() }},
	} {
		t.Run(c.fault, func(t *testing.T) {
			mode := logContract(logMode{dir: t.TempDir()})
			right := mode.New
			if err := scenario(t, c.scenario).Try(t.Context(), mode); err != nil {
				t.Fatalf("without a fault: %v", err)
			}
			mode.New = func(o proxier.Options) (proxier.Proxier, error) {
				p, err := right(o)
				if err != nil {
					return nil, err
				}
				return faultyLog{p.(*logProxier), c.spoil}, nil
			}
			if err := scenario(t, c.scenario).Try(t.Context(), mode); err == nil {
				t.Errorf("a mode that %s passes %s", c.fault, c.scenario)
			} else {
				t.Log(err)
			}
		})
	}
}

// TestLogModeOutsideSync compares Render with what Sync writes, and has Cleanup
// remove it.
func TestLogModeOutsideSync(t *testing.T) {
	m := logMode{dir: t.TempDir()}
	set := &plan.EndpointSet{Endpoints: []plan.Endpoint{{AddrPort: netip.MustParseAddrPort("10.244.1.5:8080")}}}
	name := plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "default", Name: "web"}, Protocol: plan.TCP}
	p := &plan.Plan{Family: plan.IPv4, Services: map[plan.ServicePortName]*plan.ServicePort{name: {
		Name: name, Usable: set,
		Frontends: []plan.Frontend{{Addr: netip.MustParseAddr("10.96.0.10"), Port: 80, Internal: set, External: set}},
	}}}
	worker, err := m.New(proxier.Options{Family: plan.IPv4})
	if err != nil {
		t.Fatal(err)
	}
	if err := worker.Sync(t.Context(), p, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	if err := worker.Close(); err != nil {
		t.Fatal(err)
	}
	text, err := m.Render(proxier.Options{Family: plan.IPv4}, p)
	if diff := cmp.Diff(m.dump(plan.IPv4), text); diff != "" || err != nil {
		t.Errorf("Render (-written +rendered): %v\n%s", err, diff)
	}
	for _, want := range []bool{true, false} {
		if removed, _, err := m.Cleanup(plan.IPv4, false); removed != want || err != nil {
			t.Errorf("Cleanup removed %v, %v; want %v", removed, err, want)
		}
	}
}
