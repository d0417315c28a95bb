package daemon

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"signalbox/modes"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// dataplanes are the Proxiers at work. They outlive a change of the
// configuration that does not concern them: a relay would lose its connections
// otherwise, and a table would have to be read back from the kernel.
type dataplanes struct {
	used map[planeKey]bool // by the configuration in force
	// serving says that every plane that is used was synced under the
	// configuration in force.
	serving atomic.Bool

	mu       sync.Mutex // guards what follows
	open     map[planeKey]proxier.Proxier
	retiring map[planeKey]*retiree
	// ended is what relays counted that are closed.
	ended map[plan.Family]proxier.RelayStats
	// endedListeners counts failures to listen on loopback, of closed Proxiers.
	endedListeners map[plan.Family]uint64
}

type planeKey struct {
	mode string
	opts proxier.Options
}

// retiree is a plane that is not used any more and has connections open.
type retiree struct {
	plane  proxier.Proxier
	recall context.CancelFunc
	gone   chan struct{} // closed when it has been closed, or recalled
}

func newDataplanes() *dataplanes {
	return &dataplanes{
		used: map[planeKey]bool{}, open: map[planeKey]proxier.Proxier{},
		retiring: map[planeKey]*retiree{}, ended: map[plan.Family]proxier.RelayStats{}, endedListeners: map[plan.Family]uint64{},
	}
}

// begin is called for each configuration before what it uses is asked for.
func (d *dataplanes) begin() {
	d.used = map[planeKey]bool{}
	d.serving.Store(false)
}

// get returns the Proxier of a mode, which may have been at work before.
func (d *dataplanes) get(mode proxier.Mode, opts proxier.Options) (proxier.Proxier, error) {
	key := planeKey{mode.Name(), opts}
	p := d.atHand(key)
	if p == nil {
		var err error
		if p, err = mode.New(opts); err != nil {
			return nil, err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open[key] = p
	d.used[key] = true
	return p, nil
}

// atHand returns a plane that is open, or that was about to be closed and is not
// any more, or nil.
func (d *dataplanes) atHand(key planeKey) proxier.Proxier {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.retiring[key]
	if r == nil {
		return d.open[key]
	}
	delete(d.retiring, key)
	r.recall()
	return r.plane
}

// serve is called when every plane that is used was synced. Those of an earlier
// configuration, which packets went through until then, are closed, or once no
// connection passes through them.
func (d *dataplanes) serve(log *slog.Logger) {
	d.serving.Store(true)
	d.mu.Lock()
	defer d.mu.Unlock()
	for key, p := range d.open {
		if d.used[key] {
			continue
		}
		delete(d.open, key)
		if p.Relays() {
			d.retire(key, p, log)
		} else {
			logClosing(d.end(key, p), log)
		}
	}
	for key, r := range d.retiring {
		// Listeners at NodePorts get connections without any rule.
		if !modes.TraitsOf(key.mode).RelaysByRules || d.replaced(key) {
			r.plane.StandBy()
		}
	}
}

// end closes a plane; what it counted stays. The lock is held.
func (d *dataplanes) end(key planeKey, p proxier.Proxier) error {
	err := p.Close()
	if stats, ok := p.RelayStats(); ok {
		d.ended[key.opts.Family] = d.ended[key.opts.Family].Add(stats.Closed())
	}
	d.endedListeners[key.opts.Family] += p.LocalhostStats().Failures
	return err
}

// replaced says whether a plane in use has the mode and the family of one that is
// not.
func (d *dataplanes) replaced(old planeKey) bool {
	for key := range d.open {
		if d.used[key] && key.mode == old.mode && key.opts.Family == old.opts.Family {
			return true
		}
	}
	return false
}

// arrivalTime is how long after rules have changed a connection may arrive that
// obeyed the old ones: its first packet, sent again once, included.
const arrivalTime = 5 * time.Second

// retire closes a plane once no connection passes through it. The lock is held.
func (d *dataplanes) retire(key planeKey, p proxier.Proxier, log *slog.Logger) {
	ctx, cancel := context.WithCancel(context.Background())
	r := &retiree{plane: p, recall: cancel, gone: make(chan struct{})}
	d.retiring[key] = r
	go func() {
		defer close(r.gone)
		select { // connections that were led here before may arrive yet
		case <-time.After(arrivalTime):
		case <-ctx.Done():
		}
		p.Drain(ctx)
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.retiring[key] == r { // else it is in use again
			delete(d.retiring, key)
			logClosing(d.end(key, p), log)
		}
	}()
}

// waitRetired waits until planes that are not used have no connections any
// more; false if ctx ends first.
func (d *dataplanes) waitRetired(ctx context.Context) bool {
	d.mu.Lock()
	var waits []chan struct{}
	for _, r := range d.retiring {
		waits = append(waits, r.gone)
	}
	d.mu.Unlock()
	for _, gone := range waits {
		select {
		case <-gone:
		case <-ctx.Done():
			return false
		}
	}
	return ctx.Err() == nil
}

// drainers are the planes, used or not, through which connections pass.
func (d *dataplanes) drainers() []proxier.Proxier {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []proxier.Proxier
	for _, r := range d.retiring {
		list = append(list, r.plane)
	}
	for _, p := range d.open {
		if p.Relays() {
			list = append(list, p)
		}
	}
	return list
}

// standBy has all of them, used or not, leave what comes to this process to the
// one that serves the node now.
func (d *dataplanes) standBy() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range d.retiring {
		r.plane.StandBy()
	}
	for _, p := range d.open {
		p.StandBy()
	}
}

// close lets go of all of them. Rules stay in the kernel.
func (d *dataplanes) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var failed []error
	for key, r := range d.retiring {
		delete(d.retiring, key)
		r.recall()
		failed = append(failed, d.end(key, r.plane))
	}
	for key, p := range d.open {
		delete(d.open, key)
		failed = append(failed, d.end(key, p))
	}
	return errors.Join(failed...)
}

func logClosing(err error, log *slog.Logger) {
	if err != nil {
		log.Warn("closing", "error", err)
	}
}
