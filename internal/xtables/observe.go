// SPDX-License-Identifier: Apache-2.0

package xtables

import (
	"errors"
	"sync"

	"signalbox/internal/namespace"
	"signalbox/nft/notify"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Observer counts the changes of the tables nat and filter by other software. It asks the
// kernel with one or two system calls. In the nft variant a change of any table counts. In
// the legacy variant a rule that replaces one of the same size does not, and neither does a
// change during an own write.
//
// In the nft variant both families have the same Observer: nf_tables counts the
// transactions of both together.
type Observer struct {
	look func() (state any, by proxier.Writer, err error)
	// count returns the number of transactions between two states; nil where the kernel
	// does not count.
	count func(before, after any) int
	close func() error

	mu      sync.Mutex // guards what follows, and is held by Write
	last    any        // what look returned last
	changes int
	by      proxier.Writer // of the last change
	users   int            // guarded by observers
}

// observers has the Observers of the nft variant.
var observers = struct {
	sync.Mutex
	byNamespace map[namespace.ID]*Observer
}{byNamespace: map[namespace.ID]*Observer{}}

// Observe makes an Observer for the network namespace of the calling thread.
func (t *Tools) Observe() (*Observer, error) {
	if t.Backend == Legacy {
		return observeLegacy(t.Family)
	}
	id, err := namespace.Current()
	if err != nil {
		return nil, err
	}
	observers.Lock()
	defer observers.Unlock()
	o := observers.byNamespace[id]
	if o == nil {
		g, err := notify.OpenGenerations()
		if err != nil {
			return nil, err
		}
		o = &Observer{look: func() (any, proxier.Writer, error) {
			last, err := g.Last()
			return last.ID, proxier.Writer{Name: last.Process, PID: last.PID}, err
		}, count: func(before, after any) int {
			return int(after.(uint32) - before.(uint32))
		}, close: func() error {
			delete(observers.byNamespace, id)
			return g.Close()
		}}
		observers.byNamespace[id] = o
	}
	o.users++
	return o, nil
}

// Close closes the connection to the kernel after the last user.
func (o *Observer) Close() error {
	observers.Lock()
	defer observers.Unlock()
	if o.users--; o.users > 0 {
		return nil
	}
	return o.close()
}

// Changes returns the number of changes so far, and in the nft variant which process made
// the last one.
func (o *Observer) Changes() (n int, by proxier.Writer, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	err = o.refresh()
	return o.changes, o.by, err
}

// Write runs an own write with these tools, which does not count. If the kernel has had
// more transactions meanwhile than the tools made, that is a change by other software.
// Its name is not known: the last transaction may be an own one.
func (o *Observer) Write(t *Tools, write func() error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	known := o.refresh() == nil
	t.transactions = 0
	err := write()
	now, _, lookErr := o.look()
	if !known || lookErr != nil {
		return err
	}
	if o.count != nil && o.count(o.last, now) > t.transactions {
		o.by = proxier.Writer{}
		o.changes++
	}
	o.last = now
	return err
}

func (o *Observer) refresh() error {
	now, by, err := o.look()
	if err == nil && now != o.last {
		o.last, o.by = now, by
		o.changes++
	}
	return err
}

func observeLegacy(f plan.Family) (*Observer, error) {
	s, err := openLegacy(f)
	if err != nil {
		return nil, err
	}
	look := func() (any, proxier.Writer, error) {
		nat, natErr := s.info("nat")
		filter, filterErr := s.info("filter")
		return [2]tableInfo{nat, filter}, proxier.Writer{}, errors.Join(natErr, filterErr)
	}
	return &Observer{look: look, close: s.close, users: 1}, nil
}
