// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"signalbox/daemon/nodelock"
	"signalbox/kubeproxy"
	"signalbox/modes"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// foreignRules removes what other proxies have written on this node to serve Services:
// kube-proxy in any mode, and signalbox in other modes. Nothing is removed before this
// mode serves, so a new connection always finds rules.
//
// A kube-proxy that is about to end may write its rules once more, and leave them. So
// for a while they are looked for and removed again. The rules of a kube-proxy that
// starts later stay: they come before this mode's, and kube-proxy serves the node.
type foreignRules struct {
	foreignRulesOptions
	// taken are the objects of kube-proxy that this mode has taken over.
	taken map[plan.Family]proxier.TakenOver

	mu sync.Mutex // guards failed and draining
	// failed are removals that failed and are repeated, by what they remove.
	failed map[plan.Family]map[string]removal
	// draining are removals that wait for the end of connections, by what they
	// remove.
	draining map[plan.Family]map[string]removal

	// Only the goroutine of run uses the fields that follow.

	// hadKubeProxy are the families in which kube-proxy had rules.
	hadKubeProxy map[plan.Family]bool
	// removeUntil is the deadline for removing them again.
	removeUntil time.Time
	// logged are the families in which the log has named rules that stay.
	logged map[plan.Family]bool
}

// foreignRulesOptions is what foreignRules works with.
type foreignRulesOptions struct {
	// choice and proxiers are the mode at work.
	choice   modes.Choice
	proxiers map[plan.Family]proxier.Proxier
	// fullWrite requests a full write of this mode's rules.
	fullWrite func()
	// drained waits until no connection passes through the relays of an earlier
	// configuration; false if its context ends first.
	drained func(context.Context) bool
	// present is called with whether foreign rules may be in force.
	present func(family plan.Family, is bool)
	log     *slog.Logger
}

func newForeignRules(opts foreignRulesOptions) *foreignRules {
	f := &foreignRules{foreignRulesOptions: opts, taken: map[plan.Family]proxier.TakenOver{}, draining: map[plan.Family]map[string]removal{}, failed: map[plan.Family]map[string]removal{}}
	for family, p := range opts.proxiers {
		f.taken[family] = p.TakenOver()
	}
	return f
}

const (
	firstCheck   = 5 * time.Second
	longestPause = time.Minute
	// swapTime is how long a kube-proxy that served before may still run. By default,
	// Kubernetes gives a Pod a quarter of it to end.
	swapTime = 2 * time.Minute
)

// run removes all foreign rules, and then those that come back, until ctx ends.
func (f *foreignRules) run(ctx context.Context, lock *nodelock.Lock) {
	f.removeAll(ctx)
	f.reportPresent()
	returnMemory()
	var late sync.WaitGroup
	defer late.Wait()
	late.Go(func() {
		if lock.WaitForPredecessors(ctx) && f.drained(ctx) {
			f.removeRelay()
		}
	})
	pause := firstCheck
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, longestPause)
		for _, family := range f.choice.Families {
			f.removeAgain(family)
			if f.check(ctx, family) {
				pause = firstCheck
			}
		}
		f.reportPresent()
	}
}

func (f *foreignRules) removeAll(ctx context.Context) {
	todo := signalboxRemovals(f.others(false), true)
	f.hadKubeProxy, f.logged = map[plan.Family]bool{}, map[plan.Family]bool{}
	f.removeUntil = time.Now().Add(swapTime)
	f.mu.Lock()
	f.failed, f.draining = map[plan.Family]map[string]removal{}, map[plan.Family]map[string]removal{}
	f.mu.Unlock()
	for _, family := range f.choice.Families {
		f.remove(family, todo)
		f.hadKubeProxy[family] = f.kubeProxyWrote(ctx, family)
		f.remove(family, f.kubeProxy(family))
	}
}

// removeRelay removes the rules that lead to a relay. That comes last, because open
// connections need these rules and routes until the relay ends. New connections obey
// other modes' rules, which come first.
func (f *foreignRules) removeRelay() {
	for _, family := range f.choice.Families {
		f.remove(family, signalboxRemovals(f.others(true), true))
	}
}

