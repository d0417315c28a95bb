// SPDX-License-Identifier: Apache-2.0

package nodelock

import (
	"bufio"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/namespace"
	"signalbox/internal/nstest"
)

// locksFor makes handles of one lock that is the test's own.
func locksFor(t *testing.T) func() *Lock {
	name := "@signalbox-" + strings.NewReplacer("/", "-", " ", "-").Replace(t.Name())
	return func() *Lock {
		s := New(slog.New(slog.NewTextHandler(t.Output(), nil)), func() []string { return nil })
		s.abstract = name
		t.Cleanup(s.Release)
		return s
	}
}

// The later process acquires the lock as soon as it asks, and the earlier one gets
// it back when the later one ends.
func TestNodeLock(t *testing.T) {
	shared := t.TempDir()
	for name, dirs := range map[string][2]string{
		"abstract socket":   {"", ""},
		"shared directory":  {shared, shared},
		"own directories":   {t.TempDir(), t.TempDir()},
		"directory missing": {"", t.TempDir()},
	} {
		t.Run(name, func(t *testing.T) { testHandover(t, dirs) })
	}
}

func testHandover(t *testing.T, dirs [2]string) {
	newLock := locksFor(t)
	old, next := newLock(), newLock()
	if err := old.Acquire(t.Context(), dirs[0]); err != nil {
		t.Fatal(err)
	}
	taken := make(chan error, 1)
	go func() { taken <- next.Acquire(t.Context(), dirs[1]) }()
	who := old.NextContender(t.Context())
	select {
	case err := <-taken:
		t.Fatalf("the lock was acquired before it was handed over: %v", err)
	default:
	}
	if err := old.HandOver(who); err != nil {
		t.Fatal(err)
	}
	if err := <-taken; err != nil {
		t.Fatal(err)
	}

	// The later one can tell that the other still runs, and the other that it
	// does.
	brief, cancel := context.WithCancel(t.Context())
	cancel()
	if next.WaitForPredecessors(brief) {
		t.Error("the process that served before is taken for ended")
	}
	back := make(chan bool, 1)
	go func() { back <- old.WaitWhileHandedOver(t.Context()) }()
	next.Release()
	for _, c := range next.predecessors { // as the end of its process does
		c.Close()
	}
	if !<-back {
		t.Error("the paused process was not told that it serves again")
	}
	if err := old.Acquire(t.Context(), dirs[0]); err != nil {
		t.Error(err)
	}
}

