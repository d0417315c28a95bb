// SPDX-License-Identifier: Apache-2.0

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

// Whole lists until no change interrupts it.
func Whole[T any](list func() ([]T, error)) (all []T, err error) {
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

// maxSettle bounds the wait for a quiet moment while changes never end.
const maxSettle = time.Second

// Changes reads something of the kernel at once, and again after changes that the kernel
// tells.
type Changes[Update any] struct {
	// Subscribe has the kernel tell of changes. It closes updates when the
	// subscription ends. The kernel ends it where changes come faster than they are read.
	Subscribe func(updates chan<- Update, done <-chan struct{}) error
	// Concerns says whether to read after an update. Without it, each update counts.
	Concerns func(Update) bool
	Read     func() error
	// Quiet is the time without such an update after which Read is called.
	Quiet time.Duration
	// Pause is the least time between two readings.
	Pause time.Duration
	retry time.Duration
}

// Follow reads until ctx is done. What fails is tried again.
func (c Changes[Update]) Follow(ctx context.Context) {
	c.retry = firstRetry
	for ctx.Err() == nil {
		if err := c.follow(ctx); err != nil {
			wait.For(ctx, c.retry)
			c.retry = min(2*c.retry, lastRetry)
		}
	}
}

// follow reads at once and after each update that concerns, until the subscription ends or
// reading fails.
func (c *Changes[Update]) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	updates := make(chan Update, 64)
	if err := c.Subscribe(updates, ctx.Done()); err != nil {
		return fmt.Errorf("subscribing to changes: %w", err)
	}
	// The library's goroutine must never block on a list that nobody reads.
	defer func() {
		cancel()
		for range updates {
		}
	}()
	for {
		c.settle(ctx, updates)
		began := time.Now()
		if err := c.Read(); err != nil {
			return err
		}
		c.retry = firstRetry
		if c.Pause > 0 {
			// A long list that changes all the time takes a tenth of a processor.
			wait.For(ctx, max(c.Pause, 9*time.Since(began)))
		}
		for concerns := false; !concerns; {
			select {
			case <-ctx.Done():
				return nil
			case u, open := <-updates:
				if !open {
					return nil
				}
				concerns = c.concerns(u)
			}
		}
	}
}

func (c *Changes[Update]) concerns(u Update) bool { return c.Concerns == nil || c.Concerns(u) }

// settle takes updates until none that concerns has come for Quiet.
func (c *Changes[Update]) settle(ctx context.Context, updates <-chan Update) {
	end := time.Now().Add(maxSettle)
	for more := true; more && time.Now().Before(end); {
		more = wait.For(ctx, c.Quiet) && c.drain(updates) && c.Quiet > 0
	}
}

// drain takes the updates that are there, and says whether one of them concerns.
func (c *Changes[Update]) drain(updates <-chan Update) (concerns bool) {
	for {
		select {
		case u, open := <-updates:
			if !open {
				return false
			}
			concerns = c.concerns(u) || concerns
		default:
			return concerns
		}
	}
}

// withRoute calls do with a netlink socket for addresses and routes. It is an error that
// the kernel offers none.
func withRoute(do func(*netlink.Handle)) error {
	// Sockets that are opened later must be of the namespace that the caller
	// is in now. To name it would cost CAP_SYS_ADMIN, which a container has not.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	h, err := openRoute()
	if err != nil {
		return err
	}
	defer h.Close()
	do(h)
	return nil
}
