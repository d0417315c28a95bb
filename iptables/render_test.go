// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"signalbox/proxier"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

var update = flag.Bool("update", false, "write the golden files anew")

// example is one Service of each kind that rules tell apart.
func example(family plan.Family) *plan.Plan {
	v6 := family == plan.IPv6
	addr := func(v4, six string) netip.Addr {
		if v6 {
			return netip.MustParseAddr(six)
		}
		return netip.MustParseAddr(v4)
	}
	set := func(hairpin int, addrs ...netip.Addr) *plan.EndpointSet {
		s := &plan.EndpointSet{}
		for i, a := range addrs {
			s.Endpoints = append(s.Endpoints, plan.Endpoint{AddrPort: netip.AddrPortFrom(a, 8080), MayHairpin: i < hairpin})
		}
		return s
	}
	pods := []netip.Addr{addr("10.1.0.5", "fd00:1::5"), addr("10.1.1.5", "fd00:1:1::5"), addr("10.1.2.5", "fd00:1:2::5")}
	cluster, local, none := set(1, pods...), set(1, pods[0]), set(0)
	port := func(name, portName string, frontends ...plan.Frontend) *plan.ServicePort {
		return &plan.ServicePort{
			Name:      plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "default", Name: name}, Port: portName, Protocol: plan.TCP},
			Frontends: frontends,
		}
	}
	clusterIP := func(n string, s *plan.EndpointSet) plan.Frontend {
		return plan.Frontend{Addr: addr("10.96.0."+n, "fd00:96::"+n), Port: 80, Internal: s, External: s, Masquerade: plan.FromNode | plan.FromOutside}
	}
	outside := func(kind plan.FrontendKind, n string, internal, external *plan.EndpointSet) plan.Frontend {
		f := plan.Frontend{Kind: kind, Port: 80, Internal: internal, External: external, WhenEmpty: plan.Drop, Masquerade: plan.FromNode}
		if internal == external {
			f.Masquerade, f.WhenEmpty = plan.AnySource, plan.Reject
		}
		f.Addr = addr("192.0.2."+n, "2001:db8::"+n)
		if kind == plan.NodePort {
			f.Addr, f.Port = netip.Addr{}, 30080
		}
		return f
	}
	sticky := port("sticky", "http", clusterIP("3", cluster))
	sticky.AffinityTimeout = 3 * time.Hour
	allowed := outside(plan.LoadBalancerIP, "4", cluster, cluster)
	allowed.Sources = []netip.Prefix{netip.PrefixFrom(addr("203.0.113.0", "2001:db8:113::"), map[bool]int{false: 24, true: 64}[v6])}
	lb := port("local", "http", clusterIP("5", cluster), outside(plan.LoadBalancerIP, "5", cluster, local), outside(plan.NodePort, "0", cluster, local))
	lb.HealthCheckNodePort = 30999
	away := outside(plan.NodePort, "0", cluster, none)
	away.Port++
	plan := planOf(family,
		port("plain", "", clusterIP("1", cluster)),
		port("empty", "http", clusterIP("2", none), outside(plan.ExternalIP, "2", none, none)),
		sticky,
		port("allowed", "http", clusterIP("4", cluster), allowed),
		lb,
		port("away", "http", clusterIP("6", cluster), away),
		port("we\"ird\n-j ACCEPT", "\xff", clusterIP("7", local)),
	)
	plan.Node.LocalPods.Prefixes = []netip.Prefix{netip.PrefixFrom(addr("10.1.0.0", "fd00:1::"), map[bool]int{false: 16, true: 32}[v6])}
	plan.Node.NodePortAddrs.All = true
	return plan
}

func TestRender(t *testing.T) {
	pods := map[string]plan.LocalPods{
		"one prefix": {},
		"unknown":    {Prefixes: []netip.Prefix{}},
		"interface":  {Interface: "cni0"},
		"two":        {Interface: "cni0", InterfacePrefix: "veth"},
	}
	for _, family := range plan.Families {
		for name, local := range pods {
			plan := example(family)
			if name != "one prefix" {
				plan.Node.LocalPods = local
			}
			got := rendered(t, plan)
			newModel().mustApply(t, got)
			path := filepath.Join("testdata", strings.ReplaceAll(family.String()+" "+name, " ", "-")+".golden")
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("%s (-golden +rendered)\n%s", path, diff)
			}
		}
	}
}

func TestRenderRefusesInterfaceNames(t *testing.T) {
	for _, name := range []string{"a b", "x\n-j ACCEPT", `"`} {
		desired := example(plan.IPv4)
		desired.Node.LocalPods = plan.LocalPods{Interface: name}
		if _, err := new(Dataplane).Render(proxier.Options{Family: plan.IPv4}, desired); err == nil || !strings.Contains(err.Error(), "interface") {
			t.Errorf("interface %q: %v", name, err)
		}
	}
}

// TestKernelTakesTheExamples applies every golden file and reads it back.
func TestKernelTakesTheExamples(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		paths, err := filepath.Glob("testdata/" + p.opts.Family.String() + "-*.golden")
		if err != nil || len(paths) != 4 {
			t.Fatalf("%d golden files, %v", len(paths), err)
		}
		for _, path := range paths {
			input, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			run(t, string(input), p.tools.Restore, "--noflush")
			held := saved(t, p)
			if want, got := strings.Count(string(input), "\n-A "), strings.Count(held, "\n-A "); want != got {
				t.Errorf("%s has %d rules, the kernel holds %d:\n%s", path, want, got, held)
			}
			if _, err := Cleanup(p.opts.Family); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// TestEndpointsOfUnknownNodes has endpoints that may be clients of themselves,
// because their slices name no node. They cost a rule for each address, and no
// chain for each endpoint of each Service.
func TestEndpointsOfUnknownNodes(t *testing.T) {
	const services, each = 200, 10
	chains := func(mayHairpin bool) int {
		desired := conformance.Fleet(plan.IPv4, services, each)
		for _, sp := range desired.Services {
			for i := range sp.Usable.Endpoints {
				sp.Usable.Endpoints[i].MayHairpin = mayHairpin
			}
		}
		text, err := new(Dataplane).Render(proxier.Options{Family: plan.IPv4, MasqueradeMark: proxier.DefaultMasqueradeMark}, desired)
		if err != nil {
			t.Fatal(err)
		}
		if n, want := strings.Count(text, " -s 10."), map[bool]int{true: services * each}[mayHairpin]; n < want {
			t.Errorf("%d rules for endpoints that are their own clients, not %d", n, want)
		}
		return strings.Count(text, "\n:")
	}
	// A leaf of the tree holds up to 16 of them.
	if few, many := chains(false), chains(true); many > few+services*each/4 {
		t.Errorf("%d chains, and with endpoints of unknown nodes %d", few, many)
	}
}
