// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"signalbox/internal/netlab"
	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
	"signalbox/proxier/syncer"
)

// Mode is a mode as the contract sees it.
type Mode struct {
	// Name is the mode's own, with its variant after a dash where there are
	// several: "nftables", "iptables-legacy".
	Name string
	// New makes a Proxier. It is called inside the node, as are Sync and
	// Close.
	New func(proxier.Options) (proxier.Proxier, error)
	// Supported says what the kernel lacks for the mode, as a
	// *proxier.UnsupportedError. It is called inside a network namespace of a
	// lab.
	Supported func(plan.Family) error
	// HasSchedulers is Settings.HasSchedulers.
	HasSchedulers bool
	// LocalhostNodePorts is Settings.LocalhostNodePorts of a scenario that has
	// localhost-nodeports.
	LocalhostNodePorts service.LocalhostNodePorts
	// Flows makes what removes stale UDP flows of a node whose addresses
	// localAddrs returns; called inside the node. May be nil for a mode that
	// needs none.
	Flows func(localAddrs func() ([]netip.Addr, error)) (Flows, error)
	// NodeSource says that a server may see the node's address where a
	// scenario wants it to see the client's, for a mode that cannot keep that
	// between these two hosts. May be nil.
	NodeSource func(link netlab.PodLink, client, server string) bool
	// DropForwarded gives the node a firewall that drops forwarded packets but
	// for those that the mode's rules accept, if they can; called inside the
	// node.
	DropForwarded func(plan.Family) error
	// KnownProblem is in what the mode reports of ports that scenarios for all modes
	// have; empty for nothing. Scenarios do not name it.
	KnownProblem string
	// Dump returns the mode's kernel state for the message of a failed
	// scenario; called inside the node. May be nil.
	Dump func(plan.Family) string
	// WithoutPackets leaves out the steps that send packets or wait, for a mode
	// that moves no packet. Instead, Dump must return the same text before and
	// after a restart at the end of the script.
	WithoutPackets bool
}

// Flows removes stale flows until it is closed.
type Flows interface {
	syncer.FlowCleaner
	// Flush waits until what was queued has been done.
	Flush(context.Context) error
	Close()
}

// Run runs the whole contract against a mode, in both families.
func Run(t *testing.T, mode Mode) {
	scenarios, err := Scenarios()
	if err != nil {
		t.Fatal(err)
	}
	supported := map[plan.Family]bool{}
	for _, family := range plan.Families {
		supported[family] = checkSupported(t, mode, family)
	}
	for _, s := range scenarios {
		if !s.Setup.isFor(mode.Name) {
			continue
		}
		for _, v := range s.variants() {
			if slices.ContainsFunc(v.families, func(f plan.Family) bool { return !supported[f] }) {
				continue // already reported, once
			}
			t.Run(s.Name+"/"+v.String(), func(t *testing.T) {
				t.Parallel() // a lab is a world of its own
				runScenario(t, mode, s, v)
			})
		}
	}
}

// checkSupported asks outside of any subtest, so that a test filter cannot make
// a family look unsupported. One that the kernel cannot serve is reported as a
// skipped subtest, or as a failure where it must be served.
func checkSupported(t *testing.T, mode Mode, family plan.Family) bool {
	t.Helper()
	lab, err := netlab.New(netlab.Options{Pods: []netlab.PodSpec{}})
	if err != nil {
		t.Fatal(err)
	}
	defer lab.Close()
	err = lab.Host("node1").Do(func() error { return mode.Supported(family) })
	if err == nil {
		return true
	}
	var missing *proxier.UnsupportedError
	if !errors.As(err, &missing) {
		t.Fatalf("%s must say what is missing with an UnsupportedError, not with: %v", mode.Name, err)
	}
	feature := mode.Name + "/" + family.String()
	if required(feature) {
		t.Errorf("%s must work on this kernel, but: %v (SIGNALBOX_REQUIRE names what must)", feature, err)
		return false
	}
	t.Run(family.String(), func(t *testing.T) { t.Skip(err) })
	return false
}

