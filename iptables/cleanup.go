// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"signalbox/internal/xtables"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// This file removes what this mode and kube-proxy wrote, and tells one from
// the other.

// ownedChains are what a proxy has in the tables: chains, and rules in built-in
// chains that jump to them.
type ownedChains struct {
	has   func(table, chain string) bool
	jumps []jump
	// keepUsed keeps the rules of chains that other software uses; otherwise
	// such a chain is emptied.
	keepUsed bool
	// names has the chains that the jumps need, if their names are known: a table
	// without any of them has nothing to remove.
	names []string
}

var nothing = ownedChains{has: func(_, _ string) bool { return false }}

// ours is what this mode writes.
var ours = ownedChains{
	has: func(table, chain string) bool {
		i := slices.Index(tableNames[:], table)
		return i >= 0 && (isServiceChain(chain) || slices.Contains(fixedChains[i], chain))
	},
	jumps: jumps,
}

// uniquelyOurs are the chains with names that kube-proxy never gives.
var uniquelyOurs = ownedChains{
	has: func(table, chain string) bool {
		if !slices.Contains(tableNames[:], table) {
			return false
		}
		return chain == externalPortsChain || chain == hairpinChain || chain == routeSourcesChain || strings.HasPrefix(chain, digestPrefix) ||
			strings.HasPrefix(chain, probeChain) || // of a process that was killed
			slices.ContainsFunc(treeShapes[:], func(shape treeShape) bool { return strings.HasPrefix(chain, shape.prefix) })
	},
	keepUsed: true,
}

// canaryChain is in three tables while kube-proxy runs in iptables mode:
// kube-proxy notices by its absence that somebody flushed its rules.
const canaryChain = "KUBE-PROXY-CANARY"

var chainsOfOtherModes = []string{
	canaryChain,
	// ipvs mode
	"KUBE-LOAD-BALANCER", "KUBE-NODE-PORT", "KUBE-SOURCE-RANGES-FIREWALL", "KUBE-IPVS-FILTER", "KUBE-IPVS-OUT-FILTER",
	// userspace mode, up to Kubernetes 1.25
	"KUBE-PORTALS-CONTAINER", "KUBE-PORTALS-HOST", "KUBE-NODEPORT-CONTAINER", "KUBE-NODEPORT-HOST", "KUBE-NODEPORT-NON-LOCAL",
}

// otherModes is what kube-proxy has in the tables in any mode, and this mode
// never has.
var otherModes = ownedChains{
	has:   func(_, chain string) bool { return slices.Contains(chainsOfOtherModes, chain) },
	names: chainsOfOtherModes,
	jumps: []jump{
		{filter, "INPUT", proxyFirewallChain, false, "kube-proxy firewall rules"},
		{filter, "FORWARD", proxyFirewallChain, false, "kube-proxy firewall rules"},
		{filter, "INPUT", "KUBE-NODE-PORT", false, "kubernetes health check rules"},
		{filter, "INPUT", "KUBE-IPVS-FILTER", false, "kubernetes ipvs access filter"},
		{filter, "OUTPUT", "KUBE-IPVS-OUT-FILTER", false, "kubernetes ipvs access filter"},
		{nat, "PREROUTING", "KUBE-PORTALS-CONTAINER", false, "handle ClusterIPs; NOTE: this must be before the NodePort rules"},
		{nat, "OUTPUT", "KUBE-PORTALS-HOST", false, "handle ClusterIPs; NOTE: this must be before the NodePort rules"},
		{nat, "PREROUTING", "KUBE-NODEPORT-CONTAINER", false, "handle service NodePorts; NOTE: this must be the last rule in the chain"},
		{nat, "OUTPUT", "KUBE-NODEPORT-HOST", false, "handle service NodePorts; NOTE: this must be the last rule in the chain"},
		{filter, "INPUT", "KUBE-NODEPORT-NON-LOCAL", false, "Ensure that non-local NodePort traffic can flow"},
	},
}

// kubeProxys is all that kube-proxy has in the tables, in any of its modes.
var kubeProxys = ownedChains{
	has:   func(table, chain string) bool { return ours.has(table, chain) || otherModes.has(table, chain) },
	jumps: slices.Concat(jumps, otherModes.jumps),
}

// markerRules are rules of which this mode always has one in the filter table
// and kube-proxy never: they tell who filled the chains that both name alike.
var markerRules = []string{
	"-A " + servicesChain + toExternalServices,
	"-A " + servicesChain + " -j " + externalServicesChain, // of earlier versions
}

