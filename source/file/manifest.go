package file

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	yamlv3 "go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

// key identifies an object across files.
type key struct{ kind, namespace, name string }

func (k key) String() string {
	if k.namespace == "" {
		return k.kind + " " + k.name
	}
	return k.kind + " " + k.namespace + "/" + k.name
}

// manifest is one object and a fingerprint of its text.
type manifest struct {
	object object
	text   uint64
}

type object interface {
	runtime.Object
	metav1.Object
}

// fault is what is wrong with a document, and in which line of the file.
type fault struct {
	line   int
	reason string
	// harmless says that no object of the kinds that are read is missing by it.
	harmless bool
}

func (f fault) serious() bool { return !f.harmless }

// kinds are the objects that are read; all others in a file are ignored.
var kinds = map[string]struct {
	apiVersion string
	namespaced bool
	empty      func() object
}{
	"Service":       {"v1", true, func() object { return &corev1.Service{} }},
	"Node":          {"v1", false, func() object { return &corev1.Node{} }},
	"EndpointSlice": {"discovery.k8s.io/v1", true, func() object { return &discoveryv1.EndpointSlice{} }},
	"ServiceCIDR":   {"networking.k8s.io/v1", false, func() object { return &networkingv1.ServiceCIDR{} }},
}

var seed = maphash.MakeSeed()

// read returns the objects of a file and what is wrong with the rest of it. Of
// two objects of the same name the first counts.
func read(content []byte) (map[key]manifest, []fault) {
	found := map[key]manifest{}
	var faults []fault
	for _, doc := range split(content) {
		faults = append(faults, doc.read(found)...)
	}
	slices.SortStableFunc(faults, func(a, b fault) int { return cmp.Compare(a.line, b.line) })
	return found, faults
}

// document is a part of a file that starts at a line of it, counted from 1.
type document struct {
	line   int
	text   []byte
	places *places
}

// split cuts a file at its YAML document markers. A marker inside a block of
// text would have to be indented, so every one in the first column counts.
func split(content []byte) []document {
	var docs []document
	current := document{line: 1, places: &places{}}
	line := 0
	for next := range bytes.Lines(bytes.TrimPrefix(content, []byte("\ufeff"))) {
		line++
		rest, marker := cutMarker(next)
		if marker {
			docs = append(docs, current)
			current = document{line: line, places: &places{}}
		}
		current.text = append(current.text, rest...)
	}
	return append(docs, current)
}

// cutMarker returns what of a line belongs to the document that a marker in it
// begins: "--- {kind: Node}" is a document's first line.
func cutMarker(line []byte) (rest []byte, marker bool) {
	for _, m := range []string{"---", "..."} {
		rest, ok := bytes.CutPrefix(line, []byte(m))
		if ok && (len(rest) == 0 || bytes.ContainsAny(rest[:1], " \t\r\n")) {
			return append([]byte("   "), rest...), true
		}
	}
	return line, false
}

func (d document) read(found map[key]manifest) []fault {
	if valid := validPrefix(d.text); valid < len(d.text) {
		return []fault{{line: d.lineAt(valid), reason: "not UTF-8"}}
	}
	trimmed := bytes.TrimSpace(d.text)
	if onlyComments(trimmed) {
		return nil
	}
	if (trimmed[0] == '{' || trimmed[0] == '[') && !d.flowYAML() {
		return d.readJSON(found)
	}
	asJSON, err := yaml.YAMLToJSONStrict(d.text)
	if err != nil {
		return []fault{d.yamlFault(err)}
	}
	if asJSON[0] == '[' {
		return d.readItems(asJSON, "", "", found)
	}
	return d.readObject(asJSON, "", "", found)
}

// flowYAML says whether a document that begins like JSON is YAML instead, such
// as {kind: Node}. What is neither counts as broken JSON.
func (d document) flowYAML() bool {
	var first json.RawMessage
	if json.NewDecoder(bytes.NewReader(d.text)).Decode(&first) == nil {
		return false
	}
	var whole yamlv3.Node
	decoder := yamlv3.NewDecoder(bytes.NewReader(d.text))
	return decoder.Decode(&whole) == nil && errors.Is(decoder.Decode(&whole), io.EOF)
}

