package daemon

import (
	"context"
	"sync"

	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// served tells when all Services of all families are in the kernel.
type served struct {
	families int
	// complete is called each time that they are, before others learn of it.
	complete func()

	mu sync.Mutex // guards what follows
	of map[plan.Family]bool
	// written are the families in which everything was written since forget.
	written map[plan.Family]bool
	all     chan struct{} // closed when all families are served
}

func newServed(families int, complete func()) *served {
	s := &served{families: families, complete: complete}
	s.forget()
	return s
}

// forget has every family served anew.
func (s *served) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.of, s.written, s.all = map[plan.Family]bool{}, map[plan.Family]bool{}, make(chan struct{})
}

// note is told of each sync, and says whether the family is served with it for
// the first time: everything was written, and the kernel is what it should be. A
// Service in quarantine does not keep the node from serving all others.
func (s *served) note(r syncer.SyncReport) (first bool) {
	s.mu.Lock()
	s.written[r.Family] = s.written[r.Family] || r.All
	first = r.Current && s.written[r.Family] && !s.of[r.Family]
	if first {
		s.of[r.Family] = true
	}
	last, all := first && len(s.of) == s.families, s.all
	s.mu.Unlock()
	if last {
		s.complete()
		close(all)
	}
	return first
}

// wait returns when all families are served; false if ctx ends first.
func (s *served) wait(ctx context.Context) bool {
	s.mu.Lock()
	all := s.all
	s.mu.Unlock()
	select {
	case <-all:
		return true
	case <-ctx.Done():
		return false
	}
}
