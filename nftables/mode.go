// SPDX-License-Identifier: Apache-2.0

// Package nftables serves Services with the kernel's nf_tables, over netlink. It needs no
// nft binary.
//
// The table has one set of rules for all Services. The number of rules, chains and sets
// depends on how many different endpoint counts and affinity timeouts there are. With
// Services only the elements of a few maps grow. The reason is the kernel's cost: it
// visits each rule that is bound to a map when an element is added, and each element of
// a map when a rule is bound.
//
//	frontends  address . protocol . port  ->  id of an endpoint set
//	endpoints  id . slot                  ->  address . port
//
// The first packet of a connection finds its frontend. Its priority field
// (skb->priority) carries the id to the chain pick-N for sets of N endpoints. The id
// contains N. The chain draws a slot and sends the packet to the endpoint in it.
//
// The priority field is free for this use: the kernel sets it anew for forwarded IPv4
// packets, and nothing reads it between the hooks. The packet mark and the conntrack mark
// belong to other software. After the decision the priority is 0. So the first packet of
// a local process's connection leaves with priority 0, whatever its socket asked for.
//
// If traffic of this node and its Pods has other endpoints than traffic from outside, the
// first has a map of its own, internal-frontends. NodePorts have maps without the address.
//
// # Session affinity
//
// The map affinity has client . Service port -> endpoint, with a timeout that each new
// connection restarts. It holds an endpoint as an id: the Service port's number
// in the upper bits, the endpoint's number in the lower bits. So one more lookup tells whether the
// endpoint is in the set, and an endpoint goes with its element. A client whose endpoint
// is gone gets another one and keeps it; other clients notice nothing. See stickyRules. A
// Service port that outgrows 1024 endpoints gets a new number, and its clients are
// assigned anew once.
//
// The affinity map survives restarts. When a process writes the table anew, the map
// stays, and Service ports and endpoints get their numbers back.
//
// # Files in the order of a change
//
//	proxier.go  Sync: everything, or the Service ports that changed
//	adopt.go    what an earlier process left in the table
//	change.go   what changes
//	port.go     numbers of a Service port
//	compile.go  elements of a Service port
//	write.go    one transaction
//	state.go    what the kernel has now
//
// ruleset.go makes the rules, sets.go lists the sets, ids.go the ranges of ids, and
// localhost.go counts packets to NodePorts on loopback. Only adopt.go and write.go use the kernel.
package nftables

import (
	"time"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Mode is the name of this mode on the command line and in messages.
const Mode = "nftables"

// tableName differs from kube-proxy's, so that a takeover can write this table first
// and remove the other afterwards, with no moment without rules.
const tableName = "signalbox"

// openTable connects to the kernel of the calling thread's network namespace.
func openTable(f *nft.IPFamily) (*nft.Table, error) { return nft.Open(f, tableName, allSets) }

// Dataplane is the nftables mode.
type Dataplane struct{ proxier.ModeDefaults }

var _ proxier.Mode = Dataplane{}

// Name implements proxier.Mode.
func (Dataplane) Name() string { return Mode }

// Supported implements proxier.Mode. It asks the kernel to check rules of each form.
func (Dataplane) Supported(f plan.Family) error {
	node := plan.Node{
		LocalPods:     plan.LocalPods{Interface: "probe0", InterfacePrefix: "probe"},
		NodePortAddrs: plan.NodePortAddrs{All: true},
	}
	rules, st := rulesetOf(nft.FamilyOf(f), proxier.DefaultMasqueradeMark, node), newState(nft.FamilyOf(f))
	for _, large := range []bool{false, true} {
		st.chains[pickChain{size: 2, timeout: time.Second, large: large}] = 0
	}
	return access.Supported(Mode, f, allSets, rules.chains(st))
}

// New implements proxier.Mode.
func (Dataplane) New(o proxier.Options) (proxier.Proxier, error) { return New(o) }

// Render implements proxier.Mode. It prints the table that New and one Sync would make,
// as `nft list table` does, without a kernel.
func (Dataplane) Render(o proxier.Options, p *plan.Plan) (string, error) {
	f := nft.FamilyOf(o.Family)
	rules := rulesetOf(f, o.MasqueradeMark, p.Node)
	if err := access.ValidateNode(f, rules.Node); err != nil {
		return "", err
	}
	st, err := stateOf(f, p, nil, nil)
	if err != nil {
		return "", err
	}
	return rules.render(st), nil
}

// render prints the table that holds st.
func (r ruleset) render(st *state) string {
	elements := r.NodeElements()
	compileAll(st, func(e nft.Element) { elements = append(elements, e) })
	return nft.RenderTable(r.IPFamily, tableName, r.counters(), allSets, elements, r.chains(st))
}

// Cleanup implements proxier.Mode. It removes the mode's table and nothing else; conntrack keeps
// connections. Without a table nothing is written.
func (Dataplane) Cleanup(f plan.Family, _ bool) (removed bool, draining int, err error) {
	removed, err = access.DropTable(f, tableName)
	return removed, 0, err
}

// Written implements proxier.Mode.
func (Dataplane) Written(f plan.Family) (found bool, taken proxier.TakenOver, err error) {
	found, err = access.HasTable(f, tableName)
	return found, proxier.TakenOver{}, err
}

// Traits implements proxier.Mode. As with kube-proxy since 1.31, NodePorts are at
// the Node's own addresses.
func (Dataplane) Traits() proxier.Traits {
	return proxier.Traits{
		Automatic:   true,
		FileSection: "nftables",
		Series: []string{
			"sync_full_proxy_rules_duration_seconds", "sync_partial_proxy_rules_duration_seconds",
			"sync_proxy_rules_nftables_sync_failures_total", "sync_proxy_rules_nftables_cleanup_failures_total",
		},
		PrimaryNodePorts: true,
		GuardsClusterIPs: true,
		Localhost:        proxier.LocalhostByRelay,
		LocalhostListens: true,
	}
}
