// SPDX-License-Identifier: Apache-2.0

// Package explain answers what this node does with a connection to a Service, and why.
// The plan and its reasons come from a syncer.Loop. This package adds words, and asks
// a running daemon through a local socket.
package explain

import (
	"cmp"
	"net/netip"
	"time"

	"signalbox/proxier/plan"
)

// Verdict says what becomes of new connections.
type Verdict string

// The verdicts.
const (
	Served  Verdict = "served"
	Refused Verdict = "refused" // the client sees "connection refused"
	Dropped Verdict = "dropped" // the client waits until its own timeout
	Unknown Verdict = "unknown" // signalbox does not serve it, or the kernel may do something else
)

// exitCodes are those of `signalbox explain`. 1 is for a question that has no answer.
var exitCodes = map[Verdict]int{Served: 0, Refused: 2, Dropped: 3, Unknown: 4}

// ExitCode returns the exit code of `signalbox explain` for a verdict.
func (v Verdict) ExitCode() int { return exitCodes[v] }

// Answer is the answer to one Question. docs/explain.md documents its JSON form.
type Answer struct {
	Question string `json:"question"`
	Node     string `json:"node"`
	Mode     string `json:"mode"`
	// Origin says where the objects come from, and whether a daemon answered.
	Origin string `json:"origin"`
	// Verdict is the worst one of all connections: unknown, dropped, refused, served.
	Verdict Verdict `json:"verdict"`
	// Sentence says why there are no Ports; empty if there are.
	Sentence string `json:"sentence,omitempty"`
	// Problems are about the objects. A daemon adds those of the node, the configuration
	// and the API server.
	Problems []string `json:"problems,omitempty"`
	// Doubts say why Ports may be wrong. Then Verdict is unknown.
	Doubts []string `json:"doubts,omitempty"`
	Ports  []Port   `json:"ports,omitempty"`
	// Compared has an entry for each IP family of Ports. It is missing if no daemon was
	// asked, or if it was asked not to compare.
	Compared []Compared `json:"compared,omitempty"`

	// unserved is the verdict if there are no Ports; "" for unknown.
	unserved Verdict
	// client is Question.From of the question.
	client netip.Addr
}

// Compared is what the kernel has for the ports of an answer, beside what signalbox wrote.
// Its lines are in the words of the kernel's tool; the counts are of all lines.
type Compared struct {
	Family string `json:"family"`
	// Holds is what the kernel has as written.
	Holds      []string `json:"holds"`
	HoldsCount int      `json:"holdsCount"`
	// Differences has the lines of a Diff.
	Differences      []string `json:"differences"`
	DifferencesCount int      `json:"differencesCount"`
	// Before are rules of other software that packets meet before signalbox's.
	Before []string `json:"before,omitempty"`
	// Error says why the kernel was not compared.
	Error string `json:"error,omitempty"`
}

// Port is about one Service port in one IP family.
type Port struct {
	Service  string `json:"service"` // "namespace/name"
	Port     string `json:"port"`    // name; empty for an unnamed port
	Protocol string `json:"protocol"`
	Family   string `json:"family"`
	// AffinitySeconds is the timeout of session affinity; 0 for none.
	AffinitySeconds int `json:"affinitySeconds,omitempty"`
	// Hints are the kinds of topology hints in the order in which they are tried.
	Hints []Hint `json:"hints,omitempty"`
	// Sets has the endpoints by traffic policy, for each policy that a connection has.
	Sets []Set `json:"sets"`
	// SlicesLeftOut are EndpointSlices without an endpoint for the Service port.
	SlicesLeftOut []SliceLeftOut `json:"slicesLeftOut,omitempty"`
	// Kernel is missing if no daemon was asked.
	Kernel *Kernel `json:"kernel,omitempty"`
	// Tracked is missing if the table cannot be read, or if this machine is not the node.
	Tracked *Tracked `json:"tracked,omitempty"`
	// Connections have an entry for each frontend and traffic source.
	Connections []Connection `json:"connections"`

	name      plan.ServicePortName
	frontends []plan.FrontendKey // those of Connections
}

