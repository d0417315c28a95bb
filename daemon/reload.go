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

// Change is what a changed file says: a configuration, or why it is none.
type Change struct {
	Config *config.Config
	Err    error
}

// RunChanging serves Services until ctx ends, and returns nil then, with a
// configuration that changes meanwhile. What is in the kernel when it returns
// stays and goes on working, also while one configuration takes another's
// place, and so does what a process keeps.
//
// A changed configuration takes effect when it can be served here and its API
// server answers; until then the one before goes on serving. One that turns out
// not to work before it serves is put back to the one before. logger makes the
// log that a configuration asks for. An error means that nothing can be served
// at all: no mode works here, or the source cannot be reached by any retry.
func RunChanging(ctx context.Context, cfg *config.Config, changes <-chan Change, logger func(*config.Config) *slog.Logger) (err error) {
	spareMemory()
	p := newProcess()
	var before *config.Config
	for {
		log := logger(cfg)
		p.log.set(log)
		next, err := p.untilChanged(ctx, cfg, changes, log)
		switch {
		case next != nil:
			cfg, before = next, cfg
			continue
		case err != nil && before != nil && !p.planes.serving.Load():
			p.observer.noteRejection(err)
			p.putBack = err
			log.Error("the changed configuration does not work here; what was in force before is so again", "error", err)
			cfg, before = before, nil
			continue
		}
		p.close(log)
		return err
	}
}

// untilChanged runs with one configuration until there is another that can be
// served, which it returns, or until ctx ends.
func (p *process) untilChanged(ctx context.Context, cfg *config.Config, changes <-chan Change, log *slog.Logger) (next *config.Config, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	rejected := p.putBack != nil // what the file says is not in force
	ended := make(chan error, 1)
	go func() { ended <- p.run(ctx, cfg, log) }()
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
				p.reject(c.Err)
				log.Error("the configuration file has changed and cannot be used; what was in force before stays so", "error", c.Err)
			case rejected && reflect.DeepEqual(c.Config.KubeProxy, cfg.KubeProxy):
				p.observer.noteRejection(nil)
				log.Info("the configuration file says again what is in force")
			default:
				trial, stop := context.WithCancel(ctx)
				works, giveUp = p.try(trial, c.Config, log), stop
			}
			rejected = c.Err != nil || works != nil
		case next := <-works:
			log.Info("the configuration file has changed and takes effect")
			p.observer.noteRejection(nil)
			cancel()
			if err := <-ended; err != nil {
				log.Warn("stopping before a changed configuration takes effect", "error", err)
			}
			return next, nil
		}
	}
}

// reject says where an operator looks that a changed file is not in force.
func (p *process) reject(err error) {
	p.observer.noteRejection(err)
	p.observer.events.Load().ConfigurationRejected(err)
}

// repeatAfter is how often it is logged that a changed configuration waits.
const repeatAfter = time.Minute

// try returns what takes a changed configuration once it can be served. What
// works until then is not given up for it, but that is nothing where no Service
// is served yet.
func (p *process) try(ctx context.Context, cfg *config.Config, log *slog.Logger) <-chan *config.Config {
	works := make(chan *config.Config, 1)
	go func() {
		var said time.Time
		for pause := 100 * time.Millisecond; ; pause = min(2*pause, 10*time.Second) {
			var err error
			if p.planes.serving.Load() {
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
				p.reject(err)
			}
			if time.Since(said) >= repeatAfter {
				said = time.Now()
				log.Error("the configuration file has changed and cannot be served; what was in force before stays so, and it is tried again", "error", err)
			}
			if !wait.For(ctx, pause) {
				return
			}
		}
	}()
	return works
}

// servable returns what keeps a configuration from being served here, as far as
// that is known without serving it.
func servable(ctx context.Context, cfg *config.Config) error {
	if _, err := choose(cfg, slog.New(slog.DiscardHandler)); err != nil || cfg.SourceDir != "" {
		return err
	}
	client, err := apiserver.Client(clientOptions(cfg))
	if err != nil {
		return err
	}
	return apiserver.Ask(ctx, client)
}
