package daemon

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"signalbox/kubeproxy"
	"signalbox/modes"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// leftovers removes what others have written to serve Services on this node:
// kube-proxy in any mode, and signalbox in other modes. Nothing is removed
// before this mode serves: new connections find the new rules first and the
// old ones gone after, never neither.
//
// A kube-proxy that is about to end may write its rules once more, and leave
// them. So those are looked for again for a while. What a kube-proxy writes
// that was started later stays: it is to have the node, and its rules come
// before this mode's.
type leftovers struct {
	leftoversOptions
	// taken are the objects of kube-proxy that this mode has taken over.
	taken map[plan.Family]proxier.TakenOver

	mu sync.Mutex // guards failed and draining
	// failed are removals that are to be done again, by what they remove.
	failed map[plan.Family]map[string]removal
	// draining are removals that wait for the end of connections, by what they
	// remove.
	draining map[plan.Family]map[string]removal

	// The goroutine's own: of which families kube-proxy had rules, until when
	// they are removed again, and of which it was said that they are there.
	had   map[plan.Family]bool
	until time.Time
	said  map[plan.Family]bool
}

// leftoversOptions is what leftovers work with.
type leftoversOptions struct {
	// choice and proxiers are the mode at work.
	choice   modes.Choice
	proxiers map[plan.Family]proxier.Proxier
	// resync has this mode's own rules written anew.
	resync func()
	// drained waits until relays that this process had under an earlier
	// configuration have no connections any more; false if its context ends
	// first.
	drained func(context.Context) bool
	// present is told whether something of others is there that may be obeyed.
	present func(family plan.Family, is bool)
	log     *slog.Logger
}

func newLeftovers(opts leftoversOptions) *leftovers {
	l := &leftovers{leftoversOptions: opts, taken: map[plan.Family]proxier.TakenOver{}, draining: map[plan.Family]map[string]removal{}, failed: map[plan.Family]map[string]removal{}}
	for family, p := range opts.proxiers {
		l.taken[family] = p.TakenOver()
	}
	return l
}

const (
	firstLook = 5 * time.Second
	lastLook  = time.Minute
	// swapTime is how long a kube-proxy that served before may run on: several
	// times what Kubernetes gives a Pod to end by default.
	swapTime = 2 * time.Minute
)

// run removes everything once, and then what comes back, until ctx ends.
func (l *leftovers) run(ctx context.Context, s *seat) {
	l.removeAll(ctx)
	l.tellPresent()
	returnMemory()
	var late sync.WaitGroup
	defer late.Wait()
	late.Go(func() {
		if s.alone(ctx) && l.drained(ctx) {
			l.removeRelay()
		}
	})
	pause := firstLook
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, lastLook)
		for _, family := range l.choice.Families {
			l.removeAgain(family)
			if l.look(ctx, family) {
				pause = firstLook
			}
		}
		l.tellPresent()
	}
}

func (l *leftovers) removeAll(ctx context.Context) {
	todo := signalboxRemovals(l.others(false), true)
	l.had, l.said = map[plan.Family]bool{}, map[plan.Family]bool{}
	l.until = time.Now().Add(swapTime)
	l.mu.Lock()
	l.failed, l.draining = map[plan.Family]map[string]removal{}, map[plan.Family]map[string]removal{}
	l.mu.Unlock()
	for _, family := range l.choice.Families {
		l.remove(family, todo)
		l.had[family] = l.kubeProxyWrote(ctx, family)
		l.remove(family, l.kubeProxy(family))
	}
}

// removeRelay removes what leads to a relay. That comes last: connections that
// it has open need its rules and routes until it ends. New ones do not come to
// it, as other modes' rules are looked at first.
func (l *leftovers) removeRelay() {
	for _, family := range l.choice.Families {
		l.remove(family, signalboxRemovals(l.others(true), true))
	}
}

// others are the modes that do not serve: those whose rules lead to a relay, or the
// rest.
func (l *leftovers) others(relaying bool) []proxier.Mode {
	return slices.DeleteFunc(slices.Clone(modes.All), func(m proxier.Mode) bool {
		return m.Name() == l.choice.Mode.Name() || m.Traits().RelaysByRules != relaying
	})
}

// kubeProxy is what kube-proxy's rules are removed by while this mode serves.
func (l *leftovers) kubeProxy(family plan.Family) []removal {
	return kubeProxyRemovals(l.taken[family], true)
}

// noteDraining keeps a removal that waits for the end of connections, and logs the
// first time that it does.
func (l *leftovers) noteDraining(family plan.Family, r removal, servers int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, known := l.draining[family][r.what]
	switch {
	case servers == 0:
		delete(l.draining[family], r.what)
		return
	case !known:
		l.log.Info("virtual servers of "+r.owner+" have connections; they are removed when the last has ended", "family", family.String(), "servers", servers)
	}
	if l.draining[family] == nil {
		l.draining[family] = map[string]removal{}
	}
	l.draining[family][r.what] = r
}

