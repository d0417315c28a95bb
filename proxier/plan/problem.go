// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
)

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

// maxProblems is how many problems of one object are told one by one: an
// EndpointSlice may hold thousands of bad addresses.
const maxProblems = 10

// Problems collects what is wrong with one object.
type Problems struct {
	Kind, Object string
	found        []Problem
	more         int // not in found
}

// Add records a problem with a field. Beyond maxProblems, it only counts.
func (p *Problems) Add(field, reason string, args ...any) {
	if len(p.found) == maxProblems {
		p.more++
		return
	}
	p.found = append(p.found, Problem{p.Kind, p.Object, field, fmt.Sprintf(reason, args...)})
}

// All returns what was found, with a word on what is not listed.
func (p *Problems) All() []Problem {
	if p.more == 0 {
		return p.found
	}
	last := p.found[len(p.found)-1]
	last.Reason = fmt.Sprintf("%d more problems like the ones before are not listed", p.more)
	return append(p.found, last)
}

// Annotations that kube-proxy does not know.
const (
	// AnnotationScheduler of a Service names the kernel's scheduler that
	// chooses its endpoints.
	AnnotationScheduler = "signalbox.dev/scheduler"
	// AnnotationWeights of a Service or an EndpointSlice says which share of
	// new connections endpoints take, for example
	// "10.244.1.5=3, web-0=2, web-canary-*=1, *=9". An entry is about an
	// address, the name of an endpoint's target, or with a star all names that
	// begin so; the most exact one counts. A slice's entries go before its
	// Service's. Weights are from 0, for no new connections, to 65535; 1 where
	// nothing is said.
	AnnotationWeights = "signalbox.dev/weights"
)

// AnnotationField is the path of an annotation as a Problem names it.
func AnnotationField(key string) string { return "metadata.annotations[" + key + "]" }
