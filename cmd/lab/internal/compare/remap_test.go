// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func dumpFile(t *testing.T, node string) ([]Case, []string) {
	t.Helper()
	f, err := os.Open("testdata/dump.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cases, notes, err := Dump(f, node)
	if err != nil {
		t.Fatal(err)
	}
	return cases, notes
}

// TestDump maps a small dump. The API server's own Service is left out.
func TestDump(t *testing.T) {
	cases, notes := dumpFile(t, "worker-b")
	if len(cases) != 2 || cases[0].Name != "shop-web" || cases[1].Name != "shop-plain" {
		t.Fatalf("got the cases %v", cases)
	}
	s := cases[0].States[0]
	got := fmt.Sprintf("%v %v %v %v", s.Service.Spec.ClusterIPs, s.Service.Status.LoadBalancer.Ingress[0].IP,
		s.Service.Spec.LoadBalancerSourceRanges, s.Service.Spec.Ports[0].NodePort)
	if want := "[10.96.16.0 fd00:10:96::1000] 198.19.16.0 [198.51.100.0/24] 30000"; got != want {
		t.Errorf("the Service has\n%s, want\n%s", got, want)
	}
	var endpoints []string
	for _, e := range s.Slices[0].Endpoints {
		endpoints = append(endpoints, fmt.Sprintf("%s on %s in %s, hint %s", e.Addresses[0], *e.NodeName, *e.Zone, e.Hints.ForZones[0].Name))
	}
	if diff := cmp.Diff([]string{
		"10.244.2.10 on node2 in zone-2, hint zone-1",
		"10.244.1.10 on node1 in zone-1, hint zone-2",
		"172.18.0.11 on node1 in zone-1, hint zone-1",
	}, endpoints); diff != "" {
		t.Errorf("endpoints (-want +got):\n%s", diff)
	}
	if port := *s.Slices[0].Ports[0].Port; port != 8080 {
		t.Errorf("the target port is %d, want one that the lab's Pods serve", port)
	}
	text := strings.Join(notes, "\n")
	for _, want := range []string{"worker-b becomes node1, and the 1 others node2", "the source range 203.0.113.0/24 becomes 198.51.100.0/24"} {
		if !strings.Contains(text, want) {
			t.Errorf("no note %q in\n%s", want, text)
		}
	}
}

// TestDumpWithoutName takes the first Node.
func TestDumpWithoutName(t *testing.T) {
	cases, _ := dumpFile(t, "")
	if got := *cases[0].States[0].Slices[0].Endpoints[0].NodeName; got != "node1" {
		t.Errorf("an endpoint of the first Node is on %s", got)
	}
}

func TestDumpFails(t *testing.T) {
	for text, node := range map[string]string{
		"apiVersion: v1\nkind: List\nitems: []\n": "",
		"apiVersion: v1\nkind: Node\nmetadata: {name: a}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: s}\n": "b",
		"apiVersion: v1\nkind: Node\nmetadata: {name: a}\n":                                                          "a",
		"not yaml: [": "",
	} {
		if _, _, err := Dump(strings.NewReader(text), node); err == nil {
			t.Errorf("no error for the Node %q in\n%s", node, text)
		}
	}
}

// TestTooManyEndpoints: what the lab has no Pods for is said.
func TestTooManyEndpoints(t *testing.T) {
	var b strings.Builder
	b.WriteString("apiVersion: v1\nkind: Node\nmetadata: {name: a}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: x}\n" +
		"---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n" +
		"metadata: {name: s, namespace: x, labels: {kubernetes.io/service-name: s}}\nendpoints:\n")
	for i := range 20 {
		fmt.Fprintf(&b, "- {addresses: [10.0.0.%d], nodeName: a}\n", i+1)
	}
	cases, notes, err := Dump(strings.NewReader(b.String()), "")
	if err != nil {
		t.Fatal(err)
	}
	if got := len(cases[0].States[0].Slices[0].Endpoints); got != 8 {
		t.Errorf("%d endpoints are mapped, want one for each of the 8 Pods that serve on node1", got)
	}
	if !strings.Contains(strings.Join(notes, "\n"), "no Pods for 12 endpoints of s") {
		t.Errorf("the notes do not say what is missing: %q", notes)
	}
}
