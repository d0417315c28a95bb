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

// seatsFor makes seats of one place that is the test's own.
func seatsFor(t *testing.T) func() *seat {
	name := "@signalbox-" + strings.ReplaceAll(t.Name(), "/", "-")
	return func() *seat {
		s := newSeat(slog.New(slog.NewTextHandler(t.Output(), nil)), func() []string { return nil })
		s.name = name
		t.Cleanup(s.leave)
		return s
	}
}

// The later one gets the seat as soon as it asks, and the earlier one gets it
// back when the later one ends.
func TestSeat(t *testing.T) {
	newSeat := seatsFor(t)
	old, next := newSeat(), newSeat()
	if err := old.take(t.Context()); err != nil {
		t.Fatal(err)
	}
	taken := make(chan error, 1)
	go func() { taken <- next.take(t.Context()) }()
	who := old.waits(t.Context())
	select {
	case err := <-taken:
		t.Fatalf("the seat was taken before it was given: %v", err)
	default:
	}
	if err := old.give(who); err != nil {
		t.Fatal(err)
	}
	if err := <-taken; err != nil {
		t.Fatal(err)
	}

	// The later one can tell that the other still runs, and the other that it
	// does.
	brief, cancel := context.WithCancel(t.Context())
	cancel()
	if next.alone(brief) {
		t.Error("the process that served before is taken for ended")
	}
	back := make(chan bool, 1)
	go func() { back <- old.standBy(t.Context()) }()
	next.leave()
	for _, c := range next.before { // as the end of its process does
		c.Close()
	}
	if !<-back {
		t.Error("the process that stood by was not told that it serves again")
	}
	if err := old.take(t.Context()); err != nil {
		t.Error(err)
	}
}

// A predecessor that ends while it is waited for lets the other be alone.
func TestSeatOfOneThatEnds(t *testing.T) {
	newSeat := seatsFor(t)
	old, next := newSeat(), newSeat()
	if err := old.take(t.Context()); err != nil {
		t.Fatal(err)
	}
	go func() {
		if who := old.waits(t.Context()); who != nil {
			old.give(who)
		}
	}()
	if err := next.take(t.Context()); err != nil {
		t.Fatal(err)
	}
	alone := make(chan bool, 1)
	go func() { alone <- next.alone(t.Context()) }()
	old.after.conn.Close()
	if !<-alone {
		t.Error("the other's end was not noticed")
	}
}

// Who holds the seat and says nothing is not waited for for ever; nor does
// something else that is said on the socket cost anybody the seat.
func TestSeatOfStrangers(t *testing.T) {
	newSeat := seatsFor(t)
	next := newSeat()
	next.patience = 50 * time.Millisecond
	mute, err := net.ListenUnix("unix", &net.UnixAddr{Name: next.name, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if err := next.take(t.Context()); err == nil {
		t.Error("the seat was taken from one that does not answer")
	}
	mute.Close()
	if err := next.take(t.Context()); err != nil {
		t.Fatal(err)
	}

	waiting := make(chan *successor, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { waiting <- next.waits(ctx) }()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: next.name, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := tell(c, "hello\n"); err != nil {
		t.Fatal(err)
	}
	if err := hear(c, wordGiven); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("the answer to a strange word: %v", err)
	}
	cancel()
	if who := <-waiting; who != nil {
		t.Error("the seat was given to a stranger")
	}
}

// Somebody who holds a connection to the seat and says nothing keeps nobody
// from taking it, nor the holder from ending.
func TestSeatWithMuteClient(t *testing.T) {
	newSeat := seatsFor(t)
	old, next := newSeat(), newSeat()
	if err := old.take(t.Context()); err != nil {
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
	old.hearing = time.Hour
	ctx, cancel := context.WithCancel(t.Context())
	waiting := make(chan *successor, 1)
	go func() { waiting <- old.waits(ctx) }()
	cancel()
	if who := <-waiting; who != nil {
		t.Error("the seat was given to somebody who did not ask for it")
	}

	mute()
	old.hearing = time.Millisecond
	go func() {
		if who := old.waits(t.Context()); who != nil {
			old.give(who)
		}
	}()
	if err := next.take(t.Context()); err != nil {
		t.Error(err)
	}
}

// Two that ask at a time both get the seat, one after the other: the second is
// not heard when it is given to the first.
func TestSeatAskedForByTwo(t *testing.T) {
	newSeat := seatsFor(t)
	old, next, last := newSeat(), newSeat(), newSeat()
	if err := old.take(t.Context()); err != nil {
		t.Fatal(err)
	}
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: old.name, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	old.leave()
	if err := errors.Join(tell(c, wordTake), hear(c, wordGiven)); !hasLetGo(err) {
		t.Errorf("who was not heard is told: %v", err)
	}

	if err := old.take(t.Context()); err != nil {
		t.Fatal(err)
	}
	taken := make(chan *seat, 2)
	for _, s := range []*seat{next, last} {
		go func() {
			if err := s.take(t.Context()); err != nil {
				t.Error(err)
			}
			taken <- s
		}()
	}
	old.give(old.waits(t.Context()))
	first := <-taken
	first.give(first.waits(t.Context()))
	if <-taken == first {
		t.Error("the seat was taken by one process twice")
	}
}
