package proxier

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"
)

// fakeProxier keeps the promises of Proxier about a kernel that is a map, and
// checks that the Loop keeps its own. refuse and takes may be set.
type fakeProxier struct {
	takes time.Duration

	mu     sync.Mutex
	refuse func(plan *Plan, change Change) error // asked before anything is written
	kernel map[ServicePortName]*ServicePort
	lost   bool     // a Sync left the kernel's state unknown
	broken []string // how the Loop broke the contract
	calls  []call
}

type call struct {
	at     time.Time
	change Change
	err    error
}

// setRefuse may be called while a Loop runs.
func (f *fakeProxier) setRefuse(refuse func(*Plan, Change) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refuse = refuse
}

func (f *fakeProxier) Sync(ctx context.Context, plan *Plan, change Change) (err error) {
	if f.takes > 0 {
		time.Sleep(f.takes) // not under the lock: to wait for a lock stops the clock of a synctest bubble
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	defer func() { f.calls = append(f.calls, call{time.Now(), change, err}) }()
	wasLost := f.lost
	if f.kernel == nil || wasLost {
		if !change.All {
			f.broken = append(f.broken, fmt.Sprintf("a partial sync where the kernel's state is unknown: %+v", change))
		}
	}
	if change.Empty() {
		f.broken = append(f.broken, "a sync with nothing to do")
	}
	if f.refuse != nil {
		f.lost = true // should it panic
		err := f.refuse(plan, change)
		f.lost = wasLost || errors.Is(err, ErrUnknownState)
		if err != nil {
			return err
		}
	}
	next := map[ServicePortName]*ServicePort{}
	if change.All {
		maps.Copy(next, plan.Services)
	} else {
		maps.Copy(next, f.kernel)
		for _, name := range change.Services {
			delete(next, name)
			if sp := plan.Services[name]; sp != nil {
				next[name] = sp
			}
		}
	}
	owners := map[FrontendKey]ServicePortName{}
	for name, sp := range next {
		for _, key := range sp.Keys() {
			if other, taken := owners[key]; taken {
				return fmt.Errorf("%s is at %s already", other, key)
			}
			owners[key] = name
		}
	}
	f.kernel, f.lost = next, false
	return nil
}

func (f *fakeProxier) Close() error { return nil }

// recorder records what a FlowCleaner is asked for.
type recorder struct{ owners []FlowOwner }

func (r *recorder) Clean(_ Family, owners []FlowOwner) { r.owners = append(r.owners, owners...) }