// Hint says what became of one kind of topology hints.
type Hint struct {
	Kind    string `json:"kind"` // "node" or "zone"
	Here    string `json:"here,omitempty"`
	Reason  string `json:"reason"`
	Text    string `json:"text"`
	With    int    `json:"with"`    // ready endpoints that have such a hint
	Without int    `json:"without"` // ready endpoints that have none
}

// Set has the endpoints of a Service port under one traffic policy.
type Set struct {
	Policy    string     `json:"policy"` // "Cluster" or "Local"
	Endpoints []Endpoint `json:"endpoints"`
}

// Endpoint is an endpoint of a Set.
type Endpoint struct {
	Address string `json:"address"` // with the port
	Node    string `json:"node,omitempty"`
	Target  string `json:"target,omitempty"` // mostly the name of a Pod
	Used    bool   `json:"used"`             // it gets new connections
	Reason  string `json:"reason"`
	Text    string `json:"text"`
}

// SliceLeftOut is an EndpointSlice without an endpoint for the Service port.
type SliceLeftOut struct {
	Slice     string   `json:"slice"`
	Reason    string   `json:"reason"`
	Text      string   `json:"text"`
	Ports     []string `json:"ports"` // as "http/tcp"
	Endpoints int      `json:"endpoints"`
}

// Kernel says how the kernel follows.
type Kernel struct {
	// Current says that the kernel has the Service port as planned.
	Current bool `json:"current"`
	// Written is when the last change of the Service came into the kernel, and
	// TookMillis how long that sync took.
	Written    *time.Time `json:"written,omitempty"`
	TookMillis float64    `json:"tookMillis,omitempty"`
	// Quarantined is why the kernel refused the Service port.
	Quarantined string     `json:"quarantined,omitempty"`
	Since       *time.Time `json:"since,omitempty"`
	// Problem says how the mode serves the Service port otherwise than it asks for.
	Problem string `json:"problem,omitempty"`
}

// Tracked are the connections to the Service port's frontends in the kernel's
// connection tracking table.
type Tracked struct {
	Client string `json:"client,omitempty"` // Count and Flows have connections of this client only
	Count  int    `json:"count"`
	Flows  []Flow `json:"flows"` // at most 20 of them
}

// Flow is a tracked connection. Its addresses have ports.
type Flow struct {
	Client   string `json:"client"`
	Frontend string `json:"frontend"`
	Endpoint string `json:"endpoint"` // it answers
	Source   string `json:"source"`   // the client as the endpoint sees it
	Used     bool   `json:"used"`     // the endpoint gets new connections, too
}

// Connection is a new connection from one traffic source to one frontend.
type Connection struct {
	Kind    string `json:"kind"`    // "cluster IP", "external IP", "load-balancer IP" or "node port"
	Address string `json:"address"` // as "10.96.0.10:80/tcp" or "node:30080/tcp"
	// From has the traffic sources: "pods" and "node" are this node's, and "outside"
	// is all other.
	From []string `json:"from"`
	// Policy is "Cluster" or "Local", in effect for this traffic source.
	Policy string `json:"policy"`
	Reason string `json:"reason"`
	Text   string `json:"text"`
	// SourceRanges, if not null, are the only ones that may connect.
	SourceRanges []string `json:"sourceRanges"`
	// Masquerade has the traffic sources in whose place endpoints see an address of
	// this node.
	Masquerade []string `json:"masquerade"`
	// Endpoints counts those that get new connections.
	Endpoints int     `json:"endpoints"`
	Verdict   Verdict `json:"verdict"`
	Sentence  string  `json:"sentence"`
}

// badness orders verdicts.
var badness = map[Verdict]int{Served: 0, Refused: 1, Dropped: 2, Unknown: 3}

// judge sets the worst verdict. In doubt, nobody knows what becomes of connections.
func (a *Answer) judge() {
	if a.Verdict = Unknown; len(a.Doubts) > 0 {
		return
	}
	a.Verdict = cmp.Or(a.unserved, Unknown)
	for i, p := range a.Ports {
		for j, c := range p.Connections {
			if i+j == 0 || badness[c.Verdict] > badness[a.Verdict] {
				a.Verdict = c.Verdict
			}
		}
	}
}
