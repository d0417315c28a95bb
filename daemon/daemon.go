// SPDX-License-Identifier: Apache-2.0

// Package daemon joins the parts of signalbox into a process: a source of objects, the
// loop that turns them into plans, and one mode that programs each IP family.
//
// daemonState lasts as long as the process. configRun is made anew for each
// configuration.
package daemon

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"signalbox/config"
	"signalbox/daemon/nodelock"
	"signalbox/internal/buildinfo"
	"signalbox/internal/wait"
	"signalbox/modes"
	"signalbox/node"
	"signalbox/proxier/plan"
	"signalbox/source/apiserver"
)

// daemonState is what outlives a configuration.
type daemonState struct {
	// log writes as the configuration in force asks for.
	log      swappableHandler
	pool     *proxierPool
	nodeLock *nodelock.Lock
	observer *observer
	// known is how many objects the API server has listed; see apiserver.Source.
	known map[string]int
	// startedEvent sends the Event about the start once.
	startedEvent sync.Once
	// rolledBack is why the last configuration was rolled back, until an Event says so.
	rolledBack error
}

func newDaemonState() *daemonState {
	d := &daemonState{log: newSwappableHandler(slog.Default()), pool: newProxierPool(), known: map[string]int{}}
	log := slog.New(d.log)
	apiserver.LogTo(log)
	d.observer = newObserver(log)
	d.nodeLock = nodelock.New(log, d.observer.conditions.list)
	d.observer.metrics.ReadRelays(d.pool.relays)
	d.observer.metrics.ReadLocalhost(d.pool.localhost)
	return d
}

// run serves with one configuration until ctx ends.
func (d *daemonState) run(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	c, err := newConfigRun(ctx, d, cfg, log)
	if err != nil {
		return err
	}
	defer c.close()
	log.Info("starting", "mode", c.choice.Mode.Name(), "reason", c.modeReason(), "families", familyNames(c.choice.Families), "node", cfg.NodeName)
	return c.run(ctx)
}

// close closes everything. Rules stay in the kernel.
func (d *daemonState) close(log *slog.Logger) {
	d.observer.servers.close()
	notifyManager(systemd.SdNotifyStopping, log)
	drain(d.pool, d.nodeLock, log)
	logClosing(d.pool.close(), log)
	d.nodeLock.Release()
}

// run serves until ctx ends.
func (c *configRun) run(ctx context.Context) error {
	c.reportStart()
	c.readNode()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		c.sysctls.set("connection tracking", tune(c.cfg, c.log))
		return nil
	})
	group.Go(func() error { return node.Watch(ctx, c.loop.SetLocalAddrs) })
	group.Go(func() error { return node.WatchRouteSources(ctx, c.setRouteSources) })
	group.Go(func() error { return c.source.Run(ctx, c.events.Watch(c.observer.health.Watch(c.loop))) })
	group.Go(func() error { c.reportVersion(ctx); return nil })
	group.Go(func() error { return c.serve(ctx) })
	group.Go(func() error { return c.failHard(ctx) })
	group.Go(func() error { c.watchAffinity(ctx); return nil })
	group.Go(func() error { notifyReady(ctx, c.initialSync, c.log); return nil })
	if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	c.log.Info("stopped; the rules stay in the kernel")
	return nil
}

// readNode comes before the first sync. Otherwise that would remove rules of an earlier
// process, those of NodePorts for example, and the second sync add them again.
func (c *configRun) readNode() {
	if addrs, err := node.Addrs(); err == nil {
		c.loop.SetLocalAddrs(addrs)
	} else {
		c.log.Warn("this node's addresses cannot be read; until they can, NodePorts are not served at all of them", "error", err)
	}
	if sources, err := node.ReadRouteSources(); err == nil {
		c.loop.SetRouteSources(sources.Served)
	} else {
		c.log.Warn("this node's routes cannot be read; until they can, masquerade chooses source addresses", "error", err)
	}
}

func (c *configRun) setRouteSources(s node.RouteSources) {
	c.loop.SetRouteSources(s.Served)
	c.observer.reportRouteSources(c.log, s)
}

// modeReason says why this mode serves and no other.
func (c *configRun) modeReason() string {
	if c.cfg.Mode != modes.Auto {
		return c.cfg.ModeReason
	}
	return c.cfg.ModeReason + "; auto takes the first of " + modes.AutomaticNames() + " that serves this node"
}

func familyNames(families []plan.Family) string {
	names := make([]string, len(families))
	for i, f := range families {
		names[i] = f.String()
	}
	return strings.Join(names, ",")
}

// The API server is asked for its release again, as a cluster is upgraded while a
// node serves.
const (
	versionPeriod = 10 * time.Minute
	versionRetry  = 10 * time.Second
)

// reportVersion has the metrics tell which release of Kubernetes this is until ctx
// ends. A component that tells of another release than the API server makes the
// alert KubeVersionMismatch fire.
func (c *configRun) reportVersion(ctx context.Context) {
	report := c.observer.metrics.KubernetesVersion
	switch {
	case c.cfg.KubernetesVersion != "":
		report(c.cfg.KubernetesVersion)
	case c.client == nil:
		report(buildinfo.Release())
	default:
		c.followVersion(ctx, report)
	}
}

func (c *configRun) followVersion(ctx context.Context, report func(release string)) {
	for {
		pause := versionPeriod
		release, err := apiserver.Version(ctx, c.client)
		if err == nil {
			report(release)
		} else {
			c.log.Debug("the API server's version is not known; kubernetes_build_info stays as it is", "error", err)
			pause = versionRetry
		}
		if !wait.For(ctx, pause) {
			return
		}
	}
}

// notifyReady sends READY=1 to the service manager ($NOTIFY_SOCKET, see
// sd_notify(3)) when all families are served.
func notifyReady(ctx context.Context, all *initialSync, log *slog.Logger) {
	if all.wait(ctx) {
		notifyManager(systemd.SdNotifyReady, log)
	}
}

// notifyManager does nothing without a service manager.
func notifyManager(state string, log *slog.Logger) {
	if _, err := systemd.SdNotify(false, state); err != nil {
		log.Warn("the service manager gets no notification; with Type=notify it may end this process or wait for ever", "notification", state, "error", err)
	}
}
