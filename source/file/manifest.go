// SPDX-License-Identifier: Apache-2.0

package file

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	strictjson "sigs.k8s.io/json"
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

type object interface {
	runtime.Object
	metav1.Object
}

// manifest is one object and the fingerprint of its JSON.
type manifest struct {
	object      object
	fingerprint uint64
}

// fault is what is wrong at a place of a file, such as "document 2: items[3]".
type fault struct {
	place, reason string
	// harmless: the fault hides no object of the kinds that are read.
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

// separator begins or ends a YAML document. The next document may begin on the
// same line: "--- {kind: Node}". The splitter of apimachinery refuses such a line,
// and loses the document before it.
var separator = regexp.MustCompile(`\n(?:---|\.\.\.)`)

// parser collects the objects and the faults of one file.
type parser struct {
	objects map[key]manifest
	faults  []fault
}

func parse(content []byte) *parser {
	p := &parser{objects: map[key]manifest{}}
	number := 0
	place := func() string {
		number++
		return fmt.Sprintf("document %d", number)
	}
	for _, text := range separator.Split("\n"+strings.TrimPrefix(string(content), "\ufeff"), -1) {
		values, err := toJSON([]byte(strings.TrimPrefix(text, "\n")))
		for _, value := range values {
			p.add(value, place(), "")
		}
		if err != nil {
			p.fault(place(), "%v", err)
		}
	}
	return p
}

// toJSON returns the values of a YAML document, or of a stream of JSON values. An
// error is about what comes after these values.
func toJSON(text []byte) (values []json.RawMessage, err error) {
	start := bytes.TrimSpace(text)
	flow := len(start) > 0 && (start[0] == '{' || start[0] == '[')
	if flow {
		decoder := json.NewDecoder(bytes.NewReader(text))
		for err == nil {
			var value json.RawMessage
			if err = decoder.Decode(&value); err == nil {
				values = append(values, value)
			}
		}
		if errors.Is(err, io.EOF) {
			return values, nil
		}
		// It may be YAML, such as {kind: Node}. The brackets let the YAML library
		// see all of it: it ignores what comes after such a value.
		text = slices.Concat([]byte("["), text, []byte("\n]"))
	}
	asJSON, yamlErr := yaml.YAMLToJSONStrict(text)
	switch {
	case len(values) > 0 && yamlErr != nil:
		return values, err
	case yamlErr != nil:
		return nil, yamlErr
	case flow:
		return values, json.Unmarshal(asJSON, &values)
	case string(asJSON) == "null":
		return nil, nil // nothing but comments
	}
	return []json.RawMessage{asJSON}, nil
}

func (p *parser) fault(place, format string, args ...any) {
	p.faults = append(p.faults, fault{place: place, reason: fmt.Sprintf(format, args...)})
}

// addAll adds each object of a JSON array.
func (p *parser) addAll(array []byte, place, kind string) {
	var items []json.RawMessage
	if err := json.Unmarshal(array, &items); err != nil {
		p.fault(place, "not a list of objects: %v", err)
	}
	for i, item := range items {
		p.add(item, fmt.Sprintf("%s[%d]", place, i), kind)
	}
}

// add adds the object, or all objects of the list, that a JSON value describes.
// kind is the kind of a typed list's items, which need not name it.
func (p *parser) add(value []byte, place, kind string) {
	if value[0] == '[' {
		p.addAll(value, place, kind)
		return
	}
	var head struct {
		metav1.TypeMeta
		Metadata struct{ Name, Namespace string }
		Items    json.RawMessage
	}
	if err := json.Unmarshal(value, &head); err != nil {
		p.fault(place, "not an object: %v", err)
		return
	}
	head.Kind = cmp.Or(head.Kind, kind)
	if item, isList := strings.CutSuffix(head.Kind, "List"); isList && head.Items != nil {
		p.addAll(head.Items, place+": items", item)
		return
	}
	k := key{head.Kind, cmp.Or(head.Metadata.Namespace, metav1.NamespaceDefault), head.Metadata.Name}
	known, isKnown := kinds[k.kind]
	if isKnown && !known.namespaced {
		k.namespace = ""
	}
	switch {
	case k.kind == "":
		p.fault(place, "kind is missing")
	case k.kind == "Endpoints" && head.APIVersion == "v1":
		p.faults = append(p.faults, fault{place, fmt.Sprintf("%s is ignored: only the addresses of EndpointSlices are served", k), true})
	case !isKnown:
	case head.APIVersion != known.apiVersion && (head.APIVersion != "" || kind == ""):
		p.fault(place, "%s: apiVersion %q is not served, only %s", k, head.APIVersion, known.apiVersion)
	default:
		p.addObject(value, place, k, known.empty())
	}
}

// addObject decodes value into obj, as strictly as the API server.
func (p *parser) addObject(value []byte, place string, k key, obj object) {
	errs, err := strictjson.UnmarshalStrict(value, obj)
	var wrongType *json.UnmarshalTypeError
	if errors.As(err, &wrongType) {
		err = fmt.Errorf("%s: this needs the type %s, and has %s", wrongType.Field, wrongType.Type, wrongType.Value)
	}
	if err != nil {
		errs = append(errs, err)
	}
	if k.name == "" {
		errs = append(errs, errors.New("metadata.name is missing"))
	}
	if _, twice := p.objects[k]; twice {
		errs = append(errs, errors.New("the file has this object twice; the first counts"))
	}
	for _, err := range errs {
		p.fault(place, "%s: %v", k, err)
	}
	if errs == nil {
		obj.SetNamespace(k.namespace)
		p.objects[k] = manifest{obj, maphash.Bytes(seed, value)}
	}
}
