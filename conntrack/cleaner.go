// SPDX-License-Identifier: Apache-2.0

package conntrack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"signalbox/internal/wait"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// Options are the parameters of New.
type Options struct {
	// LocalAddrs returns the addresses of this node, of both families. It is
	// called before each scan that concerns NodePorts. If it fails, the last known
	// addresses count.
	LocalAddrs func() ([]netip.Addr, error)
	// Relays are addresses of a relay on this node. It chooses an endpoint for
	// each datagram; so a flow that is translated to a relay stays as long as its
	// Service has endpoints.
	Relays []netip.Prefix
	// Logger is slog.Default() when nil.
	Logger *slog.Logger
	// Opened is called after every try to open the table, with its error; may be nil.
	Opened func(error)
	// Scanned is called after every scan of the table, by the Cleaner's goroutine;
	// may be nil.
	Scanned func(Scan)
	// RecheckAfter is the time between the two scans for a frontend; a second
	// when zero.
	RecheckAfter time.Duration
}

// Scan is the result of one scan of a family's flows.
type Scan struct {
	Family    plan.Family
	Frontends int // frontends whose flows were looked for
	Deleted   int // flows that were removed
	Took      time.Duration
	Err       error // the same frontends are scanned for again
}

// defaultRecheck is longer than a packet's way through the kernel. A packet that
// met the old rules makes its entry in the table only when it leaves the node or
// reaches a local socket. That can be after the first scan; the second finds it.
const defaultRecheck = time.Second

// The pause after a failed scan.
const (
	firstRetry = 100 * time.Millisecond
	lastRetry  = 30 * time.Second
)

// maxInterrupted is how many listings in a row may be interrupted before the scan
// counts as failed.
const maxInterrupted = 5

// Cleaner implements syncer.FlowCleaner in the network namespace in which it
// was made. Its goroutine lists a family's UDP flows once for each batch of
// changes, and its TCP flows if endpoints were removed. Changes that are queued
// meanwhile are the next batch.
type Cleaner struct {
	opts   Options
	cancel context.CancelFunc
	done   chan struct{} // closed when the goroutine has ended
	wake   chan struct{} // holds one token while there is something new

	mu      sync.Mutex // guards what follows
	queued  map[plan.Family]tasks
	calls   uint64     // of Clean so far
	scanned uint64     // calls whose first scan has succeeded
	changed *sync.Cond // of scanned
	closed  error      // why the table is not open

	// Used by the goroutine alone, and by New.
	table *table // nil: not open
	tasks map[plan.Family]tasks
	local []netip.Addr
	retry time.Duration
}

var _ syncer.FlowCleaner = (*Cleaner)(nil)

// New returns a Cleaner for the caller's network namespace. If it cannot open the connection
// tracking table, the Cleaner tries again, in the process's own namespace.
func New(opts Options) (*Cleaner, error) {
	if opts.LocalAddrs == nil {
		return nil, errors.New("conntrack: Options.LocalAddrs is not set")
	}
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}
	if opts.RecheckAfter == 0 {
		opts.RecheckAfter = defaultRecheck
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &Cleaner{
		opts: opts, cancel: cancel,
		done: make(chan struct{}), wake: make(chan struct{}, 1),
		queued: map[plan.Family]tasks{}, tasks: map[plan.Family]tasks{},
	}
	c.changed = sync.NewCond(&c.mu)
	if c.open() != nil {
		wait.Wake(c.wake)
	}
	go c.run(ctx)
	return c, nil
}

// open opens the table if it is not open. A process may have no free descriptor, or the
// kernel may load the module later.
func (c *Cleaner) open() error {
	if c.table != nil {
		return nil
	}
	t, err := openTable()
	if err == nil {
		c.table = t
	}
	c.mu.Lock()
	isNew := err != nil && c.closed == nil
	c.closed = err
	c.mu.Unlock()
	if isNew {
		c.opts.Logger.Warn("stale UDP flows, and TCP connections to removed endpoints, are not removed yet; signalbox tries again", "error", err)
	}
	if c.opts.Opened != nil {
		c.opts.Opened(err)
	}
	return err
}

// Clean implements syncer.FlowCleaner.
func (c *Cleaner) Clean(family plan.Family, owners []plan.FlowOwner) {
	c.mu.Lock()
	queued := c.queued[family]
	if queued == nil {
		queued = tasks{}
		c.queued[family] = queued
	}
	for _, o := range owners {
		for _, key := range o.Frontends {
			queued.put(key, task{usable: o.Usable, removed: o.Removed})
		}
	}
	c.calls++
	c.mu.Unlock()
	wait.Wake(c.wake)
}

