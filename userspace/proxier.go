// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"signalbox/internal/wait"
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Mode is the name of this mode on the command line and in messages.
const Mode = "userspace"

// Proxier relays the Services of one IP family in the network namespace in
// which it was made.
type Proxier struct {
	proxier.Defaults
	family *nft.IPFamily
	mark   uint32
	table  *nft.Table
	watch  *access.Watch
	routes *routes
	relay  *relay
	state  *state // nil until the first Sync
}

var _ proxier.Proxier = (*Proxier)(nil)

// New opens the connections to the kernel. The relay begins with the first Sync.
func New(opts proxier.Options) (*Proxier, error) {
	f := nft.FamilyOf(opts.Family)
	t, err := nft.Open(f, tableName, makeSets())
	if err != nil {
		return nil, err
	}
	mark := answersMark(opts.MasqueradeMark)
	routes, err := newRoutes(opts.Family, mark)
	if err != nil {
		t.Close()
		return nil, err
	}
	relay, err := newRelay(opts.Family, routes)
	if err != nil {
		routes.close()
		t.Close()
		return nil, err
	}
	return &Proxier{family: f, mark: mark, table: t, watch: access.NewWatch(t), routes: routes, relay: relay}, nil
}

// Close ends the relay with all its connections. The rules stay: until another
// process relays, the node refuses clients.
func (p *Proxier) Close() error {
	p.relay.close()
	p.routes.close()
	return p.table.Close()
}

// Pause implements proxier.Proxier. The other process already relays.
func (p *Proxier) Pause() { p.relay.pause() }

// RelayPrefix implements proxier.Proxier.
func (p *Proxier) RelayPrefix() netip.Prefix { return relayPrefixes[p.family.Family] }

// RelayStats implements proxier.Proxier.
func (p *Proxier) RelayStats() (proxier.RelayStats, bool) { return p.relay.stats(), true }

// Sync implements proxier.Proxier. Every call is one transaction.
func (p *Proxier) Sync(ctx context.Context, plan *plan.Plan, change plan.Change) error {
	if err := plan.Check(ctx, Mode, p.family.Family); err != nil {
		return err
	}
	if change.All || p.state == nil {
		return p.syncAll(plan)
	}
	if change.Empty() {
		return nil
	}
	return p.syncChange(plan, change)
}

// Problem implements proxier.Proxier: SCTP is not relayed.
func (p *Proxier) Problem(name plan.ServicePortName) (plan.Problem, bool) {
	if relayed(name.Protocol) || p.state == nil || p.state.services[name] == nil {
		return plan.Problem{}, false
	}
	return plan.Problem{Kind: "Service", Object: name.ServiceName.String(), Field: "spec.ports", Reason: "mode userspace does not relay SCTP: these ports refuse; use another mode"}, true
}

// routesPeriod is the time between two looks at the routes.
const routesPeriod = time.Second

// Watch implements proxier.Proxier.
func (p *Proxier) Watch(ctx context.Context, drifted func(proxier.Writer)) {
	var table sync.WaitGroup
	defer table.Wait()
	table.Go(func() { p.watch.Run(ctx, drifted) })
	for wait.For(ctx, routesPeriod) {
		differ, err := p.routes.differ()
		if err != nil {
			slog.Debug("userspace: the relay's routes cannot be read; trying again", "family", p.family.Family.String(), "error", err)
		}
		if differ {
			drifted(proxier.Writer{})
		}
	}
}

// elements hands out the elements that the table should have.
func (p *Proxier) elements(rules ruleset) func(emit func(nft.Element)) {
	return func(emit func(nft.Element)) {
		for _, e := range rules.NodeElements() {
			emit(e)
		}
		elements := access.NewElements(makeSets())
		for _, sp := range p.state.services {
			for _, e := range compile(p.family, sp, p.state.ids) {
				if elements.Add(&e) {
					emit(e)
				}
			}
		}
	}
}

