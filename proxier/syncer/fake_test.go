// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// fakeProxier keeps the promises of Proxier about a kernel that is a map, and
// checks that the Loop keeps its own. refuse and takes may be set.
type fakeProxier struct {
	proxier.Defaults
	takes time.Duration

	mu     sync.Mutex
	refuse func(plan *plan.Plan, change plan.Change) error // asked before anything is written
	kernel map[plan.ServicePortName]*plan.ServicePort
	lost   bool     // a Sync left the kernel's state unknown
	broken []string // how the Loop broke the contract
	calls  []call
}

type call struct {
	at     time.Time
	change plan.Change
	err    error
}

// setRefuse may be called while a Loop runs.
func (f *fakeProxier) setRefuse(refuse func(*plan.Plan, plan.Change) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refuse = refuse
}

// syncs may be called while a Loop runs.
func (f *fakeProxier) syncs() []call {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

func (f *fakeProxier) Sync(ctx context.Context, desired *plan.Plan, change plan.Change) (err error) {
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
		err := f.refuse(desired, change)
		f.lost = wasLost || errors.Is(err, proxier.ErrUnknownState)
		if err != nil {
			return err
		}
	}
	next := map[plan.ServicePortName]*plan.ServicePort{}
	if change.All {
		maps.Copy(next, desired.Services)
	} else {
		maps.Copy(next, f.kernel)
		for _, name := range change.Services {
			delete(next, name)
			if sp := desired.Services[name]; sp != nil {
				next[name] = sp
			}
		}
	}
	owners := map[plan.FrontendKey]plan.ServicePortName{}
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
type recorder struct{ owners []plan.FlowOwner }

func (r *recorder) Clean(_ plan.Family, owners []plan.FlowOwner) {
	r.owners = append(r.owners, owners...)
}
