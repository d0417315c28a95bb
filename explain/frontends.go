// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"context"
	"net/http"
	"net/netip"

	"signalbox/proxier/plan"
)

// Frontends says which connections are those of a Service on a node. Trace asks a
// daemon for it.
type Frontends struct {
	Node, Mode string
	Ports      []FrontendPort
	// NodeAddrs are the addresses at which NodePorts may be served.
	NodeAddrs []netip.Addr
	// Relays are the addresses of a relay on the node. It answers in the place of an
	// endpoint.
	Relays []netip.Prefix
	// Problems are about the objects and the node.
	Problems []string
	// Sentence says why there are no Ports; empty if there are.
	Sentence string
}

// FrontendPort has the frontends of a Service port in one IP family.
type FrontendPort struct {
	Service, Port string // as those of Port
	Family        plan.Family
	Keys          []plan.FrontendKey
}

func (d *Daemon) serveFrontends(w http.ResponseWriter, r *http.Request) {
	q, err := ParseQuestion(r.FormValue("target"), "")
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s := d.current()
	if !s.Loop.Progress().Synced {
		http.Error(w, notRead, http.StatusServiceUnavailable) // a trace keeps the frontends that it knows
		return
	}
	var f *Frontends
	if err := s.ask(r, func(context.Context) { f = s.frontends(q) }); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	f.Problems = append(f.Problems, d.allProblems()...)
	reply(w, f)
}

// frontends is called by the Loop's goroutine.
func (s *Subject) frontends(q Question) *Frontends {
	answer := Explain(s.Loop, s.Environment, q)
	f := &Frontends{Node: s.Node, Mode: s.Mode, NodeAddrs: s.Loop.NodeAddrs(), Problems: answer.Problems, Sentence: answer.Sentence}
	for _, p := range answer.Ports {
		f.Ports = append(f.Ports, FrontendPort{p.Service, p.Port, p.family(), p.frontends})
	}
	for _, family := range s.Loop.Families() {
		if relay := s.Loop.RelayPrefix(family); relay.IsValid() {
			f.Relays = append(f.Relays, relay)
		}
	}
	return f
}

// index finds the number of a Service port in Ports.
func (f *Frontends) index() *frontendIndex {
	x := newFrontendIndex(f.NodeAddrs)
	for i, p := range f.Ports {
		x.add(i, p.Family, p.Keys)
	}
	return x
}

// portNumbers has each port number of the frontends once.
func (f *Frontends) portNumbers() (numbers []uint16) {
	seen := map[uint16]bool{}
	for _, p := range f.Ports {
		for _, key := range p.Keys {
			if !seen[key.Port] {
				seen[key.Port] = true
				numbers = append(numbers, key.Port)
			}
		}
	}
	return numbers
}
