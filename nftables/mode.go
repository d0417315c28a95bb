// Package nftables serves Services with the kernel's nf_tables, spoken to over
// netlink; no nft binary is needed.
//
// The number of rules, chains and sets follows from how many different
// endpoint counts and affinity timeouts there are, never from the number of
// Services: nf_tables pays for every rule bound to a map each time an element
// is added, and for every element each time a rule is bound. All that grows
// with Services is elements of a few maps in one table:
//
//	frontends  address . protocol . port  ->  id of an endpoint set
//	endpoints  id . slot                  ->  address . port
//
// A packet that opens a connection finds its frontend and carries the id in its
// priority field (skb->priority) to the chain pick-N that fits a set of N
// endpoints; N is a part of the id. There a slot is drawn at random, and the
// packet is sent to the endpoint in that slot. The priority field is the
// scratch because nobody else's decisions hang on it between the hooks: the
// kernel itself sets it anew for forwarded IPv4 packets, while the packet mark
// and the conntrack mark belong to other software. It is set back to 0 after
// the decision; so the first packet of a local process's connection to a
// Service leaves with priority 0, whatever its socket asked for.
//
// Where traffic of this node's Pods and processes goes elsewhere than traffic
// from outside, a second map (internal-frontends) is looked at first, for
// packets of that origin only. NodePorts have maps of their own without the
// address.
//
// # Session affinity
//
// One map, affinity, remembers client . Service port -> endpoint, with a
// time-out that every new connection starts again. It holds endpoint ids, not
// addresses: an id is the Service port's number in the upper bits and the
// endpoint's in the lower ones, so that "is that endpoint still one of this
// set" is one more map lookup, and removing an endpoint is removing an
// element. A client whose endpoint is gone is given another and keeps it;
// nobody else notices. See stickyRules for the order of events. One limit
// follows: a Service port that outgrows 1024 endpoints gets a new number, and
// its clients choose anew once.
//
// What clients are remembered outlives the process: when the table is written
// anew, by whichever process, the affinity map stays, and Service ports and
// endpoints get the numbers back that they had.
//
// # Files in the order of a change
//
//	proxier.go  Sync: everything, or the Service ports that changed
//	adopt.go    what an earlier process left in the table
//	change.go   what changes; ports get ids and chains
//	port.go     a Service port with its ids
//	compile.go  from ids to elements
//	write.go    one transaction
//	state.go    what the kernel has now
//
// ruleset.go makes the rules from the node's facts. Only adopt.go and write.go use the
// kernel.
package nftables

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

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
// as `nft list table` does, without a kernel. If Sync would refuse the plan, a comment
// says why.
func (Dataplane) Render(o proxier.Options, p *plan.Plan) (string, error) {
	f := nft.FamilyOf(o.Family)
	rules := rulesetOf(f, o.MasqueradeMark, p.Node)
	err := access.ValidateNode(f, rules.Node)
	var st *state
	if err == nil {
		st, err = stateOf(f, p, nil, nil)
	}
	if err != nil {
		return fmt.Sprintf("# cannot be programmed: %v\n", err), nil
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
	t, err := openTable(nft.FamilyOf(f))
	if err != nil {
		return false, 0, err
	}
	defer t.Close()
	removed = t.DeleteTable()
	err = access.Commit(t)
	if errors.Is(err, unix.EINVAL) { // of nfnetlink, which knows no nf_tables
		return false, 0, &proxier.UnsupportedError{Mode: Mode, Family: f, Missing: "nf_tables", Remedy: "the kernel needs CONFIG_NF_TABLES (module nf_tables)", Err: err}
	}
	if err != nil {
		return false, 0, fmt.Errorf("delete table %s of %s: %w", tableName, f, err)
	}
	return removed, 0, nil
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
		Localhost:        proxier.LocalhostByRelay,
	}
}
