// Package daemon joins the parts of signalbox into a process: a source of
// objects, the loop that turns them into plans, and one mode that programs
// each IP family.
//
// What a process keeps from its start to its end is in process; what it makes
// anew for each configuration is in generation.
package daemon

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"signalbox/config"
	"signalbox/modes"
	"signalbox/node"
	"signalbox/proxier/plan"
)

// process is what outlives a configuration.
type process struct {
	// log is as the configuration in force asks for.
	log      *presentLog
	planes   *dataplanes
	seat     *seat
	observer *observer
	// tellStarted has the Event sent once that this node is being taken care of.
	tellStarted sync.Once
	// putBack is why the configuration before was put back, until an Event says
	// so.
	putBack error
}

func newProcess() *process {
	p := &process{log: &presentLog{}, planes: newDataplanes()}
	p.log.set(slog.Default())
	log := slog.New(p.log)
	p.observer = newObserver(log)
	p.seat = newSeat(log, p.observer.conditions.list)
	p.observer.metrics.ReadRelays(p.planes.relays)
	p.observer.metrics.ReadLocalhost(p.planes.localhost)
	return p
}

// run serves with one configuration until ctx ends.
func (p *process) run(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	g, err := newGeneration(ctx, p, cfg, log)
	if err != nil {
		return err
	}
	defer g.close()
	log.Info("starting", "mode", g.choice.Mode.Name(), "because", g.modeReason(), "families", familyNames(g.choice.Families), "node", cfg.NodeName)
	return g.run(ctx)
}

// close lets go of everything. Rules stay in the kernel.
func (p *process) close(log *slog.Logger) {
	p.observer.servers.close()
	notifyManager(systemd.SdNotifyStopping, log)
	drain(p.planes, p.seat, log)
	if err := p.planes.close(); err != nil {
		log.Warn("closing", "error", err)
	}
	p.seat.leave()
}

// run serves until ctx ends.
func (g *generation) run(ctx context.Context) error {
	g.reportStart()
	g.readRouteSources()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		g.settings.note("connection tracking", tune(g.cfg, g.log))
		return nil
	})
	group.Go(func() error { return node.Watch(ctx, g.loop.SetLocalAddrs) })
	group.Go(func() error { return node.WatchRouteSources(ctx, g.noteRouteSources) })
	group.Go(func() error { return g.source.Run(ctx, g.events.Watch(g.observer.health.Watch(g.loop))) })
	group.Go(func() error { g.reportVersion(ctx); return nil })
	group.Go(func() error { return g.serve(ctx) })
	group.Go(func() error { return g.failHard(ctx) })
	group.Go(func() error { g.watchAffinity(ctx); return nil })
	group.Go(func() error { notifyReady(ctx, g.served, g.log); return nil })
	if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	g.log.Info("stopped; the rules stay in the kernel")
	return nil
}

// readRouteSources comes before the first sync, which would otherwise change rules
// that an earlier process wrote, and the second one change them back.
func (g *generation) readRouteSources() {
	sources, err := node.ReadRouteSources()
	if err != nil {
		g.log.Warn("this node's routes cannot be read; until they can, masquerade chooses source addresses", "error", err)
		return
	}
	g.loop.SetRouteSources(sources.Served)
}

func (g *generation) noteRouteSources(s node.RouteSources) {
	g.loop.SetRouteSources(s.Served)
	g.observer.noteRouteSources(g.log, s)
}

// modeReason says why this mode serves and no other.
func (g *generation) modeReason() string {
	if g.cfg.Mode != modes.Auto {
		return g.cfg.ModeReason
	}
	return g.cfg.ModeReason + "; auto takes the first of " + modes.AutomaticNames() + " that serves this node"
}

func familyNames(families []plan.Family) string {
	names := make([]string, len(families))
	for i, f := range families {
		names[i] = f.String()
	}
	return strings.Join(names, ",")
}
