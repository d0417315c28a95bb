// SPDX-License-Identifier: Apache-2.0

// Package notify tells when other software changes a table of nf_tables. It knows no
// Service, and does not read rules.
//
// The kernel notifies of each object in a transaction, and then of the transaction
// itself with the process that made it. A filter in the kernel drops the
// notifications of this process's own transactions. All subscriptions in a network
// namespace share one socket: see Mute.
package notify

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"signalbox/internal/namespace"
	"signalbox/internal/wait"

	"golang.org/x/sys/unix"
)

// Change is what other software did to a table. Several transactions can be in it.
type Change struct {
	// Rules says that more than elements has changed: rules, chains, sets or the table.
	Rules bool
	// Lost says that notifications are missing. The table may have changed.
	Lost bool
	// Process is the name of the process that made the last of the transactions, and
	// PID its number in the machine's first PID namespace. Both are zero if unknown.
	Process string
	PID     uint32
}

const (
	// quietTime is how long a table is left alone before Next returns.
	quietTime = 50 * time.Millisecond
	// maxDelay bounds the wait of Next while other software writes all the time.
	maxDelay = time.Second
)

// Subscription follows tables of one family.
type Subscription struct {
	listener *listener
	family   byte
	tables   []string
	writer   uint32 // netlink port of the own connection
	wake     chan struct{}

	mu      sync.Mutex // guards what follows
	pending Change
	// changes counts the transactions that concern the tables, and the losses.
	changes int
	// last is the change that changes counted last.
	last Change
	// touched and rules are about the transaction whose end is to come.
	touched, rules bool
}

// NoWriter is for a process that writes with other programs, inside Mute.
const NoWriter = 0

// Subscribe follows tables in the network namespace of the calling thread. What the
// netlink port writer sends is this process's own. Close ends the subscription.
func Subscribe(family byte, writer uint32, tables ...string) (*Subscription, error) {
	fail := func(err error) (*Subscription, error) {
		return nil, fmt.Errorf("subscribe to changes of tables %q: %w", tables, err)
	}
	id, err := namespace.Current()
	if err != nil {
		return fail(err)
	}
	listeners.Lock()
	defer listeners.Unlock()
	l := listeners.byNamespace[id]
	if l == nil {
		if l, err = listen(id); err != nil {
			return fail(err)
		}
	}
	s := &Subscription{listener: l, family: family, tables: tables, writer: writer, wake: make(chan struct{}, 1)}
	if err := l.add(s); err != nil {
		l.remove(s)
		return fail(err)
	}
	listeners.byNamespace[id] = l
	return s, nil
}

// Close ends the subscription.
func (s *Subscription) Close() {
	listeners.Lock()
	defer listeners.Unlock()
	s.listener.remove(s)
}

// Next waits until other software has changed the table and then left it alone for
// quietTime. It returns false when ctx ends. One goroutine calls it at a time.
func (s *Subscription) Next(ctx context.Context) (Change, bool) {
	select {
	case <-ctx.Done():
		return Change{}, false
	case <-s.wake:
	}
	late := time.NewTimer(maxDelay)
	defer late.Stop()
	for quiet := false; !quiet; {
		select {
		case <-ctx.Done():
			wait.Wake(s.wake) // for the next caller
			return Change{}, false
		case <-s.wake:
		case <-time.After(quietTime):
			quiet = true
		case <-late.C:
			quiet = true
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.pending
	s.pending = Change{}
	return c, true
}

// Changes returns the number of changes by other software so far, and the last of them.
func (s *Subscription) Changes() (n int, last Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changes, s.last
}

// touch records that the transaction whose end is to come concerns the table.
func (s *Subscription) touch(rules bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.touched, s.rules = true, s.rules || rules
}

// commit records the end of a transaction.
func (s *Subscription) commit(g generation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.touched {
		return
	}
	s.pending.Rules = s.pending.Rules || s.rules
	s.pending.Process, s.pending.PID = g.process, g.pid
	s.count(Change{Rules: s.rules, Process: g.process, PID: g.pid})
}

// count counts a change, and begins with the next transaction.
func (s *Subscription) count(c Change) {
	s.changes++
	s.last, s.touched, s.rules = c, false, false
	wait.Wake(s.wake)
}

func (s *Subscription) lose() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending.Rules = s.pending.Rules || s.rules
	s.pending.Lost = true
	s.count(Change{Rules: s.rules, Lost: true})
}

// Mute runs write without notifications. write returns how many transactions it surely made.
// If the kernel counts more, other software may have written meanwhile.
//
// If there is anybody to notify, the kernel keeps memory for each element of a transaction
// until its end: 1.1 GB for 131,000 elements (Linux 6.18).
func (s *Subscription) Mute(write func() (transactions int, err error)) error {
	l := s.listener
	l.muting.Lock()
	defer l.muting.Unlock()
	before, beforeErr := l.generation()
	waitErr := l.waitForNotifications(before)
	leaveErr := l.conn.LeaveGroup(unix.NFNLGRP_NFTABLES)
	own, err := write()
	joinErr := l.conn.JoinGroup(unix.NFNLGRP_NFTABLES)
	after, afterErr := l.generation()
	if errors.Join(beforeErr, waitErr, leaveErr, joinErr, afterErr) != nil || int(after-before) > own {
		l.lose()
	}
	return err
}