// readJSON reads a stream of JSON values. YAML would take most of them too,
// but not those that are indented with tabs.
func (d document) readJSON(found map[key]manifest) (faults []fault) {
	decoder := json.NewDecoder(bytes.NewReader(d.text))
	for {
		start := int(decoder.InputOffset())
		var value json.RawMessage
		err := decoder.Decode(&value)
		if errors.Is(err, io.EOF) {
			return faults
		}
		if err != nil {
			at := len(d.text) // it ends too soon
			var syntax *json.SyntaxError
			if errors.As(err, &syntax) {
				at = int(syntax.Offset)
			}
			return append(faults, fault{line: d.lineAt(min(at, len(d.text))), reason: err.Error()})
		}
		start += len(d.text[start:]) - len(bytes.TrimLeft(d.text[start:], " \t\r\n"))
		part := document{d.lineAt(start), d.text[start:decoder.InputOffset()], &places{}}
		if value[0] == '[' {
			faults = append(faults, part.readItems(value, "", "", found)...)
			continue
		}
		faults = append(faults, part.readObject(value, "", "", found)...)
	}
}

// readItems reads an array of objects that is at a path of the document.
func (d document) readItems(array []byte, path, kind string, found map[key]manifest) (faults []fault) {
	var items []json.RawMessage
	if err := json.Unmarshal(array, &items); err != nil {
		return []fault{{line: d.lineOfPath(path), reason: "not a list of objects: " + err.Error()}}
	}
	for i, item := range items {
		for _, f := range d.readObject(item, fmt.Sprintf("%s[%d]", path, i), kind, found) {
			f.reason = fmt.Sprintf("item %d: %s", i, f.reason)
			faults = append(faults, f)
		}
	}
	return faults
}

// readObject reads one object, or all of a List, that is at a path of the
// document. kind is what a typed list says of its items, which need not say it
// themselves.
func (d document) readObject(text []byte, path, kind string, found map[key]manifest) []fault {
	var head struct {
		metav1.TypeMeta
		metav1.ObjectMeta `json:"metadata"`
		Items             json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(text, &head); err != nil {
		return []fault{{line: d.lineOfPath(path), reason: "not an object: " + err.Error()}}
	}
	if head.Kind == "" {
		head.Kind = kind
	}
	if item, isList := strings.CutSuffix(head.Kind, "List"); isList && head.Items != nil {
		return d.readItems(head.Items, join(path, "items"), item, found)
	}
	what, known := kinds[head.Kind]
	switch {
	case head.Kind == "":
		return []fault{{line: d.lineOfPath(path), reason: "kind is missing"}}
	case head.Kind == "Endpoints" && head.APIVersion == "v1":
		return []fault{{line: d.lineOfPath(path), harmless: true, reason: fmt.Sprintf(
			"Endpoints %s is passed over: only the addresses of EndpointSlices are served", cmp.Or(head.Namespace, metav1.NamespaceDefault)+"/"+head.Name)}}
	case !known:
		return nil
	case head.APIVersion != what.apiVersion && (head.APIVersion != "" || kind == ""):
		return []fault{{line: d.lineOfPath(join(path, "apiVersion")), reason: fmt.Sprintf("apiVersion %q of a %s is not served; %s is", head.APIVersion, head.Kind, what.apiVersion)}}
	}
	obj := what.empty()
	if faults := d.decode(text, path, obj); len(faults) > 0 {
		return faults
	}
	return d.keep(obj, path, head.Kind, what.namespaced, text, found)
}

func (d document) keep(obj object, path, kind string, namespaced bool, text []byte, found map[key]manifest) []fault {
	if obj.GetName() == "" {
		return []fault{{line: d.lineOfPath(join(path, "metadata")), reason: fmt.Sprintf("metadata.name of a %s is missing", kind)}}
	}
	if !namespaced {
		obj.SetNamespace("")
	} else if obj.GetNamespace() == "" {
		obj.SetNamespace(metav1.NamespaceDefault)
	}
	k := key{kind, obj.GetNamespace(), obj.GetName()}
	if _, twice := found[k]; twice {
		return []fault{{line: d.lineOfPath(path), reason: fmt.Sprintf("%s stands twice in this file; the first counts", k)}}
	}
	found[k] = manifest{obj, maphash.Bytes(seed, text)}
	return nil
}

// validPrefix is how many bytes from the start are UTF-8.
func validPrefix(text []byte) int {
	for i := 0; i < len(text); {
		r, size := utf8.DecodeRune(text[i:])
		if r == utf8.RuneError && size == 1 {
			return i
		}
		i += size
	}
	return len(text)
}

func onlyComments(text []byte) bool {
	for line := range bytes.Lines(text) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' {
			return false
		}
	}
	return true
}
