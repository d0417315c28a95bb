// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

func generate(t *testing.T, seed uint64, n int) []Case {
	t.Helper()
	cases, err := Generate(seed, n, true)
	if err != nil {
		t.Fatal(err)
	}
	return cases
}

// TestGenerateIsDeterministic: a case depends on the seed and its number alone.
func TestGenerateIsDeterministic(t *testing.T) {
	few, many := generate(t, 7, 20), generate(t, 7, 40)
	if diff := cmp.Diff(few, many[:20]); diff != "" {
		t.Errorf("a larger run has other cases:\n%s", diff)
	}
	if cmp.Equal(few, generate(t, 8, 20)) {
		t.Error("another seed makes the same cases")
	}
}

func TestGenerateBounds(t *testing.T) {
	for _, n := range []int{0, maxCases + 1} {
		if _, err := Generate(1, n, true); err == nil {
			t.Errorf("%d cases: no error", n)
		}
	}
}

// TestGenerateCovers requires each value of each field in 500 cases.
func TestGenerateCovers(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range generate(t, 7, 500) {
		for _, s := range c.States {
			cover(seen, s)
		}
	}
	for _, want := range []string{
		"no Service", "type ClusterIP", "type NodePort", "type LoadBalancer", "type ExternalName", "headless",
		"[IPv4]", "[IPv6]", "[IPv4 IPv6]", "[IPv6 IPv4]", "TCP", "UDP", "SCTP",
		"internal Cluster", "internal Local", "external Cluster", "external Local", "affinity None", "affinity ClientIP",
		"distribution PreferClose", "distribution PreferSameNode", "source ranges", "external IPs", "NodePort", "no NodePort",
		"ingress VIP", "ingress Proxy", "ingress without mode", "ingress with hostname",
		"ready nil", "ready true", "ready false", "serving nil", "serving true", "serving false",
		"terminating nil", "terminating true", "terminating false", "on node1", "on node2", "on no node", "zone hints", "node hints", "no hints",
	} {
		if !seen[want] {
			t.Errorf("no case has %s", want)
		}
	}
}

func cover(seen map[string]bool, s State) {
	for _, slice := range s.Slices {
		for _, e := range slice.Endpoints {
			coverEndpoint(seen, e)
		}
	}
	if s.Service == nil {
		seen["no Service"] = true
		return
	}
	spec := s.Service.Spec
	seen["type "+string(spec.Type)] = true
	seen["headless"] = seen["headless"] || spec.ClusterIP == corev1.ClusterIPNone
	seen[fmt.Sprint(spec.IPFamilies)] = true
	if spec.InternalTrafficPolicy != nil {
		seen["internal "+string(*spec.InternalTrafficPolicy)] = true
	}
	seen["external "+string(spec.ExternalTrafficPolicy)] = true
	seen["affinity "+string(spec.SessionAffinity)] = true
	if spec.TrafficDistribution != nil {
		seen["distribution "+*spec.TrafficDistribution] = true
	}
	seen["source ranges"] = seen["source ranges"] || len(spec.LoadBalancerSourceRanges) > 0
	seen["external IPs"] = seen["external IPs"] || len(spec.ExternalIPs) > 0
	for _, p := range spec.Ports {
		seen[string(p.Protocol)] = true
		seen[map[bool]string{true: "NodePort", false: "no NodePort"}[p.NodePort != 0]] = true
	}
	for _, in := range s.Service.Status.LoadBalancer.Ingress {
		switch {
		case in.Hostname != "":
			seen["ingress with hostname"] = true
		case in.IPMode == nil:
			seen["ingress without mode"] = true
		default:
			seen["ingress "+string(*in.IPMode)] = true
		}
	}
}

func coverEndpoint(seen map[string]bool, e discoveryv1.Endpoint) {
	for name, value := range map[string]*bool{"ready": e.Conditions.Ready, "serving": e.Conditions.Serving, "terminating": e.Conditions.Terminating} {
		if value == nil {
			seen[name+" nil"] = true
		} else {
			seen[fmt.Sprint(name, " ", *value)] = true
		}
	}
	if e.NodeName == nil {
		seen["on no node"] = true
	} else {
		seen["on "+*e.NodeName] = true
	}
	seen["zone hints"] = seen["zone hints"] || e.Hints != nil && len(e.Hints.ForZones) > 0
	seen["node hints"] = seen["node hints"] || e.Hints != nil && len(e.Hints.ForNodes) > 0
	seen["no hints"] = seen["no hints"] || e.Hints == nil
}

// TestGenerateIsValid checks the rules of the API that the generator must know. The
// short form of the comparison, in e2e, has a real API server check all others.
func TestGenerateIsValid(t *testing.T) {
	addrs := map[string]string{}
	for _, c := range generate(t, 3, 1000) {
		for _, s := range c.States {
			if s.Service == nil {
				continue
			}
			spec := s.Service.Spec
			outside := spec.Type == corev1.ServiceTypeNodePort || spec.Type == corev1.ServiceTypeLoadBalancer || len(spec.ExternalIPs) > 0
			if (spec.ExternalTrafficPolicy != "") != outside {
				t.Errorf("%s: externalTrafficPolicy %q, type %s, external IPs %v", c.Name, spec.ExternalTrafficPolicy, spec.Type, spec.ExternalIPs)
			}
			if spec.Type != corev1.ServiceTypeLoadBalancer && len(spec.LoadBalancerSourceRanges)+len(s.Service.Status.LoadBalancer.Ingress)+int(spec.HealthCheckNodePort) > 0 {
				t.Errorf("%s: type %s with fields of a load balancer", c.Name, spec.Type)
			}
			for a := range s.frontends() {
				if other := addrs[a.addr.String()]; a.addr.IsValid() && other != "" && other != c.Name {
					t.Errorf("%s and %s both have %s", c.Name, other, a.addr)
				}
				addrs[a.addr.String()] = c.Name
			}
		}
	}
}

// TestReplay: what WriteCase writes, ReadCase reads.
func TestReplay(t *testing.T) {
	for _, c := range generate(t, 7, 50) {
		var text bytes.Buffer
		if err := WriteCase(&text, c); err != nil {
			t.Fatal(err)
		}
		got, err := ReadCase(&text, c.Name)
		if err != nil {
			t.Fatal(err)
		}
		var want, again bytes.Buffer
		if err := WriteCase(&want, c); err != nil {
			t.Fatal(err)
		}
		if err := WriteCase(&again, got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want.String(), again.String()); diff != "" {
			t.Fatalf("%s:\n%s", c.Name, diff)
		}
	}
}
