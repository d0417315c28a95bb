package proxier

import "fmt"

// Problem says what in an object cannot be served. Everything else in the
// object, and every other object, is.
type Problem struct {
	Kind   string // "Service", "EndpointSlice", "Node", "ServiceCIDR"
	Object string // "namespace/name", or the name of an object without a namespace
	Field  string // path of the field as in the manifest, for example "spec.ports[0].port"
	Reason string // what is wrong with it and what happens now
}

// String returns for example
// `Service default/web: spec.ports[0].port: 70000 is not a port; the port is left out`.
func (p Problem) String() string {
	return fmt.Sprintf("%s %s: %s: %s", p.Kind, p.Object, p.Field, p.Reason)
}

// problems collects what is wrong with one object.
type problems struct {
	kind, object string
	found        []Problem
}

func (p *problems) add(field, reason string, args ...any) {
	p.found = append(p.found, Problem{p.kind, p.object, field, fmt.Sprintf(reason, args...)})
}