// removeDrained does again the removals that wait for the end of connections, of
// kube-proxy's objects or of signalbox's.
func (l *leftovers) removeDrained(family plan.Family, kubeProxy bool) {
	l.mu.Lock()
	todo := slices.Collect(maps.Values(l.draining[family]))
	l.mu.Unlock()
	l.remove(family, slices.DeleteFunc(todo, func(r removal) bool { return r.kubeProxy != kubeProxy }))
}

func (l *leftovers) remove(family plan.Family, todo []removal) {
	for _, r := range todo {
		removed, draining, err := r.do(family)
		l.noteDraining(family, r, draining)
		if removed {
			l.log.Info("removed what others had written", "what", r.what, "family", family.String())
		} else if err == nil {
			l.log.Debug("nothing of others is there to remove", "what", r.what, "family", family.String())
		}
		if known := l.note(family, r, err); err != nil && !known {
			l.log.Warn("what others wrote could not be removed and may still be obeyed; trying again", "family", family.String(), "error", err)
		}
	}
}

// note keeps a removal that failed, and says whether its last one did, too.
func (l *leftovers) note(family plan.Family, r removal, err error) (known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, known = l.failed[family][r.what]
	switch {
	case err == nil && known:
		delete(l.failed[family], r.what)
		l.log.Info("removed, after it could not be at first", "what", r.what, "family", family.String())
	case err != nil && l.failed[family] == nil:
		l.failed[family] = map[string]removal{r.what: r}
	case err != nil:
		l.failed[family][r.what] = r
	}
	return known
}

// removeAgain does again what failed. That a kube-proxy wrote is tried for as
// long as one that served before may run: later it could be another's.
func (l *leftovers) removeAgain(family plan.Family) {
	l.mu.Lock()
	todo := slices.Collect(maps.Values(l.failed[family]))
	l.mu.Unlock()
	l.remove(family, slices.DeleteFunc(todo, func(r removal) bool {
		return r.kubeProxy && time.Now().After(l.until)
	}))
}

// tellPresent tells of what could not be removed and of a kube-proxy's rules
// that are left to it.
func (l *leftovers) tellPresent() {
	for _, family := range l.choice.Families {
		l.mu.Lock()
		failed := len(l.failed[family]) > 0
		l.mu.Unlock()
		l.present(family, failed || l.said[family])
	}
}

// look removes kube-proxy's rules if they are back, and has this mode's own
// written again if somebody else replaced them.
func (l *leftovers) look(ctx context.Context, family plan.Family) (found bool) {
	l.removeDrained(family, false)
	if l.kubeProxyWrote(ctx, family) {
		return l.dealWithKubeProxy(family)
	}
	l.removeDrained(family, true)
	l.said[family] = false
	if intact, err := l.proxiers[family].Intact(ctx); err == nil && !intact {
		found = true
		l.log.Warn("another program has replaced the rules of Services; they are written anew", "family", family.String())
		l.resync()
	}
	return found
}

// dealWithKubeProxy removes its rules, if it is one that served before.
func (l *leftovers) dealWithKubeProxy(family plan.Family) (removed bool) {
	if l.had[family] && time.Now().Before(l.until) {
		l.log.Warn("kube-proxy has written its rules again, and they are removed again; does it still run on this node?", "family", family.String())
		l.remove(family, l.kubeProxy(family))
		if l.taken[family].IPTables != "" {
			l.resync()
		}
		return true
	}
	l.mu.Lock() // what is left of its virtual servers serves it again
	maps.DeleteFunc(l.draining[family], func(_ string, r removal) bool { return r.kubeProxy })
	l.mu.Unlock()
	if !l.said[family] {
		l.said[family] = true
		l.log.Warn("kube-proxy has written rules on this node, and they come before those of signalbox; end one of the two, and remove what it leaves with `signalbox cleanup` or `signalbox cleanup --kube-proxy`",
			"family", family.String())
	}
	return false
}

// kubeProxyWrote looks for what kube-proxy has in each of its modes. What is there
// because it drains was not written since.
func (l *leftovers) kubeProxyWrote(ctx context.Context, family plan.Family) bool {
	l.mu.Lock()
	draining := maps.Clone(l.draining[family])
	l.mu.Unlock()
	return slices.ContainsFunc(kubeproxy.Remnants(), func(r proxier.Remnant) bool {
		_, drains := draining[r.What]
		return !drains && r.Found(ctx, family, l.taken[family])
	})
}