// Compare implements proxier.Proxier.
func (p *Proxier) Compare(_ context.Context, about ...plan.ServicePortName) (proxier.Comparison, error) {
	if p.state == nil {
		return proxier.Comparison{}, proxier.ErrNothingWritten
	}
	rules := p.rules(*p.relay.node.Load())
	c, err := access.Compare(p.table, rules.chains(), p.elements(rules), about, func(name plan.ServicePortName, emit func(nft.Element)) {
		if sp := p.state.services[name]; sp != nil {
			for _, e := range compile(p.family, sp, p.state.ids) {
				emit(e)
			}
		}
	})
	if err != nil {
		return c, err
	}
	routes, err := p.routes.differences()
	c.Differences = append(c.Differences, routes...)
	return c, err
}

// Repair implements proxier.Proxier. It adds missing routes, and only compares the table: one
// transaction replaces it, and it has no state of connections.
func (p *Proxier) Repair(context.Context) (proxier.Difference, error) {
	if p.state == nil {
		return proxier.Difference{}, nil
	}
	rules := p.rules(*p.relay.node.Load())
	found, err := p.watch.Compare(rules.chains(), p.elements(rules))
	if err != nil {
		return proxier.Difference{}, err
	}
	missing, err := p.routes.repair()
	return proxier.Difference{Objects: append(found, missing...), NeedsFullWrite: len(found) > 0}, err
}

func (p *Proxier) rules(node plan.Node) ruleset {
	r := ruleset{Rules: access.Rules{IPFamily: p.family, Node: node}, mark: p.mark}
	if p.relay.listeners != nil {
		r.ports = p.relay.listeners.ports
	}
	return r
}

// syncAll replaces the table. Frontends keep their numbers.
func (p *Proxier) syncAll(plan *plan.Plan) error {
	p.watch.RulesChanged() // this write corrects them
	if err := access.ValidateNode(p.family, plan.Node); err != nil {
		return err
	}
	if err := p.routes.ensure(); err != nil {
		return err
	}
	st := newState(p.family)
	if p.state != nil {
		st.pool.StartAt(p.state.pool.Next())
	}
	p.adopt(st, plan, p.table.Read)
	s, err := st.prepare(plan, plan.Names())
	if err != nil {
		return err
	}
	list := s.targets()
	added := p.relay.targets.announce(list)
	if err := p.relay.start(); err != nil {
		p.relay.targets.withdraw(added)
		return err
	}
	rules := p.rules(plan.Node)
	p.table.ReplaceTable()
	p.table.AddChains(rules.chains())
	p.table.AddElements(append(s.Add, rules.NodeElements()...))
	if err := access.Commit(p.table); err != nil {
		p.relay.targets.withdraw(added)
		return fmt.Errorf("write table %s: %w", tableName, err)
	}
	s.commit()
	p.relay.targets.replace(list, time.Now())
	if p.state != nil {
		p.relay.reset(s.removed(p.state.services))
	}
	p.relay.setNode(plan.Node)
	p.state = st
	if err := p.routes.removeOthers(); err != nil { // no packet gets such a mark any more
		slog.Warn("userspace: a routing rule of an earlier configuration cannot be removed; it stays until the next full write", "family", p.family.Family.String(), "error", err)
	}
	return nil
}

// syncChange writes what change names.
func (p *Proxier) syncChange(plan *plan.Plan, change plan.Change) error {
	rules := p.rules(plan.Node)
	if change.Node {
		if err := access.ValidateNode(rules.IPFamily, rules.Node); err != nil {
			return err
		}
	}
	s, err := p.state.prepare(plan, change.Services)
	if err != nil {
		return err
	}
	list := s.targets()
	added := p.relay.targets.announce(list)
	if change.Node {
		p.table.RewriteChains(rules.nodeChains())
		rules.RewriteNodeElements(p.table)
	}
	p.table.RemoveElements(s.Remove)
	p.table.AddElements(s.Add)
	if err := access.Commit(p.table); err != nil {
		p.relay.targets.withdraw(added)
		s.undo()
		return fmt.Errorf("write %d changed Service ports to table %s: %w", len(change.Services), tableName, err)
	}
	removed := s.removed(p.state.services)
	p.relay.targets.put(list, s.commit(), time.Now())
	p.relay.reset(removed)
	p.relay.setNode(plan.Node)
	return nil
}
