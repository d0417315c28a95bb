// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"signalbox/internal/netlab"

	"signalbox/proxier/plan"
)

// spread is how a client's connections must be shared out.
type spread uint8

const (
	overAll  spread = iota // every expected Pod answers some
	toOne                  // one of the expected Pods answers all
	toNobody               // all are refused
)

// source is whose address the Pods must see.
type source uint8

const (
	own    source = iota // the client's own
	ofNode               // an address of the node under test
)

// place is where connections go and what must come of them.
type place struct {
	through string // for the table
	kind    plan.FrontendKind
	service *service
	from    string
	pods    []string
	spread  spread
	source  source
}

// connections is how many connections go from each client to each place, over each
// protocol. That one of four endpoints is missed by chance, which would be called
// wrong, happens once in 25 million times.
const connections = 64

// refusals is how many connections are tried where nobody answers. A client on
// the same machine may learn of a refusal only when it tries again after a
// second, since Linux does not tell a TCP socket of an ICMP error that arrives
// while connect(2) is still sending.
const refusals = 3

// onNode are the Pods of the node under test.
var onNode = []string{"pod-a", "pod-b"}

// places is the table of what is shown: who must answer whom, and whose address
// they must see. Clients on the node (its Pods and its own processes) are served
// by all Pods whatever the external traffic policy says.
var places = []place{
	{"ClusterIP", plan.ClusterIP, &web, clientPod, allPods, overAll, own},
	{"ClusterIP", plan.ClusterIP, &web, nodeUnderTest, allPods, overAll, ofNode},
	{"ClusterIP", plan.ClusterIP, &web, outsideClient, allPods, overAll, ofNode},
	{"ClusterIP, one Pod", plan.ClusterIP, &single, clientPod, single.pods, overAll, own},
	{"ClusterIP, to itself", plan.ClusterIP, &single, "pod-b", single.pods, overAll, ofNode},
	{"ClusterIP, no Pod", plan.ClusterIP, &empty, clientPod, nil, toNobody, own},
	{"ClusterIP, affinity", plan.ClusterIP, &sticky, clientPod, allPods, toOne, own},
	{"ClusterIP, affinity", plan.ClusterIP, &sticky, nodeUnderTest, allPods, toOne, ofNode},
	{"ClusterIP, affinity", plan.ClusterIP, &sticky, outsideClient, allPods, toOne, ofNode},
	{"NodePort, Cluster", plan.NodePort, &web, clientPod, allPods, overAll, ofNode},
	{"NodePort, Cluster", plan.NodePort, &web, nodeUnderTest, allPods, overAll, ofNode},
	{"NodePort, Cluster", plan.NodePort, &web, outsideClient, allPods, overAll, ofNode},
	{"NodePort, Local", plan.NodePort, &webLocal, clientPod, allPods, overAll, own},
	{"NodePort, Local", plan.NodePort, &webLocal, nodeUnderTest, allPods, overAll, ofNode},
	{"NodePort, Local", plan.NodePort, &webLocal, outsideClient, onNode, overAll, own},
	{"load balancer, Cluster", plan.LoadBalancerIP, &web, clientPod, allPods, overAll, ofNode},
	{"load balancer, Cluster", plan.LoadBalancerIP, &web, nodeUnderTest, allPods, overAll, ofNode},
	{"load balancer, Cluster", plan.LoadBalancerIP, &web, outsideClient, allPods, overAll, ofNode},
	{"load balancer, Local", plan.LoadBalancerIP, &webLocal, clientPod, allPods, overAll, own},
	{"load balancer, Local", plan.LoadBalancerIP, &webLocal, nodeUnderTest, allPods, overAll, ofNode},
	{"load balancer, Local", plan.LoadBalancerIP, &webLocal, outsideClient, onNode, overAll, own},
}

// networks are the protocols that are probed, as the dialer names them.
var networks = []string{"tcp", "udp"}

// tally counts what came of connections over one protocol.
type tally struct {
	answers map[string]int         // Pod -> connections it answered
	sources map[netip.Addr]int     // source address that a Pod saw -> connections
	others  map[netlab.Outcome]int // what became of the rest
	// lastErr is of the last connection that nobody answered.
	lastErr error
}

func newTally() *tally {
	return &tally{answers: map[string]int{}, sources: map[netip.Addr]int{}, others: map[netlab.Outcome]int{}}
}

