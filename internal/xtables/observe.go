// SPDX-License-Identifier: Apache-2.0

package xtables

import (
	"errors"
	"sync"

	"signalbox/internal/namespace"
	"signalbox/nft"
	"signalbox/nft/notify"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Observer counts the changes of one family's tables nat and filter by other software.
//
// In the nft variant nf_tables notifies of changes, a moment later. In the legacy variant
// the kernel is asked. Then a rule that replaces one of the same size does not count, and
// neither does a change during an own write.
type Observer struct {
	observed
	key   observerKey
	users int // guarded by observers
}

type observed interface {
	// Changes returns the number of changes so far, and in the nft variant which process
	// made the last one.
	Changes() (n int, by proxier.Writer, err error)
	// write runs an own write with these tools, which does not count.
	write(t *Tools, write func() error) error
	close() error
}

// observedTables are the tables that an Observer is about.
var observedTables = []string{"nat", "filter"}

type observerKey struct {
	namespace namespace.ID
	backend   Backend
	family    plan.Family
}

// observers has the Observers in use.
var observers = struct {
	sync.Mutex
	byKey map[observerKey]*Observer
}{byKey: map[observerKey]*Observer{}}

func (t *Tools) observerKey() (observerKey, error) {
	id, err := namespace.Current()
	return observerKey{id, t.Backend, t.Family}, err
}

// Observe makes an Observer for the network namespace of the calling thread.
func (t *Tools) Observe() (*Observer, error) {
	key, err := t.observerKey()
	if err != nil {
		return nil, err
	}
	observers.Lock()
	defer observers.Unlock()
	o := observers.byKey[key]
	if o == nil {
		o = &Observer{key: key}
		if t.Backend == NFT {
			o.observed, err = observeNFT(t.Family)
		} else {
			o.observed, err = observeLegacy(t.Family)
		}
		if err != nil {
			return nil, err
		}
		observers.byKey[key] = o
	}
	o.users++
	return o, nil
}

// Close ends the observation with its last user.
func (o *Observer) Close() error {
	observers.Lock()
	defer observers.Unlock()
	if o.users--; o.users > 0 {
		return nil
	}
	delete(observers.byKey, o.key)
	return o.close()
}

// Unobserved runs a write of this process with these tools. No Observer counts it. If the
// kernel has more transactions meanwhile than the tools made, that is a change by other
// software. Its name is not known.
func (t *Tools) Unobserved(write func() error) error {
	key, err := t.observerKey()
	if err != nil {
		return write()
	}
	observers.Lock()
	o := observers.byKey[key]
	if o != nil {
		o.users++
	}
	observers.Unlock()
	if o == nil {
		return write()
	}
	defer o.Close()
	return o.write(t, write)
}

// nftObserver is for the nft variant.
type nftObserver struct{ *notify.Subscription }

func observeNFT(f plan.Family) (observed, error) {
	s, err := notify.Subscribe(byte(nft.FamilyOf(f).Table), notify.NoWriter, observedTables...)
	if err != nil {
		return nil, err
	}
	return nftObserver{s}, nil
}

func (o nftObserver) Changes() (n int, by proxier.Writer, err error) {
	n, last := o.Subscription.Changes()
	return n, proxier.Writer{Name: last.Process, PID: last.PID}, nil
}

func (o nftObserver) write(t *Tools, write func() error) error {
	return o.Mute(func() (int, error) {
		t.transactions = 0
		err := write()
		return t.transactions, err
	})
}

func (o nftObserver) close() error {
	o.Close()
	return nil
}

// legacyObserver is for the legacy variant.
type legacyObserver struct {
	socket legacySocket

	mu      sync.Mutex // guards what follows, and is held by write
	last    [2]tableInfo
	changes int
}

func observeLegacy(f plan.Family) (observed, error) {
	s, err := openLegacy(f)
	if err != nil {
		return nil, err
	}
	return &legacyObserver{socket: s}, nil
}

func (o *legacyObserver) look() (now [2]tableInfo, err error) {
	for i, table := range observedTables {
		var lookErr error
		now[i], lookErr = o.socket.info(table)
		err = errors.Join(err, lookErr)
	}
	return now, err
}

func (o *legacyObserver) Changes() (n int, by proxier.Writer, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	err = o.refresh()
	return o.changes, by, err
}

// refresh counts a change since the last look. The lock is held.
func (o *legacyObserver) refresh() error {
	now, err := o.look()
	if err == nil && now != o.last {
		o.last = now
		o.changes++
	}
	return err
}

func (o *legacyObserver) write(_ *Tools, write func() error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	known := o.refresh() == nil
	err := write()
	if now, lookErr := o.look(); known && lookErr == nil {
		o.last = now
	}
	return err
}

func (o *legacyObserver) close() error { return o.socket.close() }
