// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"fmt"
	"net/netip"
	"slices"

	"signalbox/internal/tcprelay"
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Dataplane is the userspace mode.
type Dataplane struct{ proxier.ModeDefaults }

var _ proxier.Mode = Dataplane{}

// Name implements proxier.Mode.
func (Dataplane) Name() string { return Mode }

// New implements proxier.Mode.
func (Dataplane) New(o proxier.Options) (proxier.Proxier, error) { return New(o) }

// Written implements proxier.Mode.
func (Dataplane) Written(f plan.Family) (found bool, taken proxier.TakenOver, err error) {
	found, err = access.HasTable(f, tableName)
	return found, proxier.TakenOver{}, err
}

// Traits implements proxier.Mode.
func (Dataplane) Traits() proxier.Traits {
	return proxier.Traits{Localhost: proxier.LocalhostByRelay, RelaysByRules: true, GuardsClusterIPs: true, Refused: refused}
}

// Supported implements proxier.Mode. This node's kernel tries all that the mode needs.
func (Dataplane) Supported(f plan.Family) error {
	missing := func(what, remedy string, err error) error {
		return &proxier.UnsupportedError{Mode: Mode, Family: f, Missing: what, Remedy: remedy, Err: err}
	}
	rules := ruleset{access.Rules{IPFamily: nft.FamilyOf(f), Node: plan.Node{
		LocalPods:     plan.LocalPods{Interface: "probe0", InterfacePrefix: "probe"},
		NodePortAddrs: plan.NodePortAddrs{All: true},
	}}, answersMark(proxier.DefaultMasqueradeMark), firstPorts}
	if err := access.Supported(Mode, f, makeSets(), rules.chains()); err != nil {
		return err
	}
	r, err := newRoutes(f, answersMark(proxier.DefaultMasqueradeMark))
	if err == nil {
		err = r.try()
		r.close()
	}
	if err != nil {
		return missing("routing by rules", "the kernel needs CONFIG_IP_MULTIPLE_TABLES and CONFIG_IPV6_MULTIPLE_TABLES; IPv6 must not be disabled", err)
	}
	if err := trySockets(f); err != nil {
		return missing("a socket for redirected traffic", "run as root; for IPv6 it must not be disabled", err)
	}
	return nil
}

// trySockets opens sockets with the relay's options. The kernel chooses their ports:
// at the relay's own ports they would take connections from a running relay.
func trySockets(f plan.Family) error {
	at := netip.AddrPortFrom(plan.Unspecified(f), 0)
	t, err := tcprelay.ListenTCP(at)
	if err != nil {
		return err
	}
	defer t.Close()
	u, err := tcprelay.ListenUDP(at, udpOptions(f)...)
	if err != nil {
		return err
	}
	return u.Close()
}

// Cleanup implements proxier.Mode. It removes the table, the routes and their rule.
// Connections end with the relay, and not with its rules; see
// proxier.Traits.RelaysByRules.
func (Dataplane) Cleanup(f plan.Family, _ bool) (removed bool, draining int, err error) {
	table, err := access.DropTable(f, tableName)
	if err != nil {
		return false, 0, err
	}
	r, err := newRoutes(f, 0)
	if err != nil {
		return table, 0, err
	}
	defer r.close()
	routes, err := r.remove()
	if err != nil {
		return table || routes, 0, fmt.Errorf("remove the relay's routes of %s: %w", f, err)
	}
	return table || routes, 0, nil
}

// Render implements proxier.Mode. It numbers frontends from 0.
func (Dataplane) Render(opts proxier.Options, plan *plan.Plan) (string, error) {
	f := nft.FamilyOf(opts.Family)
	rules := ruleset{access.Rules{IPFamily: f, Node: plan.Node}, answersMark(opts.MasqueradeMark), firstPorts}
	if err := access.ValidateNode(rules.IPFamily, rules.Node); err != nil {
		return "", err
	}
	st := newState(f)
	st.pool.StartAt(0)
	s, err := st.prepare(plan, plan.Names())
	if err != nil {
		return "", err
	}
	return nft.RenderTable(f, tableName, nil, makeSets(), slices.Concat(s.Add, rules.NodeElements()), rules.chains()), nil
}
