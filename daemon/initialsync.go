package daemon

import (
	"context"
	"sync"

	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// initialSync tells when all Services of all families are in the kernel.
type initialSync struct {
	families int
	// onComplete is called each time that they are, before wait returns.
	onComplete func()

	mu      sync.Mutex // guards what follows
	current map[plan.Family]bool
	// written are the families in which everything was written since reset.
	written map[plan.Family]bool
	all     chan struct{} // closed when all families are served
}

func newInitialSync(families int, complete func()) *initialSync {
	s := &initialSync{families: families, onComplete: complete}
	s.reset()
	return s
}

// reset starts anew: every family must be written again.
func (s *initialSync) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current, s.written, s.all = map[plan.Family]bool{}, map[plan.Family]bool{}, make(chan struct{})
}

// synced takes in each sync, and says whether it is the first that serves the family:
// everything was written, and the kernel is up to date. A Service in quarantine does
// not keep the node from serving all others.
func (s *initialSync) synced(r syncer.SyncReport) (first bool) {
	s.mu.Lock()
	s.written[r.Family] = s.written[r.Family] || r.All
	first = r.Current && s.written[r.Family] && !s.current[r.Family]
	if first {
		s.current[r.Family] = true
	}
	last, all := first && len(s.current) == s.families, s.all
	s.mu.Unlock()
	if last {
		s.onComplete()
		close(all)
	}
	return first
}

// wait returns when all families are served; false if ctx ends first.
func (s *initialSync) wait(ctx context.Context) bool {
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
