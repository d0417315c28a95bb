package node

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/internal/wait"
)

// maxInterrupted is how often a listing that a change interrupted is begun
// anew.
const maxInterrupted = 10

// whole lists until no change interrupts it.
func whole[T any](list func() ([]T, error)) (all []T, err error) {
	err = netlink.ErrDumpInterrupted
	for try := 0; try < maxInterrupted && errors.Is(err, netlink.ErrDumpInterrupted); try++ {
		all, err = list()
	}
	return all, err
}

func openRoute() (*netlink.Handle, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket for this node's addresses and routes: %w", err)
	}
	return h, nil
}

// The wait before something is read again after a failure.
const (
	firstRetry = 50 * time.Millisecond
	lastRetry  = 5 * time.Second
)

// watch reads something of this node, and reads it again after changes.
type watch[Update any] struct {
	// subscribe has the kernel tell of changes. It closes updates when the
	// subscription ends.
	subscribe func(updates chan<- Update, done <-chan struct{}) error
	read      func(*netlink.Handle) error
	// pause is the least time between two readings.
	pause time.Duration
	retry time.Duration
}

// run reads until ctx is done, and returns nil then. It is an error that the
// kernel offers no netlink socket at all.
func (w watch[Update]) run(ctx context.Context) error {
	// Sockets that are opened later must be of the namespace that the caller
	// is in now. To name it would cost CAP_SYS_ADMIN, which a container has not.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	h, err := openRoute()
	if err != nil {
		return err
	}
	defer h.Close()
	w.retry = firstRetry
	for ctx.Err() == nil {
		if err := w.follow(ctx, h); err != nil {
			wait.For(ctx, w.retry)
			w.retry = min(2*w.retry, lastRetry)
		}
	}
	return nil
}

// follow reads at once and again after every change, until the subscription
// breaks (the kernel drops it where changes come faster than they are read) or
// reading fails.
func (w *watch[Update]) follow(ctx context.Context, h *netlink.Handle) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	updates := make(chan Update, 64)
	if err := w.subscribe(updates, ctx.Done()); err != nil {
		return fmt.Errorf("subscribing to changes: %w", err)
	}
	// The library's goroutine must never block on a list that nobody reads.
	defer func() {
		cancel()
		for range updates {
		}
	}()
	for {
		began := time.Now()
		if err := w.read(h); err != nil {
			return err
		}
		w.retry = firstRetry
		if w.pause > 0 {
			// A long list that changes all the time takes a tenth of a processor.
			wait.For(ctx, max(w.pause, 9*time.Since(began)))
		}
		select {
		case <-ctx.Done():
			return nil
		case _, open := <-updates:
			if !open {
				return nil
			}
		}
		for drained := false; !drained; {
			select {
			case _, open := <-updates:
				drained = !open
			default:
				drained = true
			}
		}
	}
}
