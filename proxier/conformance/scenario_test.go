// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"strings"
	"testing"

	"signalbox/internal/netlab"
	"signalbox/proxier/plan"
)

func TestScenariosAreWellFormed(t *testing.T) {
	all, err := Scenarios()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 50 {
		t.Errorf("there are only %d scenarios", len(all))
	}
	lab, err := netlab.New(netlab.Options{Pods: thirdNode})
	if err != nil {
		t.Fatal(err)
	}
	defer lab.Close()
	for _, s := range all {
		for name, text := range s.manifests {
			for _, v := range s.variants() {
				symbols := symbols{family: v.families[0], lab: lab}
				text, err := symbols.expand(text)
				if err != nil {
					t.Errorf("%s: %s: %v", s.Name, name, err)
					continue
				}
				if objects, err := decode(text); err != nil || len(objects) == 0 {
					t.Errorf("%s: %s: %d objects, %v", s.Name, name, len(objects), err)
				}
			}
			used := func(st step) bool { return strings.Contains(" "+st.text+" ", " "+name+" ") }
			found := false
			for _, st := range s.steps {
				found = found || used(st)
			}
			if !found {
				t.Errorf("%s: no step uses %s", s.Name, name)
			}
		}
	}
}

func TestBadScenarios(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"no comment":         {"-- script --\nidle 1s\n", "nothing says what"},
		"no script":          {"About.\n", "no script"},
		"unknown file":       {"About.\n-- notes --\n", "neither setup"},
		"unknown setting":    {"About.\n-- setup --\ncolour: red\n", `no setting "colour"`},
		"unknown lab":        {"About.\n-- setup --\nlab: moon\n", `"moon" is not one of`},
		"modes without why":  {"About.\n-- setup --\nmodes: nftables\n", "why: must say"},
		"family without why": {"About.\n-- setup --\nfamilies: IPv4\n", "why: must say"},
		"unknown step":       {"About.\n-- script --\n\nhope for the best\n", "line 4: hope for the best: there is no such step"},
		"no outcome":         {"About.\n-- script --\nfrom client1 tcp $vip1:80\n", "nothing says what must happen"},
		"unknown outcome":    {"About.\n-- script --\nfrom client1 tcp $vip1:80 vanishes\n", `"vanishes" is not`},
		"nobody":             {"About.\n-- script --\nfrom client1 tcp $vip1:80 ->\n", "nobody is named"},
		"unknown protocol":   {"About.\n-- script --\nfrom client1 icmp $vip1:80 refused\n", "none of tcp, udp and sctp"},
		"source of nothing":  {"About.\n-- script --\nfrom client1 tcp $vip1:80 refused, source node1\n", "has a source"},
		"more after refused": {"About.\n-- script --\nfrom client1 tcp $vip1:80 refused twice\n", "what does"},
		"apply nothing":      {"About.\n-- script --\napply\n", "no file is named"},
		"clients do what":    {"About.\n-- script --\nclients tcp $vip1:80 dance\n", "expected -> HOSTS"},
		"open without from":  {"About.\n-- script --\nopen client1 tcp $vip1:80 refused\n", "expected: open NAME from"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseScenario("x.txtar", []byte(c.text))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want something with %q", err, c.want)
			}
		})
	}
}

func TestParseExpectation(t *testing.T) {
	for text, want := range map[string]expectation{
		"-> pod-a pod-b":                    {outcome: answered, servers: []string{"pod-a", "pod-b"}},
		"-> pod-a:8080 pod-b, source node1": {outcome: answered, servers: []string{"pod-a:8080", "pod-b"}, source: "node1"},
		"-> the same of pod-a pod-b":        {outcome: answered, servers: []string{"pod-a", "pod-b"}, same: true},
		"refused":                           {outcome: refused},
		"dropped":                           {outcome: dropped},
	} {
		got, err := parseExpectation(strings.Fields(text))
		if err != nil || got.outcome != want.outcome || got.same != want.same || got.source != want.source ||
			strings.Join(got.servers, " ") != strings.Join(want.servers, " ") {
			t.Errorf("%s: %+v, %v; want %+v", text, got, err, want)
		}
	}
}

func TestSymbols(t *testing.T) {
	lab, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer lab.Close()
	for _, c := range []struct {
		family   plan.Family
		in, want string
	}{
		{plan.IPv4, "$vip1:80", "10.96.0.11:80"},
		{plan.IPv6, "$vip1:80", "fd00:10:96::b:80"},
		{plan.IPv6, "$vip1@other", "10.96.0.11"},
		{plan.IPv4, "[$lb2@IPv4, $lb2@IPv6]", "[192.0.2.2, 2001:db8:100::2]"},
		{plan.IPv4, "$pod-a/$hostbits", "10.244.1.10/32"},
		{plan.IPv6, "$family $family@other $hostbits", "IPv6 IPv4 128"},
		{plan.IPv4, "$node1 $node1b $localhost", "172.18.0.11 172.18.0.111 127.0.0.1"},
		{plan.IPv4, "$clusterCIDR $podCIDR", "10.244.0.0/16 10.244.1.0/24"},
	} {
		s := symbols{family: c.family, lab: lab}
		if got, err := s.expand(c.in); err != nil || got != c.want {
			t.Errorf("%s: %q, %v; want %q", c.in, got, err, c.want)
		}
	}
	s := symbols{family: plan.IPv4, lab: lab}
	for _, bad := range []string{"$nobody", "$vip0", "$vip10", "$vip1@IPv5"} {
		if got, err := s.expand(bad); err == nil {
			t.Errorf("%s became %q", bad, got)
		}
	}
}

func TestTarget(t *testing.T) {
	for in, want := range map[string]string{
		"10.96.0.1:80":     "10.96.0.1:80",
		"fd00:10:96::1:80": "[fd00:10:96::1]:80",
	} {
		if got, err := target(in); err != nil || got.String() != want {
			t.Errorf("%s: %s, %v", in, got, err)
		}
	}
	for _, bad := range []string{"10.96.0.1", "10.96.0.1:70000", "host:80", ""} {
		if got, err := target(bad); err == nil {
			t.Errorf("%s became %s", bad, got)
		}
	}
}

func TestRequired(t *testing.T) {
	t.Setenv("SIGNALBOX_REQUIRE", "nftables/*, iptables-legacy/IPv4,lab/vxlan")
	for feature, want := range map[string]bool{
		"nftables/IPv6": true, "nftables/IPv4": true, "iptables-legacy/IPv4": true,
		"iptables-legacy/IPv6": false, "ipvs/IPv4": false, "lab/vxlan": true, "lab/bridge": false,
	} {
		if got := required(feature); got != want {
			t.Errorf("%s: %t", feature, got)
		}
	}
}

func TestDecode(t *testing.T) {
	for name, text := range map[string]string{
		"misspelt field": "kind: Service\nmetadata: {name: a}\nspec: {clusterIPz: 10.0.0.1}\n",
		"unknown kind":   "kind: Pod\nmetadata: {name: a}\n",
		"no YAML":        "kind: [\n",
	} {
		if objects, err := decode(text); err == nil {
			t.Errorf("%s: accepted as %v", name, objects)
		}
	}
	objects, err := decode("kind: Service\nmetadata: {name: a}\n---\nkind: Node\nmetadata: {name: node1}\n---\n\n")
	if err != nil || len(objects) != 2 || keyOf(objects[0]) != "Service default/a" || keyOf(objects[1]) != "Node /node1" {
		t.Errorf("%v, %v", objects, err)
	}
}