func (t *tally) count(a netlab.Answer, err error) {
	if err != nil {
		t.others[netlab.OutcomeOf(err)]++
		t.lastErr = err
		return
	}
	t.answers[a.Server]++
	t.sources[a.Seen.Addr()]++
}

// row is a place and what was found there.
type row struct {
	place
	at    netip.AddrPort
	owned []netip.Addr // the addresses that the place's source stands for
	// tallies are by network.
	tallies map[string]*tally
}

// probe connects to every place and prints the table.
func (t *trial) probe(ctx context.Context, f *familyResult) error {
	for i := range places {
		r, err := t.visit(ctx, &places[i], f.family)
		if err != nil {
			return err
		}
		f.rows = append(f.rows, r)
	}
	t.out.table(t.mode.Name, f, connections)
	return nil
}

func (t *trial) visit(ctx context.Context, p *place, f plan.Family) (row, error) {
	node := t.lab.Host(nodeUnderTest)
	r := row{place: *p, at: p.service.at(p.kind, f, node.Addr.Of(f)), tallies: map[string]*tally{}}
	owner := node
	if p.source == own {
		owner = t.lab.Host(p.from)
	}
	var err error
	if r.owned, err = owner.Addrs(); err != nil {
		return r, err
	}
	attempts := connections
	if p.spread == toNobody {
		attempts = refusals
	}
	for _, network := range networks {
		n := newTally()
		r.tallies[network] = n
		for range attempts {
			n.count(t.ask(ctx, p.from, network, r.at, probeLimit))
			if err := t.alive(ctx); err != nil {
				return r, err
			}
			if n.others[netlab.Silent] > 0 {
				break // one wait is enough to know, and the row is wrong
			}
		}
	}
	return r, nil
}

// wrong compares what was found with what must be.
func (r *row) wrong() []string {
	var all []string
	for _, network := range networks {
		for _, w := range r.wrongOver(r.tallies[network]) {
			all = append(all, fmt.Sprintf("%s from %s to %s/%s: %s", r.through, r.from, r.at, network, w))
		}
	}
	return all
}

func (r *row) wrongOver(n *tally) []string {
	if r.spread == toNobody {
		if len(n.answers) > 0 || len(n.others) != 1 || n.others[netlab.Refused] == 0 {
			return []string{fmt.Sprintf("expected every connection to be refused, but %s", n)}
		}
		return nil
	}
	var all []string
	expected := strings.Join(r.pods, ", ")
	if len(n.others) > 0 {
		all = append(all, fmt.Sprintf("expected an answer from %s every time, but %s (%v)", expected, n, n.lastErr))
	}
	for _, pod := range slices.Sorted(maps.Keys(n.answers)) {
		if !slices.Contains(r.pods, pod) {
			all = append(all, fmt.Sprintf("expected answers from %s only, but %s", expected, n))
			break
		}
	}
	switch {
	case r.spread == toOne && len(n.answers) != 1:
		all = append(all, fmt.Sprintf("expected one Pod to answer all of the client's connections, but %s", n))
	case r.spread == overAll && slices.ContainsFunc(r.pods, func(p string) bool { return n.answers[p] == 0 }):
		all = append(all, fmt.Sprintf("expected answers from each of %s, but %s", expected, n))
	}
	for _, a := range slices.SortedFunc(maps.Keys(n.sources), netip.Addr.Compare) {
		if !slices.Contains(r.owned, a) {
			all = append(all, fmt.Sprintf("expected the Pods to see %s, but they saw %s", r.owner(), a))
		}
	}
	return all
}

// owner says whose address must be seen.
func (r *row) owner() string {
	if r.source == own {
		return "the client's own address"
	}
	return "an address of " + nodeUnderTest
}

// String says for example "pod-a answered 12, 3 were refused".
func (t *tally) String() string {
	var parts []string
	for _, pod := range slices.Sorted(maps.Keys(t.answers)) {
		parts = append(parts, fmt.Sprintf("%s answered %d", pod, t.answers[pod]))
	}
	for _, o := range slices.Sorted(maps.Keys(t.others)) {
		parts = append(parts, fmt.Sprintf("%d %s %s", t.others[o], plural(t.others[o], "was", "were"), o))
	}
	if len(parts) == 0 {
		return "there was no connection"
	}
	return strings.Join(parts, ", ")
}

func plural(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}
