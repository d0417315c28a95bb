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
	mode     modes.Mode
	families []proxier.Family
	// inUse is the variant of the iptables tools that this mode uses.
	inUse map[proxier.Family]iptables.Backend
	// resync has this mode's own rules written anew.
	resync func()
	// drained waits until relays that this process had under an earlier
	// configuration have no connections any more; false if its context ends
	// first.
	drained func(context.Context) bool
	// flows removes stale UDP flows; nil where they cannot be.
	flows interface{ Flush(context.Context) error }
	// present is told whether something of others is there that may be obeyed.
	present func(family proxier.Family, is bool)
	log     *slog.Logger

	mu     sync.Mutex // guards what follows
	served map[proxier.Family]bool
	ready  chan struct{} // closed when all families are served
	// failed are removals that are to be done again, by what they remove.
	failed map[proxier.Family]map[string]removal

	// The goroutine's own: of which families kube-proxy had rules, until when
	// they are removed again, and of which it was said that they are there.
	had   map[proxier.Family]bool
	until time.Time
	said  map[proxier.Family]bool
	// draining counts kube-proxy's virtual servers that have connections yet.
	draining map[proxier.Family]int
}

func newLeftovers(choice modes.Choice, log *slog.Logger) *leftovers {
	l := &leftovers{mode: choice.Mode, families: choice.Families, inUse: map[proxier.Family]iptables.Backend{}, present: func(proxier.Family, bool) {}, log: log}
	l.forget()
	return l
}

// shares notes what the mode at work has in common with kube-proxy.
func (l *leftovers) shares(family proxier.Family, p proxier.Proxier) {
	if p, ok := p.(interface{ Backend() iptables.Backend }); ok {
		l.inUse[family] = p.Backend()
	}
}

// forget has everything served anew before anything is removed.
func (l *leftovers) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.served, l.ready = map[proxier.Family]bool{}, make(chan struct{})
}

// serves notes that all of a family's Services are in the kernel, and says
// whether this is the first time.
func (l *leftovers) serves(family proxier.Family) (first bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.served[family] {
		return false
	}
	l.served[family] = true
	if len(l.served) == len(l.families) {
		close(l.ready)
	}
	return true
}

// wait returns when all families are served; false if ctx ends first.
func (l *leftovers) wait(ctx context.Context) bool {
	l.mu.Lock()
	ready := l.ready
	l.mu.Unlock()
	select {
	case <-ready:
		return true
	case <-ctx.Done():
		return false
	}
}

// settleTime bounds the wait for stale flows.
const settleTime = 5 * time.Second

// settleFlows waits until UDP flows have left what served before. A relay that
// the node is taken from refuses them afterwards.
func (l *leftovers) settleFlows(ctx context.Context) {
	if l.flows == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	if err := l.flows.Flush(ctx); err != nil {
		l.log.Debug("UDP flows may yet lead to what served before", "error", err)
	}
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
		for _, family := range l.families {
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
		return m.Name == l.mode.Name || m.Name == userspace.Mode
	})
	l.had, l.said, l.draining = map[proxier.Family]bool{}, map[proxier.Family]bool{}, map[proxier.Family]int{}
	l.until = time.Now().Add(swapTime)
	l.mu.Lock()
	l.failed = map[proxier.Family]map[string]removal{}
	l.mu.Unlock()
	for _, family := range l.families {
		l.remove(family, signalboxRemovals(others))
		l.had[family] = l.kubeProxyWrote(ctx, family)
		l.remove(family, l.kubeProxy(family))
	}
}

// removeRelay removes what leads to a relay. That comes last: connections that
// it has open need its rules and routes until it ends. New ones do not come to
// it, as other modes' rules are looked at first.
func (l *leftovers) removeRelay() {
	if l.mode.Name == userspace.Mode {
		return
	}
	relay := slices.DeleteFunc(slices.Clone(modes.All), func(m modes.Mode) bool { return m.Name != userspace.Mode })
	for _, family := range l.families {
		l.remove(family, signalboxRemovals(relay))
	}
}

// kubeProxy is what kube-proxy's rules are removed by while this mode serves.
func (l *leftovers) kubeProxy(family proxier.Family) []removal {
	return kubeProxyRemovals(l.inUse[family], l.drainIPVS)
}

// drainIPVS removes kube-proxy's virtual servers without ending connections.
func (l *leftovers) drainIPVS(family proxier.Family) (removed bool, err error) {
	removed, n, err := ipvs.CleanupKubeProxy(family, l.mode.Name == ipvs.Mode, true)
	if n > 0 && l.draining[family] == 0 {
		l.log.Info("virtual servers of kube-proxy have connections; they are removed when the last has ended", "family", family.String(), "servers", n)
	}
	l.draining[family] = n
	return removed, err
}

func (l *leftovers) remove(family proxier.Family, todo []removal) {
	for _, r := range todo {
		removed, err := r.do(family)
		if removed {
			l.log.Info("removed what others had written", "what", r.what, "family", family.String())
		}
		if known := l.note(family, r, err); err != nil && !known {
			l.log.Warn("what others wrote could not be removed and may still be obeyed; trying again", "family", family.String(), "error", err)
		}
	}
}

// note keeps a removal that failed, and says whether its last one did, too.
func (l *leftovers) note(family proxier.Family, r removal, err error) (known bool) {
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
func (l *leftovers) removeAgain(family proxier.Family) {
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
	for _, family := range l.families {
		l.mu.Lock()
		failed := len(l.failed[family]) > 0
		l.mu.Unlock()
		l.present(family, failed || l.said[family])
	}
}

// look removes kube-proxy's rules if they are back, and has this mode's own
// written again if somebody else replaced them.
func (l *leftovers) look(ctx context.Context, family proxier.Family) (found bool) {
	if l.draining[family] > 0 {
		l.remove(family, []removal{{what: "kube-proxy's IPVS servers", remove: l.drainIPVS}})
	}
	if l.kubeProxyWrote(ctx, family) {
		return l.dealWithKubeProxy(family)
	}
	l.said[family] = false
	if b := l.inUse[family]; b != "" {
		if intact, err := iptables.Intact(ctx, family, b); err == nil && !intact {
			found = true
			l.log.Warn("another program has replaced the rules of Services; they are written anew", "family", family.String())
			l.resync()
		}
	}
	return found
}

// dealWithKubeProxy removes its rules, if it is one that served before.
func (l *leftovers) dealWithKubeProxy(family proxier.Family) (removed bool) {
	if l.had[family] && time.Now().Before(l.until) {
		l.log.Warn("kube-proxy has written its rules again, and they are removed again; does it still run on this node?", "family", family.String())
		l.remove(family, l.kubeProxy(family))
		if l.inUse[family] != "" {
			l.resync()
		}
		return true
	}
	if !l.said[family] {
		l.said[family] = true
		l.log.Warn("kube-proxy has written rules on this node, and they come before those of signalbox; end one of the two, and remove what it leaves with `signalbox cleanup` or `signalbox cleanup --kube-proxy`",
			"family", family.String())
	}
	return false
}

// kubeProxyWrote looks for what kube-proxy has in each of its modes, at the
// least cost.
func (l *leftovers) kubeProxyWrote(ctx context.Context, family proxier.Family) bool {
	return nftables.HasKubeProxy(family) || l.draining[family] == 0 && ipvs.HasKubeProxy(family) || iptables.HasKubeProxy(ctx, family, l.inUse[family])
}
