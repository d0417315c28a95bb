package file

import (
	"fmt"
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

// summary is what a file gave: objects, then faults with their lines.
func summary(found map[key]manifest, faults []fault) string {
	var lines []string
	for k := range found {
		lines = append(lines, k.String())
	}
	slices.Sort(lines)
	for _, f := range faults {
		lines = append(lines, fmt.Sprintf("%d: %s", f.line, f.reason))
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

		{"YAML error", web + "---\napiVersion: v1\nkind: Service\nmetadata: {name: x\n", "Service default/web\n10: yaml: line 10: did not find expected ',' or '}'"},
		{"a field twice", "apiVersion: v1\nkind: Service\nkind: Service\n", `3: yaml: unmarshal errors:` + "\n" + `  line 3: key "kind" already set in map`},
		{"unknown field", web + "  prots: []\n", `7: unknown field "spec.prots"`},
		{"unknown field of one port among several", web + "  ports:\n  - port: 80\n    name: a\n  - nmae: b\n    port: 81\n", `10: unknown field "spec.ports[1].nmae"`},
		{"two unknown fields", "x: 1\n" + web + "  z: 2\n", "1: unknown field \"x\"\n8: unknown field \"spec.z\""},
		{"wrong case", strings.Replace(web, "  name", "  Name", 1), `4: unknown field "metadata.Name"`},
		{"unknown field of an item", "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Node, metadata: {name: n1}}\n- apiVersion: v1\n  kind: Node\n  metadata: {name: n2}\n  spec:\n    bad: 1\n", "Node n1\n9: item 1: unknown field \"spec.bad\""},
		{"unknown field in JSON", "[\n{\"apiVersion\": \"v1\", \"kind\": \"Node\",\n\"metadata\": {\"name\": \"n\",\n\"nmae\": 1}}]", `4: item 0: unknown field "metadata.nmae"`},
		{"a field twice in JSON", "{\"apiVersion\": \"v1\", \"kind\": \"Node\",\n\"metadata\": {\"name\": \"n\",\n\"name\": \"m\"}}", `3: duplicate field "metadata.name"`},
		{"wrong type", web + "  ports:\n  - port: eighty\n", `8: spec.ports[0].port: a string where a int32 is wanted`},
		{"wrong type further down", web + "  ports:\n  - port: 80\n  - port: [1]\n", `9: spec.ports[1].port: a array where a int32 is wanted`},
		{"wrong indentation", "# first\n---\napiVersion: v1\nkind: Service\nmetadata:\n  name: x\n foo: bar\n", "7: yaml: line 7: did not find expected key"},
		{"no colon", "a: 1\nb\nc: 2\n", "3: yaml: line 3: could not find expected ':'"},
		{"colon in the first line", "a: b: c\n", "1: yaml: mapping values are not allowed in this context"},
		{"anchor that is not there", web + "  x: *none\n", "7: yaml: unknown anchor 'none' referenced"},
		{"control character", web + "  x: \x01\n", "7: yaml: control characters are not allowed"},
		{"two fields twice", "kind: a\nkind: b\nc: d\nc: e\n", "2: yaml: unmarshal errors:\n  line 2: key \"kind\" already set in map\n  line 4: key \"c\" already set in map"},
		{"byte order mark", "\ufeff" + web, "Service default/web"},
		{"object on the marker's line", "--- {apiVersion: v1, kind: Node, metadata: {name: a}}\n--- # b\n{apiVersion: v1, kind: Node, metadata: {name: b}}\n", "Node a\nNode b"},
		{"YAML list", "- {apiVersion: v1, kind: Node, metadata: {name: a}}\n- {apiVersion: v1, kind: Node, metadata: {name: b}}\n", "Node a\nNode b"},
		{"unknown field of a second document", "# first\n---\n" + web + "  x: 1\n", `9: unknown field "spec.x"`},
		{"no name", "apiVersion: v1\nkind: Service\nmetadata: {}\n", "3: metadata.name of a Service is missing"},
		{"no kind", "apiVersion: v1\nmetadata: {name: a}\n", "1: kind is missing"},
		{"old version", "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: a}\n", `1: apiVersion "discovery.k8s.io/v1beta1" of a EndpointSlice is not served; discovery.k8s.io/v1 is`},
		{"not an object", "just words\n", ""},
		{"JSON cut short", "\n{\"apiVersion\": \"v1\",\n\"kind\": \"No", "3: unexpected EOF"},
		{"JSON item of another type", `{"apiVersion":"v1","kind":"List","items":[1]}`, ""},
		{"not UTF-8", web + "---\n" + "apiVersion: v1\nkind: Service\nmetadata: {name: \"\xff\"}\n", "Service default/web\n10: not UTF-8"},
		{"the same twice", web + "---\n" + web, "Service default/web\n8: Service default/web stands twice in this file; the first counts"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := summary(read([]byte(test.content)))
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
		found, faults := read(content)
		lines := strings.Count(string(content), "\n") + 1
		for _, fault := range faults {
			if fault.line < 1 || fault.line > lines+1 {
				t.Errorf("fault in line %d of %d: %s", fault.line, lines, fault.reason)
			}
		}
		for k, m := range found {
			if k.name == "" || m.object.GetName() != k.name {
				t.Errorf("%v is filed as %v", m.object, k)
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
		b.WriteString("- {apiVersion: v1, kind: Node, metadata: {name: n, nmae: m}}\n")
	}
	_, faults := read([]byte(b.String()))
	if len(faults) != items || faults[0].line != 4 || faults[items-1].line != items+3 {
		t.Errorf("%d faults, want one for each of %d items", len(faults), items)
	}
}
