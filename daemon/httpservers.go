// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"

	"signalbox/explain"
	"signalbox/health"
	"signalbox/internal/httpserve"
	"signalbox/internal/wait"
	"signalbox/metrics"
)

// servers have the local socket, and the ports of health, metrics and the health checks of Services, while
// this process serves the node. Another configuration changes their answers. A port is
// closed only if its address changes, so that no probe finds a closed port because a
// file has changed.
type servers struct {
	services         *health.Services
	healthz, metrics *page
	socket           explain.Socket
	// failed takes the error of a page that does not try again.
	failed chan error

	// Of the goroutine that serves; nil while nothing is open.
	free            chan struct{} // closed when no earlier signalbox has a port any more
	predecessorGone func()        // closes it
	stop            func()
}

func newServers(o *observer, log *slog.Logger) *servers {
	s := &servers{services: o.services, failed: make(chan error, 2)}
	page := func(name string, failed func(error)) *page {
		return &page{name: name, metrics: o.metrics, reportFailure: failed, failed: s.failed, log: log}
	}
	s.healthz = page(metrics.HealthzServer, func(err error) { o.events.Load().HealthzFailed(err) })
	s.metrics = page(metrics.MetricsServer, func(err error) { o.events.Load().MetricsFailed(err) })
	return s
}

// open serves the pages of a configuration run. alone says that no earlier signalbox
// has a port; otherwise predecessorGone is to be called when that is so. An error is
// about a port of another program, if the configuration ends the process then.
func (s *servers) open(c *configRun, alone bool) error {
	if s.stop == nil {
		ctx, cancel := context.WithCancel(context.Background())
		free := make(chan struct{})
		s.free, s.predecessorGone = free, sync.OnceFunc(func() {
			close(free)
			s.services.PortsFree()
		})
		var work sync.WaitGroup
		work.Go(func() { s.services.Run(ctx) })
		s.stop = func() { cancel(); work.Wait() }
	}
	if alone {
		s.predecessorGone()
	}
	for len(s.failed) > 0 {
		<-s.failed //nolint:errcheck // of a configuration run that has ended
	}
	cfg := c.cfg
	s.healthz.serve(cfg.HealthzBindAddress, cfg.BindAddressHardFail, c.observer.health.Handler(), s.free)
	s.metrics.serve(cfg.MetricsBindAddress, cfg.BindAddressHardFail, c.metricsPages(), s.free)
	s.socket.Open(cfg.RunDir, c.observer.explain.Handler(), c.log)
	select {
	case err := <-s.failed:
		c.events.Flush(flushFor)
		return err
	default:
		return nil
	}
}

func (c *configRun) metricsPages() http.Handler {
	more := map[string]http.Handler{}
	if c.cfg.StatusPage {
		more[explain.PagePath] = c.observer.explain.Page()
	}
	return c.observer.metrics.Mux(metrics.Pages{
		Mode: c.choice.Mode.Name(), Config: c.cfg.KubeProxy, Flags: c.cfg.Flags, Profiling: c.cfg.EnableProfiling, More: more,
		SetVerbosity: c.cfg.Logging.SetVerbosity, Started: started,
	})
}

// close returns when all ports are free.
func (s *servers) close() {
	s.socket.Close()
	s.healthz.close()
	s.metrics.close()
	if s.stop != nil {
		s.stop()
		s.stop = nil
	}
}

// page is a server whose answers may change while it listens.
type page struct {
	name    string
	metrics *metrics.Metrics
	// reportFailure is called once for failures in a row; see tried.
	reportFailure func(error)
	failed        chan<- error
	log           *slog.Logger

	answers atomic.Pointer[http.Handler]
	listens atomic.Bool

	at   netip.AddrPort
	stop func() // nil while there is no server
}

// ServeHTTP implements http.Handler.
func (p *page) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	(*p.answers.Load()).ServeHTTP(w, r)
}

// serve serves answers at an address, or at none if it is not valid. It returns after
// the first attempt to listen. If that is the last, its error is in p.failed.
func (p *page) serve(at netip.AddrPort, hardFail bool, answers http.Handler, free <-chan struct{}) {
	p.answers.Store(&answers)
	if p.stop != nil && p.at == at && p.listens.Load() {
		return
	}
	p.close()
	if p.at = at; !at.IsValid() {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	tried, ended := make(chan struct{}), make(chan struct{})
	first, note := sync.OnceFunc(func() { close(tried) }), p.tried(hardFail, free)
	s := httpserve.Server{
		Name: p.name, Setting: fmt.Sprintf("--%[1]s-bind-address (%[1]sBindAddress in a file)", p.name), Addr: at, Handler: p, HardFail: hardFail, Free: free, Log: p.log,
		Tried: func(err error) {
			note(err)
			if p.listens.Store(err == nil); err == nil || !hardFail || !wait.Closed(free) {
				first()
			}
		},
	}
	go func() {
		defer close(ended)
		if err := s.Run(ctx); err != nil {
			p.failed <- err
		}
	}()
	p.stop = func() { cancel(); <-ended }
	select {
	case <-tried:
	case <-ended:
	}
}

// close returns when the port is free.
func (p *page) close() {
	if p.stop != nil {
		p.stop()
		p.stop = nil
		p.listens.Store(false)
		p.metrics.ListenFailing(p.name, 0)
	}
}

// tried returns a function for the result of each attempt to listen. Of failures in a
// row, while no earlier signalbox has the port, it reports one: the second, because a
// kube-proxy may have the port for a moment, or the first if there will be no other.
func (p *page) tried(hardFail bool, free <-chan struct{}) func(error) {
	reportedFailure := 2
	if hardFail {
		reportedFailure = 1
	}
	failures := 0
	return func(err error) {
		if err == nil {
			failures = 0
			p.metrics.ListenFailing(p.name, 0)
			return
		}
		p.metrics.ListenFailed(p.name)
		p.metrics.ListenFailing(p.name, 1)
		if wait.Closed(free) {
			if failures++; failures == reportedFailure {
				p.reportFailure(err)
			}
		}
	}
}
