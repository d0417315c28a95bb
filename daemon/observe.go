package daemon

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"signalbox/config"
	"signalbox/events"
	"signalbox/health"
	"signalbox/internal/httpserve"
	"signalbox/metrics"
	"signalbox/modes"
	"signalbox/node"
	"signalbox/proxier"
	"signalbox/source/apiserver"
	"signalbox/userspace"
)

// observer tells others what the daemon does: metrics, health, the answers to
// load balancers, and Kubernetes Events. Nothing in it can hold up a sync.
type observer struct {
	cfg      *config.Config
	log      *slog.Logger
	metrics  *metrics.Metrics
	pages    metrics.Pages
	events   *events.Recorder // nil without an API server
	settings *settings
	health   *health.Health
	services *health.Services
}

// started is when this process was.
var started = time.Now()

func newObserver(cfg *config.Config, choice modes.Choice, log *slog.Logger) (*observer, error) {
	o := &observer{
		cfg: cfg, log: log,
		metrics: metrics.New(metrics.Options{Mode: choice.Mode.Name, Families: choice.Families}),
		pages: metrics.Pages{
			Mode: choice.Mode.Name, Config: cfg.KubeProxy, Flags: cfg.Flags, Profiling: cfg.EnableProfiling,
			SetVerbosity: cfg.Logging.SetVerbosity, Started: started,
		},
	}
	o.settings = &settings{log: log, told: o.metrics.Sysctl, missing: map[string][]*node.KernelProblem{}}
	if err := cfg.ShowFeatureGates(); err != nil {
		return nil, err
	}
	if cfg.SourceDir == "" {
		client, err := apiserver.Client(clientOptions(cfg))
		if err != nil {
			return nil, err
		}
		o.events = events.New(events.Options{Client: client, NodeName: cfg.NodeName, Log: log, Counted: o.metrics.Event})
	}
	return o, nil
}

// hook has the Loop, before it is made, tell the observer.
func (o *observer) hook(opts *proxier.LoopOptions) {
	report, synced := proxier.LogProblems(o.log), opts.Synced
	opts.Report = func(p proxier.Problem) {
		report(p)
		o.metrics.Problem(p)
		o.events.Problem(p)
	}
	opts.Synced = func(r proxier.SyncReport) {
		synced(r)
		if p, ok := opts.Proxiers[r.Family].(interface{ KernelProblems() []*node.KernelProblem }); ok {
			o.settings.note(r.Family.String(), p.KernelProblems())
		}
		o.metrics.Synced(r)
		o.health.Synced(r)
		o.services.Synced(r)
	}
	for family, p := range opts.Proxiers {
		if relay, ok := p.(interface{ Stats() userspace.Stats }); ok {
			o.metrics.ReadRelay(family, relay.Stats)
		}
	}
}

// watch has the observer ask the Loop, and returns what the source is to tell.
func (o *observer) watch(loop *proxier.Loop) proxier.Sink {
	o.metrics.ReadProgress(loop.Progress)
	o.health = health.New(health.Options{
		Progress: loop.Progress, Degraded: o.settings.names, SyncPeriod: o.cfg.SyncPeriod,
		NodeName: o.cfg.NodeName, NodeOptional: o.cfg.SourceDir != "",
		Healthz: o.metrics.Healthz, Livez: o.metrics.Livez,
	})
	o.services = health.NewServices(health.ServiceOptions{
		Healthy: o.dataplaneHealthy(),
		Failed:  o.events.HealthCheckFailed,
		Tried:   o.tried(metrics.ServiceHealthServer, nil, nil),
		State: func(family proxier.Family, services, failing int) {
			o.metrics.HealthChecks(family, services)
			o.metrics.ListenFailing(metrics.ServiceHealthServer, failing)
		},
		Log: o.log,
	})
	return o.health.Watch(loop)
}

// dataplaneHealthy is nil where nobody is to know: without /healthz no load
// balancer is told that the node is sick either.
func (o *observer) dataplaneHealthy() func() bool {
	if !o.cfg.HealthzBindAddress.IsValid() {
		return nil
	}
	return o.health.Healthy
}

// tellStarted is of the process, not of one configuration.
var tellStarted sync.Once

// tell sends Events until ctx ends, the first of a process that the node is
// being taken care of.
func (o *observer) tell(ctx context.Context) error {
	tellStarted.Do(o.events.Started)
	return o.events.Run(ctx)
}

// serve runs the servers until ctx ends. seated is closed when no signalbox
// that served before has a port any more. An error is about a port that
// somebody else has then, where that is to end the process.
func (o *observer) serve(ctx context.Context, seated <-chan struct{}) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return o.services.Run(ctx) })
	group.Go(func() error {
		select {
		case <-seated:
			o.services.PortsFree()
		case <-ctx.Done():
		}
		return nil
	})
	group.Go(func() error {
		return o.listen(ctx, seated, metrics.HealthzServer, o.cfg.HealthzBindAddress, o.health.Handler(), o.events.HealthzFailed)
	})
	group.Go(func() error {
		return o.listen(ctx, seated, metrics.MetricsServer, o.cfg.MetricsBindAddress, o.metrics.Mux(o.pages), o.events.MetricsFailed)
	})
	return group.Wait()
}

// flushFor is how long an Event about the end of this process may keep it.
const flushFor = 2 * time.Second

func (o *observer) listen(ctx context.Context, seated <-chan struct{}, name string, at netip.AddrPort, h http.Handler, failed func(error)) error {
	if !at.IsValid() {
		return nil
	}
	s := httpserve.Server{
		Name: name, Addr: at, Handler: h, HardFail: o.cfg.BindAddressHardFail, Free: seated, Log: o.log,
		Tried: o.tried(name, seated, failed),
	}
	err := s.Run(ctx)
	if err != nil {
		o.events.Flush(flushFor)
	}
	return err
}

// tried returns what notes how an attempt to listen ended. failed is told once
// of failures in a row, when no signalbox that served before has the port any
// more: of the second, because a kube-proxy may have it for a moment, or of the
// first where there will be no other. It may be nil, and then somebody else
// counts where nobody listens.
func (o *observer) tried(name string, seated <-chan struct{}, failed func(error)) func(error) {
	patience := 2
	if o.cfg.BindAddressHardFail {
		patience = 1
	}
	failures := 0
	return func(err error) {
		if err != nil {
			o.metrics.ListenFailed(name)
		}
		if failed == nil {
			return
		}
		o.metrics.ListenFailing(name, map[bool]int{true: 1}[err != nil])
		if err == nil {
			failures = 0
			return
		}
		select {
		case <-seated:
			if failures++; failures == patience {
				failed(err)
			}
		default:
		}
	}
}
