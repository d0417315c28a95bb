package conntrack

import (
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
	"signalbox/proxier"
)

// Options is what a Cleaner is made of.
type Options struct {
	// LocalAddrs returns the addresses of this node, of both families. It is
	// asked before each pass that is about NodePorts. Where it fails, its last
	// answer counts.
	LocalAddrs func() ([]netip.Addr, error)
	// Relays are addresses at which a relay of this node takes flows in. It
	// decides with each datagram where that goes; so a flow that is translated
	// to one of them is kept for as long as anybody serves its Service.
	Relays []netip.Prefix
	// Logger is slog.Default() when nil.
	Logger *slog.Logger
	// Passed is told about every pass over the table; may be nil. It is called
	// by the Cleaner's goroutine.
	Passed func(Pass)
	// Settle is how long after its first pass a frontend is looked at again;
	// a second when zero.
	Settle time.Duration
}

// Pass says what one pass over the table of a family did.
type Pass struct {
	Family    proxier.Family
	Frontends int // frontends whose flows were looked for
	Deleted   int // flows that were removed
	Took      time.Duration
	Err       error // the frontends are due again
}

// defaultSettle outlasts a packet's way through the kernel. A packet that was
// looked up in the rules just before they changed makes an entry in the table
// only when it leaves (or reaches a local socket), which can be after the first
// pass; a second one finds its flow.
const defaultSettle = time.Second

// The wait before a failed pass is tried again.
const (
	firstRetry = 100 * time.Millisecond
	lastRetry  = 30 * time.Second
)

// maxInterrupted is how often an interrupted listing is begun anew before the
// pass counts as failed.
const maxInterrupted = 5

// Cleaner implements proxier.FlowCleaner in the network namespace in which it
// was made. Each batch of changes costs one listing of the family's UDP flows,
// on a goroutine of its own; what is queued meanwhile is one batch.
type Cleaner struct {
	opts   Options
	table  *table
	cancel context.CancelFunc
	done   chan struct{} // closed when the goroutine has ended
	wake   chan struct{} // holds one token while there is something new

	mu      sync.Mutex // guards what follows
	queued  map[proxier.Family]duties
	asked   uint64 // calls of Clean so far
	settled uint64 // those of them that had their first pass
	passed  *sync.Cond

	// The goroutine's own.
	duties map[proxier.Family]duties
	local  []netip.Addr
	retry  time.Duration
}

var _ proxier.FlowCleaner = (*Cleaner)(nil)

// New returns a Cleaner for the caller's network namespace, or an
// UnsupportedError.
func New(opts Options) (*Cleaner, error) {
	if opts.LocalAddrs == nil {
		return nil, errors.New("conntrack: Options.LocalAddrs is not set")
	}
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}
	if opts.Settle == 0 {
		opts.Settle = defaultSettle
	}
	t, err := openTable()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &Cleaner{
		opts: opts, table: t, cancel: cancel,
		done: make(chan struct{}), wake: make(chan struct{}, 1),
		queued: map[proxier.Family]duties{}, duties: map[proxier.Family]duties{},
	}
	c.passed = sync.NewCond(&c.mu)
	go c.run(ctx)
	return c, nil
}

// Clean implements proxier.FlowCleaner.
func (c *Cleaner) Clean(family proxier.Family, owners []proxier.FlowOwner) {
	c.mu.Lock()
	queued := c.queued[family]
	if queued == nil {
		queued = duties{}
		c.queued[family] = queued
	}
	for _, o := range owners {
		for _, key := range o.Frontends {
			queued[key] = duty{serving: o.Serving}
		}
	}
	c.asked++
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Flush waits until everything that was queued before the call had its first
// pass without a failure.
func (c *Cleaner) Flush(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.passed.Broadcast()
	})
	defer stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for want := c.asked; c.settled < want; c.passed.Wait() {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("flushing stale flows: %w", err)
		}
	}
	return nil
}

// Close ends the Cleaner. What is queued and not yet begun is left undone.
func (c *Cleaner) Close() error {
	c.cancel()
	<-c.done
	c.table.close()
	return nil
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
		due := c.round(ctx)
		again.Stop()
		if !due.IsZero() {
			again.Reset(time.Until(due))
		}
		// In a storm of changes listing the table takes a fifth of the time
		// of one processor and no more; a lone change never waits.
		if !wait.For(ctx, min(4*time.Since(began), time.Second)) {
			return
		}
	}
}

// round makes one pass over each family that has something due and returns
// when the next is; zero for never.
func (c *Cleaner) round(ctx context.Context) (next time.Time) {
	asked := c.take()
	failed := false
	for _, family := range proxier.Families {
		if d := c.duties[family]; len(d) > 0 {
			failed = c.pass(ctx, family, d) != nil || failed
			for _, at := range d {
				if !at.until.IsZero() && (next.IsZero() || at.until.Before(next)) {
					next = at.until
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
	c.settled = asked
	c.passed.Broadcast()
	c.mu.Unlock()
	return next
}

// take joins what is queued to what is still being done; the later word about
// a frontend counts. It returns how many calls of Clean that covers.
func (c *Cleaner) take() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	for family, queued := range c.queued {
		if c.duties[family] == nil {
			c.duties[family] = queued
		} else {
			for key, d := range queued {
				c.duties[family][key] = d
			}
		}
		delete(c.queued, family)
	}
	return c.asked
}

// pass removes the stale flows of one family, and ends the duties that are
// over.
func (c *Cleaner) pass(ctx context.Context, family proxier.Family, d duties) error {
	began := time.Now()
	deleted, err := c.clean(ctx, family, d)
	report := Pass{Family: family, Frontends: len(d), Deleted: deleted, Took: time.Since(began), Err: err}
	for key, at := range d {
		switch {
		case err != nil:
		case at.until.IsZero():
			at.until = time.Now().Add(c.opts.Settle)
			d[key] = at
		case !began.Before(at.until):
			delete(d, key)
		}
	}
	log := c.opts.Logger.With("family", family.String())
	switch {
	case err != nil && ctx.Err() == nil && c.retry == 0:
		log.Warn("stale UDP flows could not be removed; trying again", "error", err)
	case deleted > 0:
		log.Debug("stale UDP flows removed", "flows", deleted, "frontends", report.Frontends, "took", report.Took)
	}
	if c.opts.Passed != nil {
		c.opts.Passed(report)
	}
	return err
}

func (c *Cleaner) clean(ctx context.Context, family proxier.Family, d duties) (deleted int, err error) {
	if d.nodePorts() {
		c.readLocal()
	}
	var handles [][]byte
	for range maxInterrupted {
		err = c.table.each(family, func(f *flow) {
			if d.stale(f, c.isLocal, c.isRelay) {
				handles = append(handles, slices.Clone(f.handle))
			}
		})
		// What an interrupted listing did find goes at once; the next try
		// does not find it again.
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
	return slices.ContainsFunc(c.opts.Relays, func(p netip.Prefix) bool { return p.Contains(a) })
}

func (c *Cleaner) isLocal(a netip.Addr) bool {
	return a.IsLoopback() || slices.Contains(c.local, a)
}