// skipUnlessRequired skips a test for want of a kernel feature, or fails it
// where the kernel must have that.
func skipUnlessRequired(t *testing.T, feature string, err error) {
	t.Helper()
	if required(feature) {
		t.Fatalf("%s must work on this kernel, but: %v (SIGNALBOX_REQUIRE names what must)", feature, err)
	}
	t.Skip(err)
}

// required says whether a feature ("nftables/IPv6", "lab/vxlan") must exist on
// this kernel. Unless SIGNALBOX_REQUIRE holds a list of what must, with * at
// the end of a word for anything, all must but IPVS and SCTP: a suite that skips
// by itself would be green where nothing works.
func required(feature string) bool {
	list, set := os.LookupEnv("SIGNALBOX_REQUIRE")
	if !set {
		// Many kernels come without; those of the virtual machines have both.
		_, machine := os.LookupEnv("SIGNALBOX_VM_RELEASE")
		return machine || !strings.HasPrefix(feature, "ipvs/") && feature != "lab/sctp"
	}
	return slices.ContainsFunc(strings.Split(list, ","), func(word string) bool {
		start, wildcard := strings.CutSuffix(strings.TrimSpace(word), "*")
		return feature == start || wildcard && strings.HasPrefix(feature, start)
	})
}

// String names the variant as a test, for example "IPv4/bridged".
func (v variant) String() string {
	name := v.families[0].String()
	if len(v.families) > 1 {
		name = "both"
	}
	name += "/" + v.lab
	if v.detectLocal != string(service.DetectLocalClusterCIDR) {
		name += "/" + v.detectLocal
	}
	return name
}

func (s *Scenario) variants() []variant {
	families := map[string][]plan.Family{"IPv4": {plan.IPv4}, "IPv6": {plan.IPv6}, "both": plan.Families}
	var out []variant
	for _, f := range s.Setup.Families {
		for _, lab := range s.Setup.Labs {
			for _, d := range s.Setup.DetectLocal {
				out = append(out, variant{lab, d, families[f]})
			}
		}
	}
	return out
}

func runScenario(t *testing.T, mode Mode, s *Scenario, v variant) {
	err := s.run(context.Background(), mode, v)
	var missing *netlab.MissingError
	if errors.As(err, &missing) {
		skipUnlessRequired(t, "lab/"+missing.Feature, err)
	}
	if err != nil {
		t.Errorf("%s\n%v", s.About, err)
	}
}

// Try runs the first variant of a scenario in its first family and returns what
// the mode did wrong.
func (s *Scenario) Try(ctx context.Context, mode Mode) error {
	return s.run(ctx, mode, s.variants()[0])
}

func (s *Scenario) run(ctx context.Context, mode Mode, v variant) error {
	w, err := newWorld(mode, s, v)
	if err != nil {
		return err
	}
	err = w.run(ctx)
	if err != nil {
		err = fmt.Errorf("%s.txtar: %w%s", s.Name, err, w.diagnosis())
	}
	return errors.Join(err, w.close())
}

// diagnosis is what helps to understand a failure.
func (w *world) diagnosis() string {
	var b strings.Builder
	w.mu.Lock()
	if w.log.Len() > 0 {
		fmt.Fprintf(&b, "\n--- log\n%s", w.log.String())
	}
	w.mu.Unlock()
	if w.mode.Dump != nil {
		state, err := w.dump()
		if err != nil {
			state = fmt.Sprintf("\n--- no state: %v\n", err)
		}
		b.WriteString(state)
	}
	return b.String()
}

// dump is the mode's kernel state in all families.
func (w *world) dump() (string, error) {
	var b strings.Builder
	err := w.onNode(func() error {
		for _, family := range w.families {
			fmt.Fprintf(&b, "\n--- %s state\n%s", family, w.mode.Dump(family))
		}
		return nil
	})
	return b.String(), err
}
