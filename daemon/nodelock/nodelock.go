// SPDX-License-Identifier: Apache-2.0

// Package nodelock decides which signalbox process writes the rules of a network
// namespace. Two processes that write the same tables would undo each other's changes.
//
// A process that starts later acquires the lock once it serves: in a rolling update
// with surge the old process still runs then. The old process pauses, and serves again
// if the other ends first.
package nodelock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"signalbox/internal/namespace"
	"signalbox/internal/wait"
)

// HandoverTimeout bounds the wait for a holder that does not answer.
const HandoverTimeout = 30 * time.Second

// Lock is the node lock as one process sees it.
type Lock struct {
	// abstract is the name of the abstract socket; see places.go.
	abstract string
	log      *slog.Logger
	// handoverTimeout bounds the wait for a holder that does not answer.
	handoverTimeout time.Duration
	// requestTimeout bounds the wait for the first word of a client. Other clients wait
	// meanwhile.
	requestTimeout time.Duration
	// conditions are sent to a client that asks for them.
	conditions func() []string
	// refused limits the log: on the abstract socket anybody on the node can connect.
	refused rate.Sometimes

	mu sync.Mutex // guards what follows
	// held is what this process holds: nothing, or each place that it could get.
	held []*heldPlace
	// predecessors are connections to the processes that handed the lock over to this
	// one. They stay open, because closing one would say that this process has ended.
	predecessors []*net.UnixConn
	// successor is the process that the lock was handed over to.
	successor *Contender
}

// New returns a lock that the process does not hold yet. signalbox ready prints the
// conditions of the holder.
func New(log *slog.Logger, conditions func() []string) *Lock {
	return &Lock{abstract: abstractName, log: log, handoverTimeout: HandoverTimeout, requestTimeout: time.Second, conditions: conditions,
		refused: rate.Sometimes{First: 5, Interval: time.Minute}}
}

// Acquire acquires the lock, from its holder if there is one. dir is the directory of
// --run-dir; empty for none. If the holder does not answer in time, the error says so,
// and the next call tries again.
func (n *Lock) Acquire(ctx context.Context, dir string) error {
	if n.Held() {
		return nil
	}
	inDirectory, err := n.acquireInDirectory(ctx, dir)
	if err != nil {
		return err
	}
	err = n.acquireAt(ctx, n.abstract, func() (*heldPlace, error) { return listenAbstract(n.abstract) })
	if err == nil || !inDirectory || ctx.Err() != nil {
		return err
	}
	n.log.Warn("this process does not have the node lock's abstract socket; a signalbox that does not share --run-dir may write rules on this node, too", "socket", n.abstract, "error", err)
	return nil
}

// acquireInDirectory returns false without an error where no directory can be used.
func (n *Lock) acquireInDirectory(ctx context.Context, dir string) (bool, error) {
	if dir == "" {
		return false, nil
	}
	id, err := namespace.Current()
	if err != nil {
		return false, err
	}
	err = n.acquireAt(ctx, socketPath(dir, id), func() (*heldPlace, error) { return listenIn(dir, id) })
	if err == nil || errors.Is(err, errHeld) || isTransient(err) {
		return err == nil, err
	}
	n.log.Info("the node lock is not in --run-dir; its abstract socket alone decides which signalbox serves this node", "directory", dir, "error", err)
	return false, nil
}

// acquireAt listens at one place, or has its holder hand over.
func (n *Lock) acquireAt(ctx context.Context, address string, listen func() (*heldPlace, error)) error {
	ctx, cancel := context.WithTimeout(ctx, n.handoverTimeout)
	defer cancel()
	place, predecessors, err := n.requestPlace(ctx, address, listen)
	if err != nil {
		for _, c := range predecessors {
			c.Close()
		}
		return err
	}
	if len(predecessors) > 0 {
		n.log.Info("the signalbox that served this node before has stopped writing")
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.held = append(n.held, place)
	n.predecessors = append(n.predecessors, predecessors...)
	return nil
}

// maxHandovers is how many processes may hand over before one attempt gets a place. More
// than one do if several processes request the lock at once. A process that keeps the place
// after its answer is not a signalbox.
const maxHandovers = 3

// requestPlace returns the place, and connections to the processes that handed over, also
// with an error.
func (n *Lock) requestPlace(ctx context.Context, address string, listen func() (*heldPlace, error)) (place *heldPlace, predecessors []*net.UnixConn, err error) {
	for {
		place, err = listen()
		if isTransient(err) && wait.For(ctx, acquireRetry) {
			continue
		}
		if err == nil || !errors.Is(err, errHeld) {
			return place, predecessors, err
		}
		if len(predecessors) == maxHandovers {
			return nil, predecessors, fmt.Errorf("%w and keeps it after its answer", errHeld)
		}
		var c *net.UnixConn
		c, err = requestHandover(ctx, address)
		if errors.Is(err, fs.ErrNotExist) { // the holder's socket in the directory has been deleted
			if other, otherErr := requestHandover(ctx, n.abstract); otherErr == nil {
				c, err = other, nil
			}
		}
		switch {
		case err == nil:
			predecessors = append(predecessors, c)
		case !holderIsGone(err) || !wait.For(ctx, acquireRetry):
			return nil, predecessors, fmt.Errorf("%w and does not hand it over: %w", errHeld, err)
		}
	}
}

// Held says whether this process holds the lock.
func (n *Lock) Held() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.held) > 0
}

