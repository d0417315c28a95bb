// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
	sigsyaml "sigs.k8s.io/yaml"
)

// Case is one Service, as it is at first and after each change.
type Case struct {
	Name   string
	States []State
}

// State is a Service and its EndpointSlices at one time. The Service may be nil.
type State struct {
	Service *corev1.Service
	Slices  []*discoveryv1.EndpointSlice
}

// objects are everything in the state, with apiVersion and kind.
func (s State) objects() []runtime.Object {
	var all []runtime.Object
	if s.Service != nil {
		all = append(all, s.Service)
	}
	for _, slice := range s.Slices {
		all = append(all, slice)
	}
	for _, o := range all {
		setKind(o)
	}
	return all
}

func setKind(o runtime.Object) {
	if kinds, _, err := scheme.Scheme.ObjectKinds(o); err == nil {
		o.GetObjectKind().SetGroupVersionKind(kinds[0])
	}
}

// WriteCase writes a case as YAML: a List for each state. ReadCase reads it.
func WriteCase(w io.Writer, c Case) error {
	for i, s := range c.States {
		items := []runtime.RawExtension{}
		for _, o := range s.objects() {
			items = append(items, runtime.RawExtension{Object: o})
		}
		list := struct {
			APIVersion string                 `json:"apiVersion"`
			Kind       string                 `json:"kind"`
			Items      []runtime.RawExtension `json:"items"`
		}{"v1", "List", items}
		text, err := sigsyaml.Marshal(list)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "--- # state %d\n%s", i, text); err != nil {
			return err
		}
	}
	return nil
}

// ReadCase reads what WriteCase has written.
func ReadCase(r io.Reader, name string) (Case, error) {
	c := Case{Name: name}
	err := eachDocument(r, func(text []byte) error {
		if len(bytes.TrimSpace(text)) == 0 {
			return nil
		}
		objects, err := decodeList(text)
		if err != nil {
			return err
		}
		var s State
		for _, o := range objects {
			switch o := o.(type) {
			case *corev1.Service:
				s.Service = o
			case *discoveryv1.EndpointSlice:
				s.Slices = append(s.Slices, o)
			}
		}
		c.States = append(c.States, s)
		return nil
	})
	return c, err
}

// eachDocument visits the documents of a YAML stream, until one fails.
func eachDocument(r io.Reader, visit func(text []byte) error) error {
	documents := yaml.NewYAMLReader(bufio.NewReader(r))
	for {
		text, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = visit(text)
		}
		if err != nil {
			return err
		}
	}
}

// decodeList decodes the items of a List, or a single object.
func decodeList(text []byte) ([]runtime.Object, error) {
	text, err := sigsyaml.YAMLToJSON(text)
	if err != nil {
		return nil, err
	}
	decode := scheme.Codecs.UniversalDeserializer().Decode
	o, _, err := decode(text, nil, nil)
	if err != nil {
		return nil, err
	}
	list, ok := o.(*corev1.List)
	if !ok {
		return []runtime.Object{o}, nil
	}
	var all []runtime.Object
	for _, item := range list.Items {
		o, _, err := decode(item.Raw, nil, nil)
		if runtime.IsNotRegisteredError(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, o)
	}
	return all, nil
}

// ports are the numbers of the Service's ports in any state, and protocols what they
// use, with TCP and UDP always.
func (c Case) ports() (numbers []int32, protocols []corev1.Protocol) {
	protocols = []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP}
	for _, s := range c.States {
		if s.Service == nil {
			continue
		}
		for _, p := range s.Service.Spec.Ports {
			numbers = add(numbers, p.Port)
			protocols = add(protocols, protocolOf(p))
		}
	}
	return numbers, protocols
}

func protocolOf(p corev1.ServicePort) corev1.Protocol {
	if p.Protocol == "" {
		return corev1.ProtocolTCP
	}
	return p.Protocol
}

func add[T comparable](all []T, one T) []T {
	if slices.Contains(all, one) {
		return all
	}
	return append(all, one)
}
