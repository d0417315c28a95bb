package file

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

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
}

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
	return found, faults
}

// document is a part of a file that starts at a line of it, counted from 1.
type document struct {
	line int
	text []byte
}

// split cuts a file at its YAML document markers. A marker inside a block of
// text would have to be indented, so every one in the first column counts.
func split(content []byte) []document {
	var docs []document
	current := document{line: 1}
	line := 0
	for next := range bytes.Lines(content) {
		line++
		if isMarker(next) {
			docs = append(docs, current)
			current = document{line: line + 1}
			continue
		}
		current.text = append(current.text, next...)
	}
	return append(docs, current)
}

func isMarker(line []byte) bool {
	line = bytes.TrimRight(line, " \t\r\n")
	return bytes.Equal(line, []byte("---")) || bytes.Equal(line, []byte("...")) || bytes.HasPrefix(line, []byte("--- #"))
}

func (d document) read(found map[key]manifest) []fault {
	if valid := validPrefix(d.text); valid < len(d.text) {
		return []fault{{d.lineAt(valid), "not UTF-8"}}
	}
	trimmed := bytes.TrimSpace(d.text)
	if len(trimmed) > 0 && (trimmed[0] == '{' || trimmed[0] == '[') {
		return d.readJSON(found)
	}
	if onlyComments(trimmed) {
		return nil
	}
	asJSON, err := yaml.YAMLToJSONStrict(d.text)
	if err != nil {
		return []fault{d.faultOf(err)}
	}
	return d.readObject(asJSON, "", found)
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
			return append(faults, fault{d.lineAt(min(at, len(d.text))), err.Error()})
		}
		start += len(d.text[start:]) - len(bytes.TrimLeft(d.text[start:], " \t\r\n"))
		part := document{d.lineAt(start), d.text[start:decoder.InputOffset()]}
		if value[0] == '[' {
			faults = append(faults, part.readItems(value, "", found)...)
			continue
		}
		faults = append(faults, part.readObject(value, "", found)...)
	}
}

func (d document) readItems(array []byte, kind string, found map[key]manifest) (faults []fault) {
	var items []json.RawMessage
	if err := json.Unmarshal(array, &items); err != nil {
		return []fault{d.faultOf(err)}
	}
	for i, item := range items {
		for _, f := range d.readObject(item, kind, found) {
			f.reason = fmt.Sprintf("item %d: %s", i, f.reason)
			faults = append(faults, f)
		}
	}
	return faults
}

// readObject reads one object, or all of a List. kind is what a typed list
// says of its items, which need not say it themselves.
func (d document) readObject(text []byte, kind string, found map[key]manifest) []fault {
	var head struct {
		metav1.TypeMeta
		Items json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(text, &head); err != nil {
		return []fault{{d.line, "not an object: " + err.Error()}}
	}
	if head.Kind == "" {
		head.Kind = kind
	}
	if item, isList := strings.CutSuffix(head.Kind, "List"); isList && head.Items != nil {
		return d.readItems(head.Items, item, found)
	}
	what, known := kinds[head.Kind]
	switch {
	case head.Kind == "":
		return []fault{{d.line, "kind is missing"}}
	case !known:
		return nil
	case head.APIVersion != what.apiVersion && (head.APIVersion != "" || kind == ""):
		return []fault{{d.lineOf("apiVersion"), fmt.Sprintf("apiVersion %q of a %s is not served; %s is", head.APIVersion, head.Kind, what.apiVersion)}}
	}
	obj := what.empty()
	if err := yaml.UnmarshalStrict(text, obj); err != nil {
		return []fault{d.faultOf(err)}
	}
	return d.keep(obj, head.Kind, what.namespaced, text, found)
}

func (d document) keep(obj object, kind string, namespaced bool, text []byte, found map[key]manifest) []fault {
	if obj.GetName() == "" {
		return []fault{{d.lineOf("metadata"), fmt.Sprintf("metadata.name of a %s is missing", kind)}}
	}
	if !namespaced {
		obj.SetNamespace("")
	} else if obj.GetNamespace() == "" {
		obj.SetNamespace(metav1.NamespaceDefault)
	}
	k := key{kind, obj.GetNamespace(), obj.GetName()}
	if _, twice := found[k]; twice {
		return []fault{{d.line, fmt.Sprintf("%s stands twice in this file; the first counts", k)}}
	}
	found[k] = manifest{obj, maphash.Bytes(seed, text)}
	return nil
}

var (
	yamlLine     = regexp.MustCompile(`line (\d+)`)
	unknownField = regexp.MustCompile(`unknown field "([^"]*)"`)
	wrongType    = regexp.MustCompile(`struct field \S*?([^.\s]+) of type`)
)

// faultOf finds the line that an error is about: YAML errors name it, counted
// from the document's start, and errors about a field name the field.
func (d document) faultOf(err error) fault {
	reason := strings.TrimPrefix(err.Error(), "error unmarshaling JSON: while decoding JSON: ")
	reason = strings.TrimPrefix(reason, "error converting YAML to JSON: ")
	if m := yamlLine.FindStringSubmatch(reason); m != nil {
		n, _ := strconv.Atoi(m[1])
		line := min(d.line+max(n, 1)-1, d.lineAt(len(d.text))) // YAML has more ways to end a line than files have
		return fault{line, yamlLine.ReplaceAllString(reason, "line "+strconv.Itoa(line))}
	}
	for _, pattern := range []*regexp.Regexp{unknownField, wrongType} {
		if m := pattern.FindStringSubmatch(reason); m != nil {
			return fault{d.lineOf(m[1][strings.LastIndex(m[1], ".")+1:]), reason}
		}
	}
	return fault{d.line, reason}
}

// lineOf finds the first line that has the field as a key, else the
// document's first.
func (d document) lineOf(field string) int {
	at := regexp.MustCompile(`(?m)(^|[\s{,"'-])` + regexp.QuoteMeta(field) + `["']?\s*:`).FindIndex(d.text)
	if at == nil {
		return d.line
	}
	return d.lineAt(at[1])
}

func (d document) lineAt(offset int) int { return d.line + bytes.Count(d.text[:offset], []byte("\n")) }

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