// TookOver says whether another process has handed the lock over to this one.
func (n *Lock) TookOver() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.predecessors) > 0
}

// acquireRetry is short, because the lock may just change hands. It is not 0, because
// a holder that trusts nobody looks the same.
const acquireRetry = 10 * time.Millisecond

// holderIsGone says whether the holder ended, or handed the lock over to another
// process, before it answered the request.
func holderIsGone(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) ||
		errors.Is(err, io.EOF) || errors.Is(err, fs.ErrNotExist)
}

// WaitForPredecessors waits until the processes have ended that held the lock before;
// false if ctx ends first. They may have connections open.
func (n *Lock) WaitForPredecessors(ctx context.Context) bool {
	n.mu.Lock()
	before := slices.Clone(n.predecessors)
	n.mu.Unlock()
	for _, c := range before {
		waitForEnd(ctx, c)
	}
	return ctx.Err() == nil
}

// waitForEnd returns when the other side of a connection has ended, or ctx.
func waitForEnd(ctx context.Context, c *net.UnixConn) {
	c.SetReadDeadline(time.Time{})
	defer endWith(ctx, c.SetReadDeadline)()
	for {
		if _, err := c.Read(make([]byte, 1)); err != nil {
			return
		}
	}
}

// endWith ends, when ctx ends, what waits for a connection until its deadline. It comes
// after the connection's own deadline is set. release ends that: no later use of the
// connection meets a deadline of this one.
func endWith(ctx context.Context, setDeadline func(time.Time) error) (release func()) {
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = setDeadline(time.Unix(1, 0)) // fails if the connection is closed, which ends the wait as well
		close(ended)
	})
	return func() {
		if !stop() {
			<-ended
		}
	}
}

// Contender is a process that serves and requests the lock.
type Contender struct{ conn *net.UnixConn }

// NextContender returns the next process that requests the lock; nil when ctx ends.
func (n *Lock) NextContender(ctx context.Context) *Contender {
	n.mu.Lock()
	held := slices.Clone(n.held)
	n.mu.Unlock()
	accepting, cancel := context.WithCancel(ctx)
	defer cancel()
	requests := make(chan *Contender)
	var places sync.WaitGroup
	for _, p := range held {
		places.Go(func() { n.acceptRequest(accepting, p.listener, requests) })
	}
	var next *Contender
	select {
	case next = <-requests:
	case <-ctx.Done():
	}
	cancel()
	places.Wait()
	return next
}

// acceptRequest sends the first process that requests the lock at a listener.
func (n *Lock) acceptRequest(ctx context.Context, l *net.UnixListener, requests chan<- *Contender) {
	l.SetDeadline(time.Time{})
	defer endWith(ctx, l.SetDeadline)()
	for {
		c, err := n.accept(ctx, l)
		if err != nil {
			return
		}
		err = n.readRequest(ctx, c)
		if err == nil {
			select {
			case requests <- &Contender{c}:
			case <-ctx.Done(): // another process was sooner; this one asks that process
				c.Close()
			}
			return
		}
		c.Close()
		if !errors.Is(err, io.EOF) && !errors.Is(err, errAnswered) { // these are of signalbox ready
			n.refused.Do(func() {
				n.log.Warn("a request for the node lock is not granted; this signalbox goes on serving; further ones are logged once a minute", "error", err)
			})
		}
	}
}

// acceptRetry is how long accept waits after a failure.
const acceptRetry = time.Second

// accept returns the next client, or an error when ctx ends. A process that has no
// descriptor left gets the client later.
func (n *Lock) accept(ctx context.Context, l *net.UnixListener) (*net.UnixConn, error) {
	for logged := false; ; logged = true {
		c, err := l.AcceptUnix()
		if err == nil || ctx.Err() != nil {
			return c, err
		}
		if !logged {
			n.log.Error("cannot accept a signalbox that takes over; trying again", "every", acceptRetry, "error", err)
		}
		wait.For(ctx, acceptRetry)
	}
}

// HandOver releases the lock and tells the contender. This process must not write any
// more.
func (n *Lock) HandOver(to *Contender) error {
	n.Release()
	n.mu.Lock()
	n.successor = to
	n.mu.Unlock()
	to.conn.SetDeadline(time.Now().Add(n.handoverTimeout))
	return send(to.conn, wordReleased)
}

// Release releases the lock without a contender.
func (n *Lock) Release() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.held {
		p.release()
	}
	n.held = nil
}

// WaitWhileHandedOver waits until the successor has ended; false if ctx ends first.
func (n *Lock) WaitWhileHandedOver(ctx context.Context) bool {
	n.mu.Lock()
	to := n.successor
	n.mu.Unlock()
	if to == nil {
		return true
	}
	waitForEnd(ctx, to.conn)
	if ctx.Err() != nil {
		return false // and the connection stays: this process may have others open
	}
	to.conn.Close()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.successor = nil
	return true
}
