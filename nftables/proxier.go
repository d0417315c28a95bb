// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"signalbox/internal/localhost"
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Proxier serves Services of one IP family. It keeps a connection to the nf_tables of
// the network namespace in which it was made.
type Proxier struct {
	proxier.Defaults
	*nft.IPFamily
	mark  uint32
	table *nft.Table
	state *state // nil until the first Sync
	// chains, rules and nodeElements are for Counts.
	chains, rules, nodeElements int
	// localhost serves NodePorts on the loopback address.
	localhost *localhost.NodePorts
	counters  counterReader
	watch     *access.Watch
	// maxEndpointsRead bounds the endpoints of a table that is read back.
	maxEndpointsRead int
}

var _ proxier.Proxier = (*Proxier)(nil)

// New opens the connection to the kernel. Nothing is written before Sync.
func New(opts proxier.Options) (*Proxier, error) {
	f := nft.FamilyOf(opts.Family)
	t, err := openTable(f)
	if err != nil {
		return nil, err
	}
	return &Proxier{
		IPFamily: f, mark: opts.MasqueradeMark, table: t,
		localhost: localhost.New(opts.Family, Mode), watch: access.NewWatch(t), maxEndpointsRead: maxEndpointsRead,
	}, nil
}

// Watch implements proxier.Proxier.
func (p *Proxier) Watch(ctx context.Context, drifted func(proxier.Writer)) { p.watch.Run(ctx, drifted) }

// Close closes the connection to the kernel and ends connections that are relayed on
// loopback. The table stays.
func (p *Proxier) Close() error {
	p.localhost.Close()
	return errors.Join(p.table.Close(), p.counters.close())
}

// Problem implements proxier.Proxier.
func (p *Proxier) Problem(name plan.ServicePortName) (plan.Problem, bool) {
	return p.localhost.Problem(name)
}

// Pause implements proxier.Proxier, for connections on loopback.
func (p *Proxier) Pause() { p.localhost.Pause() }

// Relays implements proxier.Proxier, for connections on loopback.
func (p *Proxier) Relays() bool { return p.localhost.Relays() }

// Drain implements proxier.Proxier, for connections on loopback.
func (p *Proxier) Drain(ctx context.Context) { p.localhost.Drain(ctx) }

// Sync implements proxier.Proxier. Each call writes one transaction. The listeners on
// loopback follow it. If they fail, Sync does not fail: see Problem.
func (p *Proxier) Sync(ctx context.Context, plan *plan.Plan, change plan.Change) error {
	if err := plan.Check(ctx, Mode, p.Family); err != nil {
		return err
	}
	change.All = change.All || p.state == nil || change.Node && p.state.node.LocalhostNodePorts != plan.Node.LocalhostNodePorts
	if change.Empty() {
		return nil
	}
	rules := rulesetOf(p.IPFamily, p.mark, plan.Node)
	if change.All || change.Node {
		if err := access.ValidateNode(rules.IPFamily, rules.Node); err != nil {
			return err
		}
	}
	var err error
	if change.All {
		err = p.syncAll(rules, plan)
	} else {
		err = p.syncChange(rules, plan, change)
	}
	if err != nil {
		return err
	}
	p.localhost.Sync(plan, change)
	if plan.Node.LocalhostNodePorts {
		p.counters.open(p.IPFamily)
	}
	return nil
}

// syncAll adopts the table that an earlier process wrote, if it can. Otherwise it
// writes the table anew and keeps the affinity map with its clients. If other software
// has changed the table so that this fails, the map goes too.
func (p *Proxier) syncAll(rules ruleset, plan *plan.Plan) error {
	p.watch.RulesChanged() // this write corrects them
	old, err := p.existingTable(rules, plan)
	if err != nil {
		p.warn("cannot read the old table, clients lose their session affinity", err)
	}
	if old.adopted != nil {
		err := writeDifference(p.table, old.difference)
		if err == nil {
			p.written(rules, old.adopted)
			return nil
		}
		p.warn("cannot adopt the old table and write it anew", err)
	}
	st, err := stateOf(p.IPFamily, plan, stickyPorts(old.ports), nil)
	if err != nil {
		return err
	}
	err = writeTable(p.table, rules, st, old.contents)
	if err != nil && old.contents != nil {
		p.warn("cannot keep a part of the old table, clients lose their session affinity", err)
		err = writeTable(p.table, rules, st, nil)
	}
	if err != nil {
		return fmt.Errorf("write table %s: %w", tableName, err)
	}
	p.written(rules, st)
	return nil
}

// stickyPorts leaves out Service ports without affinity: they get new numbers with the
// new table.
func stickyPorts(ports map[plan.ServicePortName]*programmedPort) map[plan.ServicePortName]*programmedPort {
	sticky := make(map[plan.ServicePortName]*programmedPort)
	for name, p := range ports {
		if p.sticky() {
			sticky[name] = p
		}
	}
	return sticky
}

func (p *Proxier) warn(message string, err error) {
	slog.Warn("nftables: "+message, "family", p.Family.String(), "table", tableName, "error", err)
}

// written makes st the state after a full write.
func (p *Proxier) written(rules ruleset, st *state) {
	st.node, p.state = rules.Node, st
	p.countRules(rules)
}

// syncChange writes the Service ports and facts that change names.
func (p *Proxier) syncChange(rules ruleset, plan *plan.Plan, change plan.Change) error {
	c, err := p.state.prepare(plan, change.Services)
	if err != nil {
		return err
	}
	if err := writeChange(p.table, rules, p.state, c, change.Node); err != nil {
		p.state.undo(c)
		return fmt.Errorf("write %s to table %s: %w", changeText(change), tableName, err)
	}
	p.state.commit(c)
	if change.Node {
		p.state.node = rules.Node
	}
	if change.Node || len(c.newChains)+len(c.oldChains) > 0 {
		p.countRules(rules)
	}
	return nil
}

func changeText(change plan.Change) string {
	what := fmt.Sprintf("%d changed Service ports", len(change.Services))
	if len(change.Services) == 1 {
		what = change.Services[0].String()
	}
	if change.Node {
		what += " and the node's facts"
	}
	return what
}

func (p *Proxier) countRules(rules ruleset) {
	chains := rules.chains(p.state)
	p.chains, p.rules, p.nodeElements = len(chains), 0, len(rules.NodeElements())
	for _, c := range chains {
		p.rules += len(c.Rules)
	}
}

// Counts implements proxier.Proxier. The clients that session affinity
// remembers are not counted.
func (p *Proxier) Counts() []proxier.KernelObjects {
	if p.state == nil {
		return nil
	}
	return []proxier.KernelObjects{
		{Table: tableName, Kind: "chain", Count: p.chains},
		{Table: tableName, Kind: "rule", Count: p.rules},
		{Table: tableName, Kind: "element", Count: p.state.elements.Len() + p.nodeElements},
	}
}
