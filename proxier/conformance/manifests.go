// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

// decode reads YAML documents. A misspelt field is an error. Nothing is
// defaulted but the namespace: objects reach the Loop as they are written.
func decode(text string) ([]runtime.Object, error) {
	var out []runtime.Object
	for doc := range strings.SplitSeq("\n"+text, "\n---") {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		var head struct {
			Kind string `json:"kind"`
		}
		if err := yaml.Unmarshal([]byte(doc), &head); err != nil {
			return nil, err
		}
		var obj runtime.Object
		switch head.Kind {
		case "Service":
			obj = &corev1.Service{}
		case "EndpointSlice":
			obj = &discoveryv1.EndpointSlice{}
		case "Node":
			obj = &corev1.Node{}
		case "ServiceCIDR":
			obj = &networkingv1.ServiceCIDR{}
		default:
			return nil, fmt.Errorf("kind %q is not one that a proxy watches", head.Kind)
		}
		if err := yaml.UnmarshalStrict([]byte(doc), obj); err != nil {
			return nil, fmt.Errorf("%s: %w", head.Kind, err)
		}
		if m, err := meta.Accessor(obj); err != nil {
			return nil, err
		} else if m.GetNamespace() == "" && (head.Kind == "Service" || head.Kind == "EndpointSlice") {
			m.SetNamespace("default")
		}
		out = append(out, obj)
	}
	return out, nil
}

// keyOf returns for example "Service default/web".
func keyOf(obj runtime.Object) string {
	m, err := meta.Accessor(obj)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%s %s/%s", obj.GetObjectKind().GroupVersionKind().Kind, m.GetNamespace(), m.GetName())
}
