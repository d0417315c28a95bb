package daemon

import (
	"context"
	"log/slog"

	"signalbox/config"
)

// Change is what a changed file says: a configuration, or why it is none.
type Change struct {
	Config *config.Config
	Err    error
}

// RunChanging serves Services until ctx ends, and returns nil then, with a
// configuration that changes meanwhile. What is in the kernel when it returns
// stays and goes on working, also while one configuration takes another's
// place, and so do the dataplanes that both have. One that turns out not to
// work before it serves is put back to the one before. logger makes the log
// that a configuration asks for. An error means that nothing can be served at
// all: no mode works here, or the source cannot be reached by any retry.
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
		case err != nil && before != nil && !p.planes.serving:
			p.observer.metrics.ConfigurationRejected(true)
			log.Error("the changed configuration does not work here; what was in force before is so again", "error", err)
			cfg, before = before, nil
			continue
		}
		p.close(log)
		return err
	}
}

// untilChanged runs with one configuration until there is another, which it
// returns, or until ctx ends.
func (p *process) untilChanged(ctx context.Context, cfg *config.Config, changes <-chan Change, log *slog.Logger) (next *config.Config, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- p.run(ctx, cfg, log) }()
	for {
		select {
		case err := <-ended:
			return nil, err
		case c := <-changes:
			p.observer.metrics.ConfigurationRejected(c.Err != nil)
			if c.Err != nil {
				log.Error("the configuration file has changed and cannot be used; what was in force before stays so", "error", c.Err)
				continue
			}
			log.Info("the configuration file has changed and takes effect")
			cancel()
			if err := <-ended; err != nil {
				log.Warn("stopping before a changed configuration takes effect", "error", err)
			}
			return c.Config, nil
		}
	}
}
