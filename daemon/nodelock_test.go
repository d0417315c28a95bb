package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"
)

// nodeLocksFor makes handles of one lock that is the test's own.
func nodeLocksFor(t *testing.T) func() *nodeLock {
	name := "@signalbox-" + strings.ReplaceAll(t.Name(), "/", "-")
	return func() *nodeLock {
		s := newNodeLock(slog.New(slog.NewTextHandler(t.Output(), nil)), func() []string { return nil })
		s.name = name
		t.Cleanup(s.release)
		return s
	}
}

// The later process acquires the lock as soon as it asks, and the earlier one gets
// it back when the later one ends.
func TestNodeLock(t *testing.T) {
	newLock := nodeLocksFor(t)
	old, next := newLock(), newLock()
	if err := old.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	taken := make(chan error, 1)
	go func() { taken <- next.acquire(t.Context()) }()
	who := old.nextContender(t.Context())
	select {
	case err := <-taken:
		t.Fatalf("the lock was acquired before it was handed over: %v", err)
	default:
	}
	if err := old.handOver(who); err != nil {
		t.Fatal(err)
	}
	if err := <-taken; err != nil {
		t.Fatal(err)
	}

	// The later one can tell that the other still runs, and the other that it
	// does.
	brief, cancel := context.WithCancel(t.Context())
	cancel()
	if next.waitForPredecessors(brief) {
		t.Error("the process that served before is taken for ended")
	}
	back := make(chan bool, 1)
	go func() { back <- old.waitWhileHandedOver(t.Context()) }()
	next.release()
	for _, c := range next.predecessors { // as the end of its process does
		c.Close()
	}
	if !<-back {
		t.Error("the paused process was not told that it serves again")
	}
	if err := old.acquire(t.Context()); err != nil {
		t.Error(err)
	}
}

// A predecessor that ends while it is waited for lets the other be alone.
func TestNodeLockOfOneThatEnds(t *testing.T) {
	newLock := nodeLocksFor(t)
	old, next := newLock(), newLock()
	if err := old.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	go func() {
		if who := old.nextContender(t.Context()); who != nil {
			if err := old.handOver(who); err != nil {
				t.Error(err)
			}
		}
	}()
	if err := next.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	alone := make(chan bool, 1)
	go func() { alone <- next.waitForPredecessors(t.Context()) }()
	old.successor.conn.Close()
	if !<-alone {
		t.Error("the other's end was not noticed")
	}
}

// The wait for a holder that says nothing ends. A client that sends something else
// does not cost the holder the lock.
func TestNodeLockOfStrangers(t *testing.T) {
	newLock := nodeLocksFor(t)
	next := newLock()
	next.handoverTimeout = 50 * time.Millisecond
	mute, err := net.ListenUnix("unix", &net.UnixAddr{Name: next.name, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if err := next.acquire(t.Context()); err == nil {
		t.Error("the lock was acquired from a holder that does not answer")
	}
	mute.Close()
	if err := next.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}

	waiting := make(chan *contender, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { waiting <- next.nextContender(ctx) }()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: next.name, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := send(c, "hello\n"); err != nil {
		t.Fatal(err)
	}
	if err := receive(c, wordReleased); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("the answer to a strange word: %v", err)
	}
	cancel()
	if who := <-waiting; who != nil {
		t.Error("the lock was handed over to a stranger")
	}
}

// A client that connects and says nothing keeps nobody from acquiring the lock, nor
// the holder from ending.
func TestNodeLockWithMuteClient(t *testing.T) {
	newLock := nodeLocksFor(t)
	old, next := newLock(), newLock()
	if err := old.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	mute := func() {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: old.name, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	mute()
	old.requestTimeout = time.Hour
	ctx, cancel := context.WithCancel(t.Context())
	waiting := make(chan *contender, 1)
	go func() { waiting <- old.nextContender(ctx) }()
	cancel()
	if who := <-waiting; who != nil {
		t.Error("the lock was handed over to a client that did not request it")
	}

	mute()
	old.requestTimeout = time.Millisecond
	go func() {
		if who := old.nextContender(t.Context()); who != nil {
			if err := old.handOver(who); err != nil {
				t.Error(err)
			}
		}
	}()
	if err := next.acquire(t.Context()); err != nil {
		t.Error(err)
	}
}

// Two processes that ask at the same time acquire the lock one after the other: the
// second is not heard when the first gets it.
func TestNodeLockRequestedByTwo(t *testing.T) {
	newLock := nodeLocksFor(t)
	old, next, last := newLock(), newLock(), newLock()
	if err := old.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: old.name, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	old.release()
	if err := errors.Join(send(c, wordAcquire), receive(c, wordReleased)); !holderIsGone(err) {
		t.Errorf("who was not heard is told: %v", err)
	}

	if err := old.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	taken := make(chan *nodeLock, 2)
	for _, s := range []*nodeLock{next, last} {
		go func() {
			if err := s.acquire(t.Context()); err != nil {
				t.Error(err)
			}
			taken <- s
		}()
	}
	if err := old.handOver(old.nextContender(t.Context())); err != nil {
		t.Error(err)
	}
	first := <-taken
	if err := first.handOver(first.nextContender(t.Context())); err != nil {
		t.Error(err)
	}
	if <-taken == first {
		t.Error("one process acquired the lock twice")
	}
}
