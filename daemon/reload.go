// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"log/slog"
	"reflect"
	"time"

	"signalbox/config"
	"signalbox/internal/wait"
	"signalbox/source/apiserver"
)

// Change is a changed configuration file or kubeconfig: a configuration, or why it is none.
type Change struct {
	Config *config.Config
	Err    error
}

// RunChanging serves Services with a configuration that changes, until ctx ends, and
// returns nil then. What is in the kernel stays there and goes on working.
//
// A changed configuration takes effect when this node can serve it and its API server
// answers. Until then the old one goes on serving. If a new one fails before it
// serves, it is rolled back to the old one. logger makes the log that a configuration
// asks for. An error means that nothing can be served at all: no mode works here, or
// no retry can reach the source.
func RunChanging(ctx context.Context, cfg *config.Config, changes <-chan Change, logger func(*config.Config) *slog.Logger) (err error) {
	tuneGC()
	d := newDaemonState()
	var before *config.Config
	for {
		log := logger(cfg)
		d.log.set(log)
		next, err := d.runUntilChanged(ctx, cfg, changes, log)
		switch {
		case next != nil:
			cfg, before = next, cfg
			continue
		case err != nil && before != nil && !d.pool.serving.Load():
			d.observer.reportRejection(err)
			d.rolledBack = err
			log.Error("the changed configuration failed; signalbox returned to the previous one", "error", err)
			cfg, before = before, nil
			continue
		}
		d.close(log)
		return err
	}
}

// runUntilChanged runs with one configuration until it returns another that can be
// served, or until ctx ends.
func (d *daemonState) runUntilChanged(ctx context.Context, cfg *config.Config, changes <-chan Change, log *slog.Logger) (next *config.Config, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	rejected := d.rolledBack != nil // what the file says is not in force
	ended := make(chan error, 1)
	go func() { ended <- d.run(ctx, cfg, log) }()
	var works <-chan *config.Config // the change that is to take effect
	giveUp := func() {}
	defer func() { giveUp() }()
	for {
		select {
		case err := <-ended:
			return nil, err
		case c := <-changes:
			giveUp()
			works, giveUp = nil, func() {}
			switch {
			case c.Err != nil:
				d.reportRejection(c.Err)
				log.Error("the changed configuration is invalid; the previous one stays in force", "error", c.Err)
			case rejected && same(c.Config, cfg):
				d.observer.reportRejection(nil)
				log.Info("the file equals the configuration in force again")
			default:
				trial, stop := context.WithCancel(ctx)
				works, giveUp = d.awaitServable(trial, c.Config, log), stop
			}
			rejected = c.Err != nil || works != nil
		case next := <-works:
			log.Info("the changed configuration takes effect")
			d.observer.reportRejection(nil)
			cancel()
			if err := <-ended; err != nil {
				log.Warn("stopping before a changed configuration takes effect", "error", err)
			}
			return next, nil
		}
	}
}

// same says whether two configurations ask for the same, of the same API server.
func same(a, b *config.Config) bool {
	return reflect.DeepEqual(a.KubeProxy, b.KubeProxy) && a.KubeconfigDigest == b.KubeconfigDigest
}

// reportRejection reports that a changed file is not in force: in metrics, health and
// an Event.
func (d *daemonState) reportRejection(err error) {
	d.observer.reportRejection(err)
	d.observer.events.Load().ConfigurationRejected(err)
}

// repeatAfter is how often the log repeats that a changed configuration waits.
const repeatAfter = time.Minute

// awaitServable returns a channel that takes the configuration once it can be served,
// and the old one serves.
func (d *daemonState) awaitServable(ctx context.Context, cfg *config.Config, log *slog.Logger) <-chan *config.Config {
	works := make(chan *config.Config, 1)
	go func() {
		var said time.Time
		for pause := 100 * time.Millisecond; ; pause = min(2*pause, 10*time.Second) {
			var err error
			if d.pool.serving.Load() {
				err = servable(ctx, cfg)
			}
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				works <- cfg
				return
			}
			if said.IsZero() {
				d.reportRejection(err)
			}
			if time.Since(said) >= repeatAfter {
				said = time.Now()
				log.Error("the changed configuration cannot be served; the previous one stays in force, and signalbox tries again", "error", err)
			}
			if !wait.For(ctx, pause) {
				return
			}
		}
	}()
	return works
}

// servable returns what keeps a configuration from being served here, as far as that
// is known before.
func servable(ctx context.Context, cfg *config.Config) error {
	if _, err := choose(cfg, slog.New(slog.DiscardHandler)); err != nil || cfg.SourceDir != "" {
		return err
	}
	client, err := apiserver.Client(clientOptions(cfg, nil))
	if err != nil {
		return err
	}
	return apiserver.Ask(ctx, client)
}
