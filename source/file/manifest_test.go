// SPDX-License-Identifier: Apache-2.0

package file

import (
	"slices"
	"strings"
	"testing"
)

const web = `apiVersion: v1
kind: Service
metadata:
  name: web
spec:
  clusterIP: 10.96.0.1
`

// summary is what a file gave: objects, then faults with their places.
func summary(p *parser) string {
	var lines []string
	for k := range p.objects {
		lines = append(lines, k.String())
	}
	slices.Sort(lines)
	for _, f := range p.faults {
		lines = append(lines, f.place+": "+f.reason)
	}
	return strings.Join(lines, "\n")
}

func TestRead(t *testing.T) {
	for _, test := range []struct{ name, content, want string }{
		{"one", web, "Service default/web"},
		{"nothing", "", ""},
		{"comments only", "# a\n---\n  # b\n", ""},
		{"several documents", web + "---\n" + strings.ReplaceAll(web, "web", "api") + "...\n", "Service default/api\nService default/web"},
		{"carriage returns", strings.ReplaceAll(web+"---\n"+strings.ReplaceAll(web, "web", "api"), "\n", "\r\n"), "Service default/api\nService default/web"},
		{"another kind", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\nspec: {anything: goes}\n", ""},
		{"list", "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Node, metadata: {name: n1}}\n- {apiVersion: v1, kind: Service, metadata: {name: a, namespace: b}}\n",
			"Node n1\nService b/a"},
		{"typed list", `{"apiVersion":"v1","kind":"ServiceList","items":[{"metadata":{"name":"a"}},{"metadata":{"name":"b"}}]}`, "Service default/a\nService default/b"},
		{"JSON with tabs", "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"Node\",\n\t\"metadata\": {\"name\": \"n\"}\n}\n", "Node n"},
		{"JSON stream", `{"apiVersion":"v1","kind":"Node","metadata":{"name":"a"}} {"apiVersion":"v1","kind":"Node","metadata":{"name":"b"}}`, "Node a\nNode b"},
		{"JSON array", `[{"apiVersion":"v1","kind":"Node","metadata":{"name":"a"}}]`, "Node a"},
		{"namespace of a Node is dropped", "apiVersion: v1\nkind: Node\nmetadata: {name: node, namespace: x}\n", "Node node"},

		{"quoted keys", "\"apiVersion\": v1\n\"kind\": Node\n\"metadata\": {\"name\": \"n\"}\n", "Node n"},
		{"flow style", "{apiVersion: v1, kind: Node, metadata: {name: node}} # not JSON\n", "Node node"},
		{"two values in flow style", "{apiVersion: v1, kind: Node, metadata: {name: node}} {kind: Node}\n", "document 1: yaml: did not find expected ',' or ']'"},
		{"JSON with a comment", "{\"apiVersion\": \"v1\", \"kind\": \"Node\", \"metadata\": {\"name\": \"n\"}} # not JSON\n", "Node n"},

		{"YAML error", web + "---\napiVersion: v1\nkind: Service\nmetadata: {name: x\n---\n" + strings.ReplaceAll(web, "web", "api"),
			"Service default/api\nService default/web\ndocument 2: yaml: line 3: did not find expected ',' or '}'"},
		{"a field twice", "apiVersion: v1\nkind: Service\nkind: Service\n", "document 1: yaml: unmarshal errors:\n  line 3: key \"kind\" already set in map"},
		{"unknown field", web + "  prots: []\n", `document 1: Service default/web: unknown field "spec.prots"`},
		{"unknown field of one port among several", web + "  ports:\n  - port: 80\n    name: a\n  - nam: b\n    port: 81\n", `document 1: Service default/web: unknown field "spec.ports[1].nam"`},
		{"two unknown fields", "x: 1\n" + web + "  z: 2\n", "document 1: Service default/web: unknown field \"spec.z\"\ndocument 1: Service default/web: unknown field \"x\""},
		{"wrong case", strings.Replace(web, "  name", "  Name", 1), `document 1: Service default/web: unknown field "metadata.Name"`},
		{"unknown field of an item", "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Node, metadata: {name: n1}}\n- apiVersion: v1\n  kind: Node\n  metadata: {name: n2}\n  spec:\n    bad: 1\n", "Node n1\ndocument 1: items[1]: Node n2: unknown field \"spec.bad\""},
		{"unknown field in JSON", "[\n{\"apiVersion\": \"v1\", \"kind\": \"Node\",\n\"metadata\": {\"name\": \"n\",\n\"nam\": 1}}]", `document 1[0]: Node n: unknown field "metadata.nam"`},
		{"a field twice in JSON", "{\"apiVersion\": \"v1\", \"kind\": \"Node\",\n\"metadata\": {\"name\": \"n\",\n\"name\": \"m\"}}", `document 1: Node m: duplicate field "metadata.name"`},
		{"wrong type", web + "  ports:\n  - port: eighty\n", `document 1: Service default/web: spec.ports.port: this needs the type int32, and has string`},
		{"wrong indentation", "# first\n---\napiVersion: v1\nkind: Service\nmetadata:\n  name: x\n foo: bar\n", "document 1: yaml: line 4: did not find expected key"},
		{"no colon", "a: 1\nb\nc: 2\n", "document 1: yaml: line 3: could not find expected ':'"},
		{"anchor that is not there", web + "  x: *none\n", "document 1: yaml: unknown anchor 'none' referenced"},
		{"control character", web + "  x: \x01\n", "document 1: yaml: control characters are not allowed"},
		{"byte order mark", "\ufeff" + web, "Service default/web"},
		{"object on the separator's line", "--- {apiVersion: v1, kind: Node, metadata: {name: a}}\n--- # b\n{apiVersion: v1, kind: Node, metadata: {name: b}}\n", "Node a\nNode b"},
		{"YAML list", "- {apiVersion: v1, kind: Node, metadata: {name: a}}\n- {apiVersion: v1, kind: Node, metadata: {name: b}}\n", "Node a\nNode b"},
		{"documents without content do not count", "# first\n---\n---\n...\n---\n" + web + "---\n" + web + "  x: 1\n", `Service default/web` + "\n" + `document 2: Service default/web: unknown field "spec.x"` + "\n" + `document 2: Service default/web: the file has this object twice; the first counts`},
		{"no name", "apiVersion: v1\nkind: Service\nmetadata: {}\n", "document 1: Service default/: metadata.name is missing"},
		{"no kind", "apiVersion: v1\nmetadata: {name: a}\n", "document 1: kind is missing"},
		{"old version", "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: a}\n", `document 1: EndpointSlice default/a: apiVersion "discovery.k8s.io/v1beta1" is not served, only discovery.k8s.io/v1`},
		{"not an object", "just words\n", ""},
		{"JSON cut short", "{\"apiVersion\": \"v1\", \"kind\": \"Node\", \"metadata\": {\"name\": \"n\"}}\n{\"apiVersion\": \"v1\",\n\"kind\": \"No", "Node n\ndocument 2: unexpected EOF"},
		{"JSON item of another type", `{"apiVersion":"v1","kind":"List","items":[1]}`, ""},
		{"not UTF-8", web + "---\n" + "apiVersion: v1\nkind: Service\nmetadata: {name: \"\xff\"}\n", "Service default/web\ndocument 2: yaml: invalid leading UTF-8 octet"},
		{"the same twice", web + "---\n" + web, "Service default/web\ndocument 2: Service default/web: the file has this object twice; the first counts"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := summary(parse([]byte(test.content)))
			switch test.name {
			case "not an object", "JSON item of another type":
				if !strings.Contains(got, "not an object") {
					t.Errorf("got %q", got)
				}
			default:
				if got != test.want {
					t.Errorf("got\n%s\nwant\n%s", got, test.want)
				}
			}
		})
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(web))
	f.Add([]byte(web + "---\n{\"kind\": \"List\", \"items\": [{}]}\n[]"))
	f.Add([]byte("kind: ServiceList\nitems: 3\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		p := parse(content)
		for _, fault := range p.faults {
			if !strings.HasPrefix(fault.place, "document ") || fault.reason == "" {
				t.Errorf("a fault is reported as %+v", fault)
			}
		}
		for k, m := range p.objects {
			if k.name == "" || m.object.GetName() != k.name {
				t.Errorf("%v is found as %v", m.object, k)
			}
		}
	})
}

// A file as large as a cluster's objects, wrong in every one of them, is read
// in time that grows with its size.
func TestThousandsOfFaults(t *testing.T) {
	var b strings.Builder
	b.WriteString("apiVersion: v1\nkind: List\nitems:\n")
	const items = 5000
	for range items {
		b.WriteString("- {apiVersion: v1, kind: Node, metadata: {name: n, nam: m}}\n")
	}
	faults := parse([]byte(b.String())).faults
	if len(faults) != items || faults[0].place != "document 1: items[0]" || faults[items-1].place != "document 1: items[4999]" {
		t.Errorf("%d faults, want one for each of %d items", len(faults), items)
	}
}
