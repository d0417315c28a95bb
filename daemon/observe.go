package daemon

import (
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"signalbox/events"
	"signalbox/health"
	"signalbox/metrics"
	"signalbox/node"

	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// observer tells others what the process does: metrics, health and the answers
// to load balancers. Nothing in it can hold up a sync. It goes on over a change
// of the configuration: to a dashboard a counter that begins anew is a restart,
// and a load balancer takes a node for sick that has to learn of itself first.
type observer struct {
	metrics  *metrics.Metrics
	health   *health.Health
	services *health.Services
	servers  *servers
	// conditions are those of the generation at work.
	conditions conditions

	// events are those of the generation at work.
	events atomic.Pointer[events.Recorder]
	// offersHealthz is whether its configuration has a /healthz. Without it no
	// load balancer is told that the node is sick either.
	offersHealthz atomic.Bool
}

// started is when this process was.
var started = time.Now()

func newObserver(log *slog.Logger) *observer {
	o := &observer{metrics: metrics.New()}
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

// follow has the observer tell of another generation than before.
func (o *observer) follow(g *generation) {
	o.metrics.ReadProgress(g.loop.Progress)
	for subject := range subjects {
		o.conditions.set(subject)
	}
	o.health.Follow(health.Subject{
		Progress: g.loop.Progress, Degraded: g.settings.names, Conditions: o.conditions.list, SyncPeriod: g.cfg.SyncPeriod, NodeName: g.cfg.NodeName, NodeOptional: g.cfg.SourceDir != "",
	})
	o.services.Serve(g.choice.Families)
	o.events.Store(g.events)
	o.offersHealthz.Store(g.cfg.HealthzBindAddress.IsValid())
}

// noteRejection tells why what the configuration file says is not in force; nil: it
// is.
func (o *observer) noteRejection(err error) {
	o.metrics.ConfigurationRejected(err != nil)
	o.health.ConfigurationRejected(err)
}

// noteNode tells whether the Node object of a name is missing, and what other
// Node objects there are.
func (o *observer) noteNode(log *slog.Logger, name string, missing bool, others []string) {
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

// noteManifests tells which manifests of the source directory are not served as
// they are.
func (o *observer) noteManifests(problems []string) {
	o.metrics.ManifestProblems(len(problems))
	o.conditions.set(manifests, problems...)
}

// noteRouteSources tells which source addresses of the node's routes are not used.
func (o *observer) noteRouteSources(log *slog.Logger, s node.RouteSources) {
	n := len(s.LeftOut)
	o.metrics.RouteSourcesLeftOut(n)
	if n == 0 {
		o.conditions.set(routeSources)
		return
	}
	o.conditions.set(routeSources, fmt.Sprintf("%d source addresses of routes are not used, among them %s", n, s.LeftOut[0]))
	log.Warn("source addresses of routes are not used; masquerade chooses an address of the interface there",
		"leftOut", n, "among them", s.LeftOut[0].String(), "used", len(s.Served), "limitOfFamily", node.MaxRouteSources)
}

func (o *observer) synced(r syncer.SyncReport) {
	o.metrics.Synced(r)
	o.health.Synced(r)
	o.services.Synced(r)
}
