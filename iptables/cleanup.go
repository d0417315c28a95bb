package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"signalbox/nftables"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// belongings are what a proxy has in the tables: chains, and rules in built-in
// chains that lead to them.
type belongings struct {
	owns  func(table, chain string) bool
	jumps []jump
	// leaveUsed leaves alone what others use; else it is emptied.
	leaveUsed bool
}

// ours is what this mode writes.
var ours = belongings{
	owns: func(table, chain string) bool {
		i := slices.Index(tableNames[:], table)
		return i >= 0 && (isServiceChain(chain) || slices.Contains(fixedChains[i], chain))
	},
	jumps: jumps,
}

// oursAlone is what no kube-proxy would name like that, and none removes from
// the filter table.
var oursAlone = belongings{
	owns: func(table, chain string) bool {
		if table != nat.String() && table != filter.String() {
			return false
		}
		own := func(shape treeShape) bool { return strings.HasPrefix(chain, shape.prefix) }
		return chain == externalPortsChain || chain == hairpinChain || chain == routeSourcesChain || strings.HasPrefix(chain, markPrefix) || slices.ContainsFunc(treeShapes[:], own)
	},
	leaveUsed: true,
}

// signatures are rules of which this mode has always one in the filter table and
// kube-proxy never: by them one tells whose the chains are that both name alike.
var signatures = []string{
	"-A " + servicesChain + toExternalServices,
	"-A " + servicesChain + " -j " + externalServicesChain, // of earlier versions
}

// Cleanup removes from both variants what this mode wrote: the jumps and the
// chains they lead to. Where kube-proxy has filled these chains since, or was
// started and is about to, they are its own, and stay. A chain that rules of other software use keeps its name;
// KUBE-MARK-MASQ and KUBE-POSTROUTING then keep their rules too, without which
// those rules would change their meaning. KUBE-FIREWALL, which the kubelet
// shares, stays as it is, and so does the sysctl route_localnet.
//
// Without the tools there is nothing to remove where there are no such chains,
// and the error is a *proxier.UnsupportedError; else it is an *UnknownOwnerError.
func Cleanup(f plan.Family) (removed bool, err error) {
	removed, err = cleanup(f, func(ctx context.Context, t *tools) (bool, error) {
		signed, err := t.signed(ctx)
		if err != nil || signed && t.hasChain(ctx, "mangle", canaryChain) {
			return false, err
		}
		if !signed {
			return t.remove(ctx, oursAlone)
		}
		return t.remove(ctx, ours)
	})
	if errors.Is(err, errNoTools) {
		return false, withoutTools(f)
	}
	return removed, err
}

// errNoTools is that no variant of the programs is here.
var errNoTools = errors.New("no variant of iptables is installed")

// cleanup runs fn for both variants, which says whether it removed anything.
func cleanup(f plan.Family, fn func(context.Context, *tools) (bool, error)) (removed bool, err error) {
	var failed []error
	found := false
	for _, b := range []Backend{NFT, Legacy} {
		t, err := findTools(f, b, defaultWait)
		if err != nil {
			continue
		}
		found = true
		some, err := fn(context.Background(), t)
		removed = removed || some
		if err != nil {
			failed = append(failed, fmt.Errorf("clean up %s iptables, %s: %w", b, f, err))
		}
	}
	if !found {
		return false, errNoTools
	}
	return removed, errors.Join(failed...)
}

// missingTools is the error where the programs are needed.
func missingTools(f plan.Family, err error) *proxier.UnsupportedError {
	return &proxier.UnsupportedError{
		Mode: Mode, Family: f, Missing: "program " + commandName(f),
		Remedy: "install the package iptables, or use the image signalbox-iptables", Err: err,
	}
}

// UnknownOwnerError is that the kernel has chains of a name that both this mode
// and kube-proxy use, and that the programs are missing by which it could be
// told whose they are, and they could be removed.
type UnknownOwnerError struct {
	Family plan.Family
	// Found is what there is.
	Found string
}

// Error says it in one sentence.
func (e *UnknownOwnerError) Error() string {
	return fmt.Sprintf("%s, and without the program %s nobody can tell whether signalbox or kube-proxy wrote them, nor remove them: use the image signalbox-iptables, or install the package iptables; until then they may come before other rules, and nobody keeps them up to date",
		e.Found, commandName(e.Family))
}

// withoutTools tells a node that has no iptables from one that has rules
// nobody can remove.
func withoutTools(f plan.Family) error {
	legacy := tools{backend: Legacy, family: f}
	if names := legacy.tables(); len(names) > 0 {
		return &UnknownOwnerError{f, fmt.Sprintf("the kernel may have iptables rules for Services of %s (legacy, tables %s)", f, strings.Join(names, ", "))}
	}
	if held, err := nftables.HasChain(f, nat.String(), servicesChain); err == nil && held {
		return &UnknownOwnerError{f, fmt.Sprintf("the kernel has iptables rules for Services of %s (nft, chain %s)", f, servicesChain)}
	}
	return missingTools(f, nil)
}

// signed says whether the rules of Services are this mode's.
func (t *tools) signed(ctx context.Context) (bool, error) {
	if !slices.Contains(t.tables(), filter.String()) {
		return false, nil
	}
	l, err := t.list(ctx, filter.String())
	return err == nil && l.signed, err
}

// remove takes belongings out of every table that exists. Nothing is written
// where there are none, and removed is false. The filter table goes last: it holds the signature, by
// which a removal that was cut short is found and finished.
func (t *tools) remove(ctx context.Context, b belongings) (removed bool, err error) {
	w := &script{}
	for _, table := range []string{"mangle", nat.String(), filter.String()} {
		if !slices.Contains(t.tables(), table) {
			continue
		}
		l, err := t.listFor(ctx, table, func(chain string) bool { return b.owns(table, chain) })
		if err != nil {
			return false, err
		}
		edits, builtin, gone := l.removal(table, b)
		removed = removed || gone
		if len(edits)+len(builtin) > 0 {
			w.section(table, edits, builtin)
		}
	}
	return removed, t.apply(ctx, w)
}

// removal is what leaves nothing of b in the table, except for chains that
// others use. gone says whether anything goes: a chain that stays may have been
// empty before.
func (l *listing) removal(table string, b belongings) (edits []edit, builtin []string, gone bool) {
	used := make(map[string]bool)
	for _, line := range l.builtin {
		if b.leads(table, line) {
			builtin = append(builtin, "-D "+strings.TrimPrefix(line, "-A "))
		} else {
			used[jumpTarget(line)] = true
		}
	}
	if !b.leaveUsed && (used[postroutingChain] || l.referenced[postroutingChain]) {
		used[hairpinChain], used[routeSourcesChain] = true, true // by rules that stay
	}
	for _, name := range l.chains {
		switch {
		case !b.owns(table, name):
		case !used[name] && !l.referenced[name]:
			edits = append(edits, removal(name))
			gone = true
		case !b.leaveUsed && name != markMasqChain && name != postroutingChain:
			edits = append(edits, edit{name: name})
		}
	}
	return edits, builtin, gone || len(builtin) > 0
}

// leads says whether a rule of a built-in chain, as iptables-save writes it, is
// one of the belongings' jumps. The comment and the target tell: how the tools
// write the rest depends on their version.
func (b *belongings) leads(table, line string) bool {
	return slices.ContainsFunc(b.jumps, func(j jump) bool {
		return j.table.String() == table && strings.HasPrefix(line, "-A "+j.from+" ") &&
			jumpTarget(line) == j.target && strings.Contains(line, comment(j.comment)+" ")
	})
}