// handedOver makes two handles of a lock. old has handed it over to next.
func handedOver(t *testing.T) (old, next *Lock) {
	t.Helper()
	newLock := locksFor(t)
	old, next = newLock(), newLock()
	if err := old.Acquire(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	go func() {
		if who := old.NextContender(t.Context()); who != nil {
			if err := old.HandOver(who); err != nil {
				t.Error(err)
			}
		}
	}()
	if err := next.Acquire(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	return old, next
}

// TestWaitEndsWithContext: a wait ends with its context, also if that has ended before, and
// does not end a later wait for the same process. The moments that matter are short, so it
// tries often.
func TestWaitEndsWithContext(t *testing.T) {
	_, next := handedOver(t)
	for range 100_000 {
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if next.WaitForPredecessors(ended) {
			t.Fatal("the process that served before is taken for ended")
		}
	}
	brief, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if next.WaitForPredecessors(brief) || brief.Err() == nil {
		t.Error("an earlier wait ends a later one")
	}
}

// A predecessor that ends while it is waited for lets the other be alone.
func TestNodeLockOfOneThatEnds(t *testing.T) {
	old, next := handedOver(t)
	alone := make(chan bool, 1)
	go func() { alone <- next.WaitForPredecessors(t.Context()) }()
	old.successor.conn.Close()
	if !<-alone {
		t.Error("the other's end was not noticed")
	}
}

// The wait for a holder that says nothing ends. A client that sends something else
// does not cost the holder the lock.
func TestNodeLockOfStrangers(t *testing.T) {
	newLock := locksFor(t)
	next := newLock()
	next.handoverTimeout = 50 * time.Millisecond
	mute, err := net.ListenUnix("unix", &net.UnixAddr{Name: next.abstract, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if err := next.Acquire(t.Context(), ""); err == nil {
		t.Error("the lock was acquired from a holder that does not answer")
	}
	mute.Close()
	if err := next.Acquire(t.Context(), ""); err != nil {
		t.Fatal(err)
	}

	waiting := make(chan *Contender, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { waiting <- next.NextContender(ctx) }()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: next.abstract, Net: "unix"})
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
	newLock := locksFor(t)
	old, next := newLock(), newLock()
	if err := old.Acquire(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	mute := func() {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: old.abstract, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	mute()
	old.requestTimeout = time.Hour
	ctx, cancel := context.WithCancel(t.Context())
	waiting := make(chan *Contender, 1)
	go func() { waiting <- old.NextContender(ctx) }()
	cancel()
	if who := <-waiting; who != nil {
		t.Error("the lock was handed over to a client that did not request it")
	}

	mute()
	old.requestTimeout = time.Millisecond
	go func() {
		if who := old.NextContender(t.Context()); who != nil {
			if err := old.HandOver(who); err != nil {
				t.Error(err)
			}
		}
	}()
	if err := next.Acquire(t.Context(), ""); err != nil {
		t.Error(err)
	}
}

// A holder without a descriptor hands the lock over once it has one again.
func TestNodeLockAfterDescriptorsRanOut(t *testing.T) {
	lock := locksFor(t)()
	logged := make(chan string, 10)
	lock.log = slog.New(slog.NewTextHandler(lineWriter(logged), nil))
	if err := lock.Acquire(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	client, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(client)
	proof, err := newProof()
	if err != nil {
		t.Fatal(err)
	}
	defer proof.Close()
	restore := nstest.NoDescriptors(t)
	waiting := make(chan *Contender, 1)
	go func() { waiting <- lock.NextContender(t.Context()) }()
	if err := unix.Connect(client, &unix.SockaddrUnix{Name: lock.abstract}); err != nil {
		t.Fatal(err)
	}
	if line := <-logged; !strings.Contains(line, "too many open files") {
		t.Errorf("the log says %q", line)
	}
	restore()
	if err := unix.Sendmsg(client, []byte(wordAcquire), unix.UnixRights(int(proof.Fd())), nil, 0); err != nil {
		t.Fatal(err)
	}
	if who := <-waiting; who == nil {
		t.Error("the request was not heard")
	} else {
		who.conn.Close()
	}
}

// lineWriter sends each line of a log.
type lineWriter chan string

func (w lineWriter) Write(b []byte) (int, error) {
	w <- string(b)
	return len(b), nil
}

// Clients that are refused do not fill the log.
func TestNodeLockLimitsTheLog(t *testing.T) {
	lock := locksFor(t)()
	logged := make(chan string, 1000)
	lock.log = slog.New(slog.NewTextHandler(lineWriter(logged), nil))
	if err := lock.Acquire(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { lock.NextContender(ctx); close(ended) }()
	for range 100 {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: lock.abstract, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		if err := send(c, "hello\n"); err != nil {
			t.Fatal(err)
		}
		if word, err := bufio.NewReader(c).ReadString('\n'); err == nil {
			t.Errorf("the answer to a stranger is %q", word)
		}
		c.Close()
	}
	cancel()
	<-ended
	if n := len(logged); n == 0 || n > 20 {
		t.Errorf("100 refused clients cause %d lines", n)
	}
}

// Two processes that ask at the same time acquire the lock one after the other: the
// second is not heard when the first gets it.
func TestNodeLockRequestedByTwo(t *testing.T) {
	newLock := locksFor(t)
	old, next, last := newLock(), newLock(), newLock()
	if err := old.Acquire(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: old.abstract, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	old.Release()
	if err := errors.Join(sendRequest(c), receive(c, wordReleased)); !holderIsGone(err) {
		t.Errorf("who was not heard is told: %v", err)
	}

	if err := old.Acquire(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	taken := make(chan *Lock, 2)
	for _, s := range []*Lock{next, last} {
		go func() {
			if err := s.Acquire(t.Context(), ""); err != nil {
				t.Error(err)
			}
			taken <- s
		}()
	}
	if err := old.HandOver(old.NextContender(t.Context())); err != nil {
		t.Error(err)
	}
	first := <-taken
	if err := first.HandOver(first.NextContender(t.Context())); err != nil {
		t.Error(err)
	}
	if <-taken == first {
		t.Error("one process acquired the lock twice")
	}
}

// A process that was killed leaves its socket, and the next one serves.
func TestNodeLockAfterKill(t *testing.T) {
	newLock := locksFor(t)
	killed, next := newLock(), newLock()
	dir := t.TempDir()
	if err := killed.Acquire(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	for _, p := range killed.held {
		p.listener.Close() // and leaves its socket in the directory
		if p.file != nil {
			p.file.Close()
		}
	}
	killed.held = nil
	if err := next.Acquire(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if len(next.held) != 2 || next.TookOver() {
		t.Errorf("%d places are held, and another process handed over: %v", len(next.held), next.TookOver())
	}
}

// A process that has taken the name of the abstract socket keeps nobody from serving.
func TestNodeLockWithoutAbstractSocket(t *testing.T) {
	lock := locksFor(t)()
	lock.handoverTimeout = 50 * time.Millisecond
	mute, err := net.ListenUnix("unix", &net.UnixAddr{Name: lock.abstract, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	logged := make(chan string, 10)
	lock.log = slog.New(slog.NewTextHandler(lineWriter(logged), nil))
	if err := lock.Acquire(t.Context(), t.TempDir()); err != nil {
		t.Fatal(err)
	}
	if line := <-logged; !strings.Contains(line, "does not have the node lock's abstract socket") {
		t.Errorf("the log says %q", line)
	}
}

// A place that cannot be had for want of a descriptor is tried again.
func TestNodeLockIsTriedAgain(t *testing.T) {
	lock := locksFor(t)()
	tries := 0
	err := lock.acquireAt(t.Context(), lock.abstract, func() (*heldPlace, error) {
		if tries++; tries < 3 {
			return nil, os.NewSyscallError("socket", unix.EMFILE)
		}
		return listenAbstract(lock.abstract)
	})
	if err != nil || !lock.Held() {
		t.Errorf("after %d tries: %v", tries, err)
	}
}

// A process that says that it hands the lock over, and keeps it, is asked a few times only.
// It is no predecessor.
func TestNodeLockOfFalseHolder(t *testing.T) {
	shared := t.TempDir()
	for name, test := range map[string]struct {
		dir         string
		beforehand  func(t *testing.T, newLock func() *Lock)
		wantsPlaces int
	}{
		"abstract socket alone": {"", nil, 0},
		"directory":             {t.TempDir(), nil, 1},
		"directory of a holder without its socket": {shared, func(t *testing.T, newLock func() *Lock) {
			if _, err := newLock().acquireInDirectory(t.Context(), shared); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(socketIn(t, shared)); err != nil {
				t.Fatal(err)
			}
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			newLock := locksFor(t)
			lock := newLock()
			if test.beforehand != nil {
				test.beforehand(t, newLock)
			}
			lock.handoverTimeout = time.Second
			logged := make(chan string, 1_000_000)
			lock.log = slog.New(slog.NewTextHandler(lineWriter(logged), nil))
			open := falseHolder(t, lock.abstract)
			err := lock.Acquire(t.Context(), test.dir)
			if held := test.wantsPlaces > 0; held != (err == nil) || !held && !errors.Is(err, errHeld) || len(lock.held) != test.wantsPlaces {
				t.Errorf("%d places are held: %v", len(lock.held), err)
			}
			if lock.TookOver() {
				t.Error("the false holder is a predecessor")
			}
			if n := len(logged); n > test.wantsPlaces {
				t.Errorf("the log has %d lines", n)
			}
			if n := open(); n > 10 {
				t.Errorf("the false holder was asked %d times", n)
			}
		})
	}
}

// falseHolder says to each client that it hands the lock over, and keeps the name. The
// returned function waits until the clients have gone, and returns how many there were.
func falseHolder(t *testing.T, name string) (clients func() int) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	var connections sync.WaitGroup
	accepted := make(chan int)
	go func() {
		n := 0
		for ; ; n++ {
			c, err := l.AcceptUnix()
			if err != nil {
				break
			}
			connections.Go(func() {
				defer c.Close()
				_ = send(c, wordReleased) // fails if the client has gone
				waitForEnd(t.Context(), c)
			})
		}
		connections.Wait()
		accepted <- n
	}()
	return func() int {
		l.Close()
		return <-accepted
	}
}

// A directory that cannot have the lock leaves the abstract socket. A process without a
// descriptor tries again instead.
func TestNodeLockWithoutDirectory(t *testing.T) {
	dir := t.TempDir()
	file, long := filepath.Join(dir, "file"), filepath.Join(dir, strings.Repeat("long", 30))
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	noLocks := filepath.Join(dir, "no-locks")
	if err := os.MkdirAll(filepath.Join(noLocks, lockFile), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, dir := range map[string]string{"not a directory": file, "long path": long, "cannot open the lock file": noLocks} {
		t.Run(name, func(t *testing.T) {
			lock := locksFor(t)()
			if err := lock.Acquire(t.Context(), dir); err != nil || len(lock.held) != 1 {
				t.Errorf("%d places are held: %v", len(lock.held), err)
			}
		})
	}
	for _, err := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if !isTransient(&os.PathError{Err: err}) {
			t.Errorf("the lock does not wait for the end of %v", err)
		}
	}
}

// A holder whose socket has been deleted hands over at its abstract socket.
func TestNodeLockWithoutItsSocket(t *testing.T) {
	newLock := locksFor(t)
	old, next := newLock(), newLock()
	dir := t.TempDir()
	if err := old.Acquire(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(socketIn(t, dir)); err != nil {
		t.Fatal(err)
	}
	handOverTo(t, old, next, dir)
	if len(next.held) != 2 {
		t.Errorf("%d places are held", len(next.held))
	}
}

// A holder whose lock file has been deleted leaves the next holder's socket.
func TestReleaseLeavesOtherSockets(t *testing.T) {
	newLock := locksFor(t)
	old, next := newLock(), newLock()
	dir := t.TempDir()
	if err := old.Acquire(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, lockFile)); err != nil {
		t.Fatal(err)
	}
	handOverTo(t, old, next, dir)
	if _, err := os.Stat(socketIn(t, dir)); err != nil {
		t.Error(err)
	}
	next.Release()
	if _, err := os.Stat(socketIn(t, dir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after its own release: %v", err)
	}
}

func socketIn(t *testing.T, dir string) string {
	t.Helper()
	id, err := namespace.Current()
	if err != nil {
		t.Fatal(err)
	}
	return socketPath(dir, id)
}

// handOverTo has next acquire the lock that old holds.
func handOverTo(t *testing.T, old, next *Lock, dir string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	handedOver := make(chan error, 1)
	go func() {
		who := old.NextContender(ctx)
		if who == nil {
			handedOver <- ctx.Err()
			return
		}
		handedOver <- old.HandOver(who)
	}()
	if err := next.Acquire(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := <-handedOver; err != nil {
		t.Error(err)
	}
}
