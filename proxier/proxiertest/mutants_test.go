package proxiertest_test

import (
	"context"
	"maps"
	"slices"
	"testing"
	"time"

	"signalbox/proxier"
	"signalbox/proxier/proxiertest"
)

// faulty is the reference mode with one fault: it is given another plan than
// the right one.
type faulty struct {
	proxier.Proxier
	spoil func(*proxier.Plan)
}

func (f faulty) Sync(ctx context.Context, plan *proxier.Plan, change proxier.Change) error {
	spoilt := &proxier.Plan{Family: plan.Family, Node: plan.Node, Services: map[proxier.ServicePortName]*proxier.ServicePort{}}
	for name, sp := range plan.Services {
		other := *sp
		other.Frontends = slices.Clone(sp.Frontends)
		spoilt.Services[name] = &other
	}
	f.spoil(spoilt)
	return f.Proxier.Sync(ctx, spoilt, change)
}

// eachFrontend makes a fault out of a change to every frontend.
func eachFrontend(spoil func(*proxier.Frontend)) func(*proxier.Plan) {
	return func(p *proxier.Plan) {
		for _, sp := range p.Services {
			for i := range sp.Frontends {
				spoil(&sp.Frontends[i])
			}
		}
	}
}

func withoutLast(s *proxier.EndpointSet) *proxier.EndpointSet {
	if s.Len() < 2 {
		return s
	}
	return &proxier.EndpointSet{Endpoints: s.Endpoints[:s.Len()-1]}
}

func neverRemove() func(*proxier.Plan) {
	ever := map[proxier.ServicePortName]*proxier.ServicePort{}
	return func(p *proxier.Plan) {
		maps.Copy(ever, p.Services)
		maps.Copy(p.Services, ever)
	}
}

// faults name the scenario that is about them.
var faults = []struct {
	fault, scenario string
	spoil           func(*proxier.Plan)
}{
	{"never masquerades", "clusterip-basic", eachFrontend(func(f *proxier.Frontend) { f.Masquerade = 0 })},
	{"always masquerades", "clusterip-basic", eachFrontend(func(f *proxier.Frontend) { f.Masquerade = proxier.AnySource })},
	{"does not masquerade the node", "masquerade-node", eachFrontend(func(f *proxier.Frontend) { f.Masquerade &^= proxier.FromNode })},
	{"passes over one endpoint", "clusterip-basic", eachFrontend(func(f *proxier.Frontend) {
		f.Internal, f.External = withoutLast(f.Internal), withoutLast(f.External)
	})},
	{"rejects what must be dropped", "external-policy-local", eachFrontend(func(f *proxier.Frontend) { f.WhenEmpty = proxier.Reject })},
	{"drops what must be rejected", "no-endpoints-refused", eachFrontend(func(f *proxier.Frontend) { f.WhenEmpty = proxier.Drop })},
	{"does not tell clients from Pods", "external-policy-local", eachFrontend(func(f *proxier.Frontend) { f.External = f.Internal })},
	{"has no short way for Pods", "external-policy-local", eachFrontend(func(f *proxier.Frontend) { f.Internal = f.External })},
	{"ignores source ranges", "source-ranges", eachFrontend(func(f *proxier.Frontend) { f.Sources = nil })},
	{"ignores affinity", "affinity-sticky", func(p *proxier.Plan) {
		for _, sp := range p.Services {
			sp.AffinityTimeout = 0
		}
	}},
	{"never forgets a client", "affinity-timeout", func(p *proxier.Plan) {
		for _, sp := range p.Services {
			sp.AffinityTimeout *= 100
		}
	}},
	{"forgets a client too soon", "affinity-timeout", func(p *proxier.Plan) {
		for _, sp := range p.Services {
			sp.AffinityTimeout = min(sp.AffinityTimeout, time.Second)
		}
	}},
	{"serves NodePorts everywhere", "nodeport-addresses-primary", func(p *proxier.Plan) { p.Node.NodePortAddrs.All = true }},
	{"knows no Pods", "detect-local-own-node", func(p *proxier.Plan) { p.Node.LocalPods = proxier.LocalPods{} }},
	{"lets unallocated addresses pass", "unused-clusterip", func(p *proxier.Plan) { p.Node.ServiceCIDRs = nil }},
	{"ignores the sources that routes name", "route-source", func(p *proxier.Plan) { p.Node.RouteSources = nil }},
	{"never removes a Service", "change-clusterip", neverRemove()},
	{"does not tell the node from Pods", "masquerade-node", eachFrontend(func(f *proxier.Frontend) {
		if f.Masquerade&proxier.FromPods == 0 {
			f.Masquerade &^= proxier.FromNode
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
			mode := proxiertest.Mode{Name: "nftables-reference", New: newReference, Flows: cleanFlows}
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

func scenario(t *testing.T, name string) *proxiertest.Scenario {
	t.Helper()
	all, err := proxiertest.Scenarios()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(s *proxiertest.Scenario) bool { return s.Name == name })
	if i < 0 {
		t.Fatalf("there is no scenario %s", name)
	}
	return all[i]
}