// Flush waits until the first scan for everything that was queued before the
// call has succeeded. It fails while the table cannot be opened.
func (c *Cleaner) Flush(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.changed.Broadcast()
	})
	defer stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for want := c.calls; c.scanned < want; c.changed.Wait() {
		if err := cmp.Or(ctx.Err(), c.closed); err != nil {
			return fmt.Errorf("flushing stale flows: %w", err)
		}
	}
	return nil
}

// Close ends the Cleaner. It does not wait for queued changes.
func (c *Cleaner) Close() {
	c.cancel()
	<-c.done
	if c.table != nil {
		c.table.close()
	}
}

func (c *Cleaner) run(ctx context.Context) {
	defer close(c.done)
	again := time.NewTimer(0)
	again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
		case <-again.C:
		}
		began := time.Now()
		due := c.scanAll(ctx)
		again.Stop()
		if !due.IsZero() {
			again.Reset(time.Until(due))
		}
		// In a storm of changes, scans of up to 0.25 s take a fifth of one processor.
		// Longer scans take more, so that no change waits longer than 1 s and a scan.
		// A single change never waits.
		if !wait.For(ctx, min(4*time.Since(began), time.Second)) {
			return
		}
	}
}

// scanAll scans the flows of each family that has tasks, and returns when the next
// scan is due; zero for never.
func (c *Cleaner) scanAll(ctx context.Context) (next time.Time) {
	calls := c.drain()
	failed := c.open() != nil
	for _, family := range plan.Families {
		if t := c.tasks[family]; len(t) > 0 && c.table != nil {
			failed = c.scan(ctx, family, t) != nil || failed
			for _, task := range t {
				if !task.recheck.IsZero() && (next.IsZero() || task.recheck.Before(next)) {
					next = task.recheck
				}
			}
		}
	}
	if failed {
		c.retry = min(max(firstRetry, 2*c.retry), lastRetry)
		return time.Now().Add(c.retry)
	}
	c.retry = 0
	c.mu.Lock()
	c.scanned = calls
	c.changed.Broadcast()
	c.mu.Unlock()
	return next
}

// drain moves the queue into the tasks; for each frontend the latest task counts.
// It returns the number of calls of Clean that the tasks cover.
func (c *Cleaner) drain() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	for family, queued := range c.queued {
		if c.tasks[family] == nil {
			c.tasks[family] = queued
		} else {
			for key, task := range queued {
				c.tasks[family].put(key, task)
			}
		}
	}
	clear(c.queued)
	return c.calls
}

// scan removes the stale flows of one family. A task ends with its second scan.
func (c *Cleaner) scan(ctx context.Context, family plan.Family, t tasks) error {
	began := time.Now()
	deleted, err := c.removeStale(ctx, family, t)
	result := Scan{Family: family, Frontends: len(t), Deleted: deleted, Took: time.Since(began), Err: err}
	for key, task := range t {
		switch {
		case err != nil:
		case task.recheck.IsZero():
			task.recheck = time.Now().Add(c.opts.RecheckAfter)
			t[key] = task
		case !began.Before(task.recheck):
			delete(t, key)
		}
	}
	log := c.opts.Logger.With("family", family.String())
	switch {
	case err != nil && ctx.Err() == nil && c.retry == 0:
		log.Warn("stale flows could not be removed; trying again", "error", err)
	case deleted > 0:
		log.Debug("stale flows removed", "flows", deleted, "frontends", result.Frontends, "took", result.Took)
	}
	if c.opts.Scanned != nil {
		c.opts.Scanned(result)
	}
	return err
}

func (c *Cleaner) removeStale(ctx context.Context, family plan.Family, t tasks) (deleted int, err error) {
	if t.haveNodePorts() {
		c.readLocal()
	}
	var handles [][]byte
	for range maxInterrupted {
		err = nil
		for _, protocol := range t.protocols() {
			err = errors.Join(err, c.table.each(family, protocol, func(f *flow) {
				if t.stale(f, c.isLocal, c.isRelay) {
					handles = append(handles, slices.Clone(f.handle))
				}
			}))
		}
		// Flows that an interrupted listing found are removed at once.
		for _, h := range handles {
			if ctx.Err() != nil {
				return deleted, ctx.Err()
			}
			if e := c.table.remove(family, h); e != nil {
				return deleted, errors.Join(err, e)
			}
			deleted++
		}
		handles = handles[:0]
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return deleted, err
}

func (c *Cleaner) readLocal() {
	local, err := c.opts.LocalAddrs()
	if err != nil || len(local) == 0 {
		c.opts.Logger.Warn("this node's addresses could not be read; the last known ones count for flows to NodePorts", "error", err)
		return
	}
	c.local = local
}

func (c *Cleaner) isRelay(a netip.Addr) bool {
	return plan.AnyContains(c.opts.Relays, a)
}

func (c *Cleaner) isLocal(a netip.Addr) bool {
	return a.IsLoopback() || slices.Contains(c.local, a)
}