// wrote says whether the rules of Services are this mode's.
func wrote(ctx context.Context, t *xtables.Tools) (bool, error) {
	if !t.HasChain(ctx, filter.String(), servicesChain) {
		return false, nil
	}
	rules, err := t.ListChain(ctx, filter.String(), servicesChain)
	if err != nil {
		return false, fmt.Errorf("find out who wrote the rules: %w", err)
	}
	return slices.ContainsFunc(markerRules, func(marker string) bool { return slices.Contains(rules, marker) }), nil
}

// KubeProxy implements proxier.Mode. Rules of kube-proxy's ipvs mode use its ipsets,
// so package modes has this mode before ipvs.
func (Dataplane) KubeProxy() []proxier.Remnant {
	return []proxier.Remnant{{
		What: "kube-proxy's iptables rules",
		Found: func(ctx context.Context, f plan.Family, taken proxier.TakenOver) bool {
			return hasKubeProxy(ctx, f, Backend(taken.IPTables))
		},
		Remove: func(f plan.Family, taken proxier.TakenOver, _ bool) (removed bool, draining int, err error) {
			removed, err = cleanupKubeProxy(f, Backend(taken.IPTables))
			return removed, 0, err
		},
	}}
}

// hasKubeProxy says whether kube-proxy has written rules since they were last
// removed. A running kube-proxy writes changes at once, and its canaries half a
// minute later. In the active backend the names of the other chains do not tell.
//
// The daemon asks every minute. So the kernel is asked first, and the tools only
// about a chain that it names.
func hasKubeProxy(ctx context.Context, f plan.Family, active Backend) bool {
	return slices.ContainsFunc(xtables.Backends, func(b Backend) bool {
		return hasChain(ctx, f, b, "mangle", canaryChain) || b != active && hasChain(ctx, f, b, nat.String(), servicesChain)
	})
}

func hasChain(ctx context.Context, f plan.Family, b Backend, table, chain string) bool {
	if !xtables.MayHaveChain(f, b, table, chain) {
		return false
	}
	t, err := xtables.Find(f, b)
	return err == nil && t.HasChain(ctx, table, chain)
}

// Cleanup removes from both variants what this mode wrote: the jumps and the
// chains they lead to. The chains that kube-proxy fills too are its own, and
// stay, if it has filled them since or has started and is about to. A chain
// that rules of other software use keeps its name; KUBE-MARK-MASQ and
// KUBE-POSTROUTING then keep their rules too, because without these the other
// rules would change their meaning. KUBE-FIREWALL, which the kubelet shares,
// and the sysctl route_localnet stay as they are.
//
// Without the tools the error is an *unknownOwnerError if the kernel has such
// chains, and a *proxier.UnsupportedError if there is nothing to remove.
func Cleanup(f plan.Family) (removed bool, err error) {
	return cleanup(f, withoutTools, func(ctx context.Context, t *xtables.Tools) (ownedChains, error) {
		written, err := wrote(ctx, t)
		switch {
		case err != nil || written && t.HasChain(ctx, "mangle", canaryChain):
			return nothing, err
		case written:
			return ours, nil
		}
		return uniquelyOurs, nil
	})
}

// cleanupKubeProxy removes from both variants what kube-proxy wrote, in any of
// its modes, and leaves what Cleanup leaves. In the active backend ("" for
// none), this mode has filled kube-proxy's chains with its own rules, and only
// the others go. Without the tools the error is a *proxier.UnsupportedError:
// the kernel may have rules of signalbox, which Cleanup reports.
func cleanupKubeProxy(f plan.Family, active Backend) (removed bool, err error) {
	withoutTools := func(f plan.Family) error { return xtables.Missing(f) }
	return cleanup(f, withoutTools, func(_ context.Context, t *xtables.Tools) (ownedChains, error) {
		if t.Backend == active {
			return otherModes, nil
		}
		return kubeProxys, nil
	})
}

// cleanup removes from each installed variant the chains that are to go.
func cleanup(f plan.Family, withoutTools func(plan.Family) error, toRemove func(context.Context, *xtables.Tools) (ownedChains, error)) (removed bool, err error) {
	var failed []error
	ctx, found := context.Background(), false
	for _, b := range xtables.Backends {
		t, err := xtables.Find(f, b)
		if err != nil {
			continue
		}
		found = true
		owned, err := toRemove(ctx, t)
		if err == nil {
			var some bool
			some, err = remove(ctx, t, owned)
			removed = removed || some
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("clean up %s iptables, %s: %w", b, f, err))
		}
	}
	if !found {
		return false, withoutTools(f)
	}
	return removed, errors.Join(failed...)
}

