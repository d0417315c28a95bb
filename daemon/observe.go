// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"signalbox/conntrack"
	"signalbox/events"
	"signalbox/explain"
	"signalbox/health"
	"signalbox/internal/buildinfo"
	"signalbox/metrics"
	"signalbox/node"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// observer reports what the daemon does: in metrics, health and the answers to load
// balancers. Nothing in it can delay a sync. It outlives a configuration: a dashboard
// takes a counter that begins anew for a restart, and a load balancer would take the
// node for sick.
type observer struct {
	metrics  *metrics.Metrics
	health   *health.Health
	services *health.Services
	servers  *servers
	explain  *explain.Daemon
	// conditions are those of the configuration run at work.
	conditions conditions

	// events are those of the configuration run at work.
	events atomic.Pointer[events.Recorder]
	// offersHealthz says whether the configuration has a /healthz. Without it, load
	// balancers do not learn that the node is sick.
	offersHealthz atomic.Bool
}

// started is when this process started.
var started = time.Now()

func newObserver(log *slog.Logger) *observer {
	o := &observer{metrics: metrics.New(), explain: explain.NewDaemon(buildinfo.Version, started)}
	o.health = health.New(health.Options{Healthz: o.metrics.Healthz, Livez: o.metrics.Livez})
	o.services = health.NewServices(health.ServiceOptions{
		Healthy: func() bool { return !o.offersHealthz.Load() || o.health.Healthy() },
		Failed: func(service plan.ServiceName, port uint16, err error) {
			o.events.Load().HealthCheckFailed(service, port, err)
		},
		Tried: func(err error) {
			if err != nil {
				o.metrics.ListenFailed(metrics.ServiceHealthServer)
			}
		},
		State: func(family plan.Family, services, failing int) {
			o.metrics.HealthChecks(family, services)
			o.metrics.ListenFailing(metrics.ServiceHealthServer, failing)
		},
		Log: log,
	})
	o.servers = newServers(o, log)
	return o
}

// follow makes the observer report another configuration run.
func (o *observer) follow(c *configRun) {
	o.metrics.ReadProgress(c.loop.Progress)
	for subject := range subjects {
		o.conditions.set(subject)
	}
	o.health.Follow(health.Subject{
		Progress: c.loop.Progress, Degraded: c.sysctls.names, Conditions: func() []string { return append(o.conditions.list(), c.loop.Drift()...) }, SyncPeriod: c.cfg.SyncPeriod, NodeName: c.cfg.NodeName, NodeOptional: c.cfg.SourceDir != "",
	})
	o.explain.Follow(explain.Subject{
		Environment: explain.Environment{Node: c.cfg.NodeName, Mode: c.choice.Mode.Name(), Traits: c.choice.Mode.Traits(), Origin: origin(c.cfg), Live: true, Link: node.LinkTo},
		Loop:        c.loop, ModeReason: c.modeReason(), Flows: conntrack.List, Problems: c.problems,
	})
	o.services.Serve(c.choice.Families)
	o.events.Store(c.events)
	o.offersHealthz.Store(c.cfg.HealthzBindAddress.IsValid())
}

// reportRejection reports why the changed configuration is not in force; nil: it is.
func (o *observer) reportRejection(err error) {
	o.metrics.ConfigurationRejected(err != nil)
	o.health.ConfigurationRejected(err)
	o.explain.ConfigurationRejected(err)
}

// reportNode reports whether no Node object has the name of this node, and what other
// Node objects there are.
func (o *observer) reportNode(log *slog.Logger, name string, missing bool, others []string) {
	o.metrics.NodeMissing(missing)
	if !missing {
		o.conditions.set(nodeName)
		log.Info("a Node object has the name of this node now", "node", name)
		return
	}
	text := fmt.Sprintf("no Node object is named %q", name)
	if len(others) > 0 {
		others = others[:min(len(others), maxNames)]
		text += fmt.Sprintf(", but there are %q", others)
	}
	o.conditions.set(nodeName, text)
	log.Warn("no Node object has the name of this node; its zone, its Pod ranges and its primary addresses are not known",
		"node", name, "others", others, "remedy", "give the name of the Node object with --hostname-override")
}

