package daemon

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"signalbox/iptables"
	"signalbox/ipvs"
	"signalbox/modes"
	"signalbox/nftables"
	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/userspace"
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
	// inUse is the variant of the iptables tools that this mode uses.
	inUse map[plan.Family]iptables.Backend

	mu sync.Mutex // guards failed
	// failed are removals that are to be done again, by what they remove.
	failed map[plan.Family]map[string]removal

	// The goroutine's own: of which families kube-proxy had rules, until when
	// they are removed again, and of which it was said that they are there.
	had   map[plan.Family]bool
	until time.Time
	said  map[plan.Family]bool
	// draining counts kube-proxy's virtual servers that have connections yet, and
	// ownDraining those of the ipvs mode.
	draining, ownDraining draining
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
	l := &leftovers{leftoversOptions: opts, inUse: map[plan.Family]iptables.Backend{}, failed: map[plan.Family]map[string]removal{}}
	for family, p := range opts.proxiers {
		l.inUse[family] = iptables.Backend(p.TakenOver().IPTables)
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
	others := slices.DeleteFunc(slices.Clone(modes.All), func(m modes.Mode) bool {
		return m.Name == l.choice.Mode.Name || m.Name == userspace.Mode || m.Name == ipvs.Mode
	})
	todo := signalboxRemovals(others)
	if l.choice.Mode.Name != ipvs.Mode {
		todo = append(todo, l.ownIPVS())
	}
	l.had, l.said = map[plan.Family]bool{}, map[plan.Family]bool{}
	l.draining, l.ownDraining = draining{}, draining{}
	l.until = time.Now().Add(swapTime)
	l.mu.Lock()
	l.failed = map[plan.Family]map[string]removal{}
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
	if l.choice.Mode.Name == userspace.Mode {
		return
	}
	relay := slices.DeleteFunc(slices.Clone(modes.All), func(m modes.Mode) bool { return m.Name != userspace.Mode })
	for _, family := range l.choice.Families {
		l.remove(family, signalboxRemovals(relay))
	}
}

// kubeProxy is what kube-proxy's rules are removed by while this mode serves.
func (l *leftovers) kubeProxy(family plan.Family) []removal {
	return kubeProxyRemovals(l.inUse[family], l.drainIPVS)
}

// ownIPVS is what the ipvs mode's rules and servers are removed by while another
// mode serves, without ending connections.
func (l *leftovers) ownIPVS() removal {
	return removal{what: "what signalbox's mode ipvs wrote", remove: func(family plan.Family) (removed bool, err error) {
		removed, n, err := ipvs.Drain(family)
		l.ownDraining.note(family, n, "the ipvs mode", l.log)
		return removed, err
	}}
}

// drainIPVS removes kube-proxy's virtual servers without ending connections.
func (l *leftovers) drainIPVS(family plan.Family) (removed bool, err error) {
	removed, n, err := ipvs.CleanupKubeProxy(family, l.choice.Mode.Name == ipvs.Mode, true)
	l.draining.note(family, n, "kube-proxy", l.log)
	return removed, err
}

// draining counts virtual servers that have connections yet.
type draining map[plan.Family]int

// note says when the first have.
func (d draining) note(family plan.Family, n int, owner string, log *slog.Logger) {
	if n > 0 && d[family] == 0 {
		log.Info("virtual servers of "+owner+" have connections; they are removed when the last has ended", "family", family.String(), "servers", n)
	}
	d[family] = n
}

func (l *leftovers) remove(family plan.Family, todo []removal) {
	for _, r := range todo {
		removed, err := r.do(family)
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
	if l.ownDraining[family] > 0 {
		l.remove(family, []removal{l.ownIPVS()})
	}
	if l.kubeProxyWrote(ctx, family) {
		return l.dealWithKubeProxy(family)
	}
	if l.draining[family] > 0 {
		l.remove(family, []removal{{what: "kube-proxy's IPVS servers", remove: l.drainIPVS}})
	}
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
		if l.inUse[family] != "" {
			l.resync()
		}
		return true
	}
	l.draining[family] = 0 // what is left of its virtual servers serves it again
	if !l.said[family] {
		l.said[family] = true
		l.log.Warn("kube-proxy has written rules on this node, and they come before those of signalbox; end one of the two, and remove what it leaves with `signalbox cleanup` or `signalbox cleanup --kube-proxy`",
			"family", family.String())
	}
	return false
}

// kubeProxyWrote looks for what kube-proxy has in each of its modes, at the
// least cost.
func (l *leftovers) kubeProxyWrote(ctx context.Context, family plan.Family) bool {
	return nftables.HasKubeProxy(family) || l.draining[family] == 0 && ipvs.HasKubeProxy(family) || iptables.HasKubeProxy(ctx, family, l.inUse[family])
}