// unknownOwnerError says that the kernel has chains whose names this mode and
// kube-proxy share. Without the iptables tools nobody can tell who wrote them, or
// remove them.
type unknownOwnerError struct {
	Family plan.Family
	// Found says which chains.
	Found string
}

// Error says it in one sentence.
func (e *unknownOwnerError) Error() string {
	return fmt.Sprintf("%s, and without the program %s nobody can tell whether signalbox or kube-proxy wrote them, nor remove them: use the image signalbox-iptables, or install the package iptables; until then they may come before other rules, and nobody keeps them up to date",
		e.Found, xtables.CommandName(e.Family))
}

// Is lets errors.Is find proxier.ErrUnknownOwner.
func (*unknownOwnerError) Is(target error) bool { return target == proxier.ErrUnknownOwner }

// withoutTools is the error of Cleanup on a node without iptables.
func withoutTools(f plan.Family) error {
	if names := xtables.LegacyTables(f); len(names) > 0 {
		return &unknownOwnerError{f, fmt.Sprintf("the kernel may have iptables rules for Services of %s (legacy, tables %s)", f, strings.Join(names, ", "))}
	}
	if xtables.HasNFTChain(f, nat.String(), servicesChain) {
		return &unknownOwnerError{f, fmt.Sprintf("the kernel has iptables rules for Services of %s (nft, chain %s)", f, servicesChain)}
	}
	return xtables.Missing(f)
}

// remove removes owned chains from every table that exists. It writes nothing
// if there are none, and removed is false. The filter table goes last: its
// marker rule lets the next cleanup finish a removal that was cut short.
func remove(ctx context.Context, t *xtables.Tools, o ownedChains) (removed bool, err error) {
	var script xtables.Script
	for _, table := range []string{"mangle", nat.String(), filter.String()} {
		if !slices.Contains(t.Tables(), table) || !o.mayBeIn(t, table) {
			continue
		}
		l, err := t.List(ctx, table, func(chain string) bool { return o.has(table, chain) })
		if err != nil {
			return false, err
		}
		chains, builtin, removes := removal(l, table, o)
		removed = removed || removes
		script.Add(table, chains, builtin...)
	}
	return removed, t.Unobserved(func() error { return t.Apply(ctx, script) })
}

// mayBeIn asks the kernel for chains with known names. A listing by the tools takes seconds
// where there are thousands of Services.
func (o *ownedChains) mayBeIn(t *xtables.Tools, table string) bool {
	return o.names == nil || slices.ContainsFunc(o.names, func(name string) bool {
		return xtables.MayHaveChain(t.Family, t.Backend, table, name)
	})
}

// removal removes the owned chains from a table, or empties those that other
// software uses. removes is false if it only empties chains, which may have
// been empty before.
func removal(l *xtables.Listing, table string, o ownedChains) (chains []chain, builtin []string, removes bool) {
	owned := func(rule string) bool { return o.hasJump(table, rule) }
	for _, rule := range l.Builtin {
		if owned(rule) {
			builtin = append(builtin, "-D "+strings.TrimPrefix(rule, "-A "))
		}
	}
	used := l.Used(owned)
	if !o.keepUsed && used[postroutingChain] {
		used[hairpinChain], used[routeSourcesChain] = true, true // its rules stay, and use these
	}
	for _, name := range l.Chains {
		switch {
		case !o.has(table, name):
		case !used[name]:
			chains = append(chains, xtables.Removal(name))
			removes = true
		case !o.keepUsed && name != markMasqChain && name != postroutingChain:
			chains = append(chains, chain{Name: name})
		}
	}
	return chains, builtin, removes || len(builtin) > 0
}

// hasJump says whether a rule of a built-in chain, as iptables-save writes it,
// is one of the jumps. The comment and the target tell: how the tools write the
// rest depends on their version.
func (o *ownedChains) hasJump(table, rule string) bool {
	return slices.ContainsFunc(o.jumps, func(j jump) bool {
		return j.table.String() == table && strings.HasPrefix(rule, "-A "+j.from+" ") &&
			xtables.JumpTarget(rule) == j.target && strings.Contains(rule, comment(j.comment)+" ")
	})
}

// staleChains are the chains of Services that earlier proxies may have left and
// that no rule of other software uses.
func staleChains(l *xtables.Listing) (names []string) {
	used := l.Used(nil)
	for _, name := range l.Chains {
		if isServiceChain(name) && !used[name] {
			names = append(names, name)
		}
	}
	return names
}
