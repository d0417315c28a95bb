// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"context"
	"maps"
	"slices"
	"testing"
	"time"

	"signalbox/proxier"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// faulty is the reference mode with one fault: it is given another plan than
// the right one.
type faulty struct {
	proxier.Proxier
	spoil func(*plan.Plan)
}

func (f faulty) Sync(ctx context.Context, desired *plan.Plan, change plan.Change) error {
	spoilt := &plan.Plan{Family: desired.Family, Node: desired.Node, Services: map[plan.ServicePortName]*plan.ServicePort{}}
	for name, sp := range desired.Services {
		other := *sp
		other.Frontends = slices.Clone(sp.Frontends)
		spoilt.Services[name] = &other
	}
	f.spoil(spoilt)
	return f.Proxier.Sync(ctx, spoilt, change)
}

// eachFrontend makes a fault out of a change to every frontend.
func eachFrontend(spoil func(*plan.Frontend)) func(*plan.Plan) {
	return func(p *plan.Plan) {
		for _, sp := range p.Services {
			for i := range sp.Frontends {
				spoil(&sp.Frontends[i])
			}
		}
	}
}

func withoutLast(s *plan.EndpointSet) *plan.EndpointSet {
	if s.Len() < 2 {
		return s
	}
	return &plan.EndpointSet{Endpoints: s.Endpoints[:s.Len()-1]}
}

func neverRemove() func(*plan.Plan) {
	ever := map[plan.ServicePortName]*plan.ServicePort{}
	return func(p *plan.Plan) {
		maps.Copy(ever, p.Services)
		maps.Copy(p.Services, ever)
	}
}

// faults name the scenario that is about them.
var faults = []struct {
	fault, scenario string
	spoil           func(*plan.Plan)
}{
	{"never masquerades", "clusterip-basic", eachFrontend(func(f *plan.Frontend) { f.Masquerade = 0 })},
	{"always masquerades", "clusterip-basic", eachFrontend(func(f *plan.Frontend) { f.Masquerade = plan.AnySource })},
	{"does not masquerade the node", "masquerade-node", eachFrontend(func(f *plan.Frontend) { f.Masquerade &^= plan.FromNode })},
	{"passes over one endpoint", "clusterip-basic", eachFrontend(func(f *plan.Frontend) {
		f.Internal, f.External = withoutLast(f.Internal), withoutLast(f.External)
	})},
	{"rejects what must be dropped", "external-policy-local", eachFrontend(func(f *plan.Frontend) { f.WhenEmpty = plan.Reject })},
	{"drops what must be rejected", "no-endpoints-refused", eachFrontend(func(f *plan.Frontend) { f.WhenEmpty = plan.Drop })},
	{"does not tell clients from Pods", "external-policy-local", eachFrontend(func(f *plan.Frontend) { f.External = f.Internal })},
	{"has no short way for Pods", "external-policy-local", eachFrontend(func(f *plan.Frontend) { f.Internal = f.External })},
	{"ignores source ranges", "source-ranges", eachFrontend(func(f *plan.Frontend) { f.Sources = nil })},
	{"ignores affinity", "affinity-sticky", func(p *plan.Plan) {
		for _, sp := range p.Services {
			sp.AffinityTimeout = 0
		}
	}},
	{"never forgets a client", "affinity-timeout", func(p *plan.Plan) {
		for _, sp := range p.Services {
			sp.AffinityTimeout *= 100
		}
	}},
	{"forgets a client too soon", "affinity-timeout", func(p *plan.Plan) {
		for _, sp := range p.Services {
			sp.AffinityTimeout = min(sp.AffinityTimeout, time.Second)
		}
	}},
	{"serves NodePorts everywhere", "nodeport-addresses-primary", func(p *plan.Plan) { p.Node.NodePortAddrs.All = true }},
	{"knows no Pods", "detect-local-own-node", func(p *plan.Plan) { p.Node.LocalPods = plan.LocalPods{} }},
	{"lets unallocated addresses pass", "unused-clusterip", func(p *plan.Plan) { p.Node.ServiceCIDRs = nil }},
	{"ignores the sources that routes name", "route-source", func(p *plan.Plan) { p.Node.RouteSources = nil }},
	{"never removes a Service", "change-clusterip", neverRemove()},
	{"does not tell the node from Pods", "masquerade-node", eachFrontend(func(f *plan.Frontend) {
		if f.Masquerade&plan.FromPods == 0 {
			f.Masquerade &^= plan.FromNode
		}
	})},
	{"leaves stale flows", "udp-stale-endpoint", nil},
	{"leaves the flows of a Service that is gone", "udp-stale-none", nil},
	{"leaves the flows from before a Service", "udp-stale-created", nil},
}

// TestFaultsAreFound is the contract's own test: a mode that does one thing
// wrong must fail the scenario that is about it.
func TestFaultsAreFound(t *testing.T) {
	for _, c := range faults {
		t.Run(c.fault, func(t *testing.T) {
			t.Parallel()
			mode := conformance.Mode{Name: "nftables-reference", New: newReference, Flows: cleanFlows}
			if c.spoil == nil {
				mode.Flows = nil
			} else {
				mode.New = func(o proxier.Options) (proxier.Proxier, error) {
					return faulty{referenceOf(o), c.spoil}, nil
				}
			}
			s := scenario(t, c.scenario)
			if err := s.Try(context.Background(), mode); err == nil {
				t.Errorf("a mode that %s passes %s", c.fault, c.scenario)
			} else {
				t.Log(err)
			}
		})
	}
}

func scenario(t *testing.T, name string) *conformance.Scenario {
	t.Helper()
	all, err := conformance.Scenarios()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(s *conformance.Scenario) bool { return s.Name == name })
	if i < 0 {
		t.Fatalf("there is no scenario %s", name)
	}
	return all[i]
}