// others lists the modes that do not serve: with relaying those whose rules lead to a
// relay, otherwise the rest.
func (f *foreignRules) others(relaying bool) []proxier.Mode {
	return slices.DeleteFunc(slices.Clone(modes.All), func(m proxier.Mode) bool {
		return m.Name() == f.choice.Mode.Name() || m.Traits().RelaysByRules != relaying
	})
}

// kubeProxy lists the removals of kube-proxy's rules while this mode serves.
func (f *foreignRules) kubeProxy(family plan.Family) []removal {
	return kubeProxyRemovals(f.taken[family], true)
}

// recordDraining keeps a removal that waits for the end of connections, and logs it
// once.
func (f *foreignRules) recordDraining(family plan.Family, r removal, servers int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, known := f.draining[family][r.what]
	switch {
	case servers == 0:
		delete(f.draining[family], r.what)
		return
	case !known:
		f.log.Info("virtual servers have connections; they are removed when the last has ended", "of", r.owner, "family", family.String(), "servers", servers)
	}
	if f.draining[family] == nil {
		f.draining[family] = map[string]removal{}
	}
	f.draining[family][r.what] = r
}

// removeDrained repeats the removals that wait for the end of connections, of kube-
// proxy's objects or of signalbox's.
func (f *foreignRules) removeDrained(family plan.Family, kubeProxy bool) {
	f.mu.Lock()
	todo := slices.Collect(maps.Values(f.draining[family]))
	f.mu.Unlock()
	f.remove(family, slices.DeleteFunc(todo, func(r removal) bool { return r.kubeProxy != kubeProxy }))
}

func (f *foreignRules) remove(family plan.Family, todo []removal) {
	for _, r := range todo {
		removed, draining, err := r.do(family)
		f.recordDraining(family, r, draining)
		known := f.recordFailure(family, r, err)
		switch {
		case removed, err == nil && known:
			f.log.Info("foreign rules removed", "what", r.what, "family", family.String(), "retry", known)
		case err == nil:
			f.log.Debug("no foreign rules to remove", "what", r.what, "family", family.String())
		}
		if err != nil && !known {
			f.log.Warn("foreign rules cannot be removed and may still be obeyed; trying again", "family", family.String(), "error", err)
		}
	}
}

// recordFailure keeps a removal that failed, and says whether it failed before, too.
func (f *foreignRules) recordFailure(family plan.Family, r removal, err error) (known bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, known = f.failed[family][r.what]
	switch {
	case err == nil && known:
		delete(f.failed[family], r.what)
	case err != nil && f.failed[family] == nil:
		f.failed[family] = map[string]removal{r.what: r}
	case err != nil:
		f.failed[family][r.what] = r
	}
	return known
}

// removeAgain repeats the removals that failed. Those of kube-proxy's rules end with
// removeUntil: later the rules may be of another kube-proxy.
func (f *foreignRules) removeAgain(family plan.Family) {
	f.mu.Lock()
	todo := slices.Collect(maps.Values(f.failed[family]))
	f.mu.Unlock()
	f.remove(family, slices.DeleteFunc(todo, func(r removal) bool {
		return r.kubeProxy && time.Now().After(f.removeUntil)
	}))
}

// reportPresent reports the families with rules that could not be removed, or that are
// left to a kube-proxy.
func (f *foreignRules) reportPresent() {
	for _, family := range f.choice.Families {
		f.mu.Lock()
		failed := len(f.failed[family]) > 0
		f.mu.Unlock()
		f.present(family, failed || f.logged[family])
	}
}

// check removes kube-proxy's rules if they are back, and requests a full write if
// another program replaced this mode's own.
func (f *foreignRules) check(ctx context.Context, family plan.Family) (found bool) {
	f.removeDrained(family, false)
	if f.kubeProxyWrote(ctx, family) {
		return f.handleKubeProxy(family)
	}
	f.removeDrained(family, true)
	f.logged[family] = false
	if intact, err := f.proxiers[family].Intact(ctx); err == nil && !intact {
		found = true
		f.log.Warn("another program has replaced the rules of Services; a full write follows", "family", family.String())
		f.fullWrite()
	}
	return found
}