// maxNames is how many names of other Node objects are listed.
const maxNames = 10

// reportManifests reports the manifests of the source directory that have a fault.
func (o *observer) reportManifests(problems []string) {
	o.metrics.ManifestProblems(len(problems))
	o.conditions.set(manifests, problems...)
}

// reportRouteSources reports the source addresses of the node's routes that are not
// used.
func (o *observer) reportRouteSources(log *slog.Logger, s node.RouteSources) {
	n := len(s.LeftOut)
	o.metrics.RouteSourcesLeftOut(n)
	if n == 0 {
		o.conditions.set(routeSources)
		return
	}
	o.conditions.set(routeSources, fmt.Sprintf("%d source addresses of routes are not used, among them %s", n, s.LeftOut[0]))
	log.Warn("source addresses of routes are not used; masquerade chooses an address of the interface there",
		"leftOut", n, "example", s.LeftOut[0].String(), "used", len(s.Served), "limitOfFamily", node.MaxRouteSources)
}

// reportStale reports since when the state of the cluster that is served was not changed,
// because the API server does not answer or lists nothing; the zero time if it does.
func (o *observer) reportStale(since time.Time) {
	o.metrics.SavedState(since)
	if since.IsZero() {
		o.conditions.set(savedState)
		return
	}
	o.conditions.set(savedState, fmt.Sprintf("the API server does not answer, or lists no objects; this node serves the saved state of the cluster, whose last change was at %s", since.Format(time.RFC3339)))
}

// reportUnsaved reports the files of the state directory that cannot be written.
func (o *observer) reportUnsaved(problems []string) { o.conditions.set(unsavedState, problems...) }

func (o *observer) synced(r syncer.SyncReport) {
	o.metrics.Synced(r)
	o.health.Synced(r)
	o.services.Synced(r)
	o.explain.Synced(r)
}

// requested reports the end of a request to the API server.
func (o *observer) requested(resource string, err error) {
	o.metrics.Source(resource, err)
	o.explain.Requested(resource, err)
}

// foreignRules reports whether rules of another service proxy may be in force.
func (o *observer) foreignRules(family plan.Family, present bool) {
	o.metrics.ForeignRules(family, present)
	o.explain.ForeignRules(family, present)
}

// problems has a line for each fault with which the daemon serves on.
func (c *configRun) problems() []string {
	lines := c.observer.conditions.list()
	for _, name := range c.sysctls.names() {
		lines = append(lines, "the kernel setting "+name+" is not as it should be")
	}
	return lines
}

// swappableHandler is the log of what outlives a configuration. It writes as the
// configuration in force says.
type swappableHandler struct {
	current *atomic.Pointer[slog.Handler]
	// derive adds the attributes and groups of With and WithGroup.
	derive []func(slog.Handler) slog.Handler
}

var _ slog.Handler = swappableHandler{}

func newSwappableHandler(log *slog.Logger) swappableHandler {
	h := swappableHandler{current: new(atomic.Pointer[slog.Handler])}
	h.set(log)
	return h
}

func (h swappableHandler) set(log *slog.Logger) {
	next := log.Handler()
	h.current.Store(&next)
}

func (h swappableHandler) now() slog.Handler {
	now := *h.current.Load()
	for _, derive := range h.derive {
		now = derive(now)
	}
	return now
}

func (h swappableHandler) with(derive func(slog.Handler) slog.Handler) slog.Handler {
	return swappableHandler{h.current, append(slices.Clip(h.derive), derive)}
}

// Enabled implements slog.Handler.
func (h swappableHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.now().Enabled(ctx, level)
}

// Handle implements slog.Handler.
func (h swappableHandler) Handle(ctx context.Context, r slog.Record) error {
	return h.now().Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h swappableHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return h.with(func(to slog.Handler) slog.Handler { return to.WithAttrs(attrs) })
}

// WithGroup implements slog.Handler.
func (h swappableHandler) WithGroup(name string) slog.Handler {
	return h.with(func(to slog.Handler) slog.Handler { return to.WithGroup(name) })
}