// handleKubeProxy removes the rules of a kube-proxy that served before, and logs those
// of another.
func (f *foreignRules) handleKubeProxy(family plan.Family) (removed bool) {
	if f.hadKubeProxy[family] && time.Now().Before(f.removeUntil) {
		f.log.Warn("kube-proxy has written its rules again, and they are removed again; does it still run on this node?", "family", family.String())
		f.remove(family, f.kubeProxy(family))
		if f.taken[family].IPTables != "" {
			f.fullWrite()
		}
		return true
	}
	f.mu.Lock() // kube-proxy uses its virtual servers again
	maps.DeleteFunc(f.draining[family], func(_ string, r removal) bool { return r.kubeProxy })
	f.mu.Unlock()
	if !f.logged[family] {
		f.logged[family] = true
		f.log.Warn("kube-proxy has written rules on this node, and they come before those of signalbox; end one of the two, and remove what it leaves with `signalbox cleanup` or `signalbox cleanup --kube-proxy`",
			"family", family.String())
	}
	return false
}

// kubeProxyWrote looks for what kube-proxy has in each of its modes. What still drains
// does not count: kube-proxy wrote it before.
func (f *foreignRules) kubeProxyWrote(ctx context.Context, family plan.Family) bool {
	f.mu.Lock()
	draining := maps.Clone(f.draining[family])
	f.mu.Unlock()
	return slices.ContainsFunc(kubeproxy.Remnants(), func(r proxier.Remnant) bool {
		_, drains := draining[r.What]
		return !drains && r.Found(ctx, family, f.taken[family])
	})
}

// Cleanup removes from the kernel what signalbox has put there, in every mode
// and both families, and with kubeProxy also what kube-proxy has, in each of
// its modes; nothing of anybody else's. Kernel settings (sysctls) and tracked
// connections stay, and so does the kubelet's share of the iptables rules. It
// needs no API server, only the network namespace of the node.
//
// It returns what was there and went, one text each. Whatever fails, the rest is
// removed all the same; the error names what is left and why.
func Cleanup(kubeProxy bool) (removed []string, err error) {
	todo := signalboxRemovals(modes.All, false)
	if kubeProxy {
		todo = append(kubeProxyRemovals(proxier.TakenOver{}, false), todo...)
	}
	var left []error
	for _, r := range todo {
		for _, family := range plan.Families {
			some, _, err := r.do(family)
			if some {
				removed = append(removed, fmt.Sprintf("%s, for %s", r.what, family))
			}
			left = append(left, err)
		}
	}
	return removed, errors.Join(left...)
}

// removal takes one thing out of the kernel.
type removal struct {
	what string
	// owner is whose it is.
	owner string
	// remove has the results of proxier.Mode's Cleanup.
	remove func(plan.Family) (removed bool, draining int, err error)
	// kubeProxy is that it was kube-proxy's.
	kubeProxy bool
}

// do returns whether anything went, how much waits for the end of its connections,
// and an error that names what is left. What this machine cannot have is not left.
func (r removal) do(family plan.Family) (removed bool, draining int, err error) {
	removed, draining, err = r.remove(family)
	var unsupported *proxier.UnsupportedError
	switch {
	case err == nil, errors.As(err, &unsupported):
		return removed, draining, nil
	case errors.Is(err, proxier.ErrUnknownOwner):
		return removed, draining, err // of r.what or not, as it says
	}
	return removed, draining, fmt.Errorf("%s may be left for %s: %w", r.what, family, err)
}

// signalboxRemovals are those of modes.
func signalboxRemovals(list []proxier.Mode, drain bool) []removal {
	var all []removal
	for _, m := range list {
		all = append(all, removal{
			what: "what signalbox's mode " + m.Name() + " wrote", owner: "the " + m.Name() + " mode",
			remove: func(f plan.Family) (bool, int, error) { return m.Cleanup(f, drain) },
		})
	}
	return all
}

// kubeProxyRemovals remove what kube-proxy has written and a mode at work has not
// taken over.
func kubeProxyRemovals(taken proxier.TakenOver, drain bool) []removal {
	var all []removal
	for _, r := range kubeproxy.Remnants() {
		all = append(all, removal{
			what: r.What, owner: "kube-proxy", kubeProxy: true,
			remove: func(f plan.Family) (bool, int, error) { return r.Remove(f, taken, drain) },
		})
	}
	return all
}
