package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"k8s.io/client-go/kubernetes"

	"signalbox/config"
	"signalbox/conntrack"
	"signalbox/events"
	"signalbox/internal/wait"
	"signalbox/modes"
	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
	"signalbox/proxier/syncer"
	"signalbox/source/apiserver"
	"signalbox/source/file"
)

// Source tells a Sink about objects until its context ends.
type Source interface {
	Run(ctx context.Context, sink service.Sink) error
}

// generation is a process under one configuration. It ends when another takes
// effect.
type generation struct {
	*process
	cfg    *config.Config
	choice modes.Choice
	log    *slog.Logger

	source Source
	// client is nil without an API server.
	client kubernetes.Interface
	// events is nil without an API server.
	events   *events.Recorder
	settings *settings
	proxiers map[plan.Family]proxier.Proxier
	// flows removes stale UDP flows; nil where they cannot be.
	flows     *conntrack.Cleaner
	served    *served
	loop      *syncer.Loop
	leftovers *leftovers
}

// newGeneration makes everything and starts nothing but the recorder of Events,
// which ends with ctx.
func newGeneration(ctx context.Context, p *process, cfg *config.Config, log *slog.Logger) (*generation, error) {
	g := &generation{process: p, cfg: cfg, log: log, settings: newSettings(log, p.observer.metrics.Sysctl)}
	// First what may end it: a warning about something else would hide the error.
	if err := g.connect(ctx); err != nil {
		return nil, err
	}
	for _, w := range cfg.Warnings {
		log.Warn(w)
	}
	choice, err := choose(cfg, log)
	if err != nil {
		return nil, err
	}
	cfg.ShowFeatureGates()
	g.choice = choice
	g.planes.begin()
	g.observer.metrics.Serve(choice.Mode, choice.Families)
	if err := g.takePlanes(); err != nil {
		return nil, err
	}
	g.watchFlows()
	g.served = newServed(len(choice.Families), func() { g.planes.serve(log) })
	g.loop = syncer.NewLoop(g.loopOptions())
	g.leftovers = newLeftovers(leftoversOptions{
		choice: choice, proxiers: g.proxiers, resync: g.loop.Resync, drained: g.planes.waitRetired, present: g.observer.metrics.Leftovers, log: log,
	})
	g.observer.follow(g)
	return g, nil
}

// close lets go of all of it but what is the process's.
func (g *generation) close() {
	if g.flows != nil {
		logClosing(g.flows.Close(), g.log)
	}
}

// choose finds the mode that a configuration asks for, and the families that it
// serves here.
func choose(cfg *config.Config, log *slog.Logger) (modes.Choice, error) {
	choice, err := modes.Choose(cfg.Mode, usableFamilies(log))
	if err != nil {
		return modes.Choice{}, err
	}
	for _, lost := range choice.Lost {
		log.Warn("an IP family is not served", "reason", lost)
	}
	warnings, err := cfg.CheckFamilies(choice.Families, choice.Mode)
	for _, w := range warnings {
		log.Warn(w)
	}
	return choice, err
}

// usableFamilies leaves out a family that the kernel has not got or that is
// switched off.
func usableFamilies(log *slog.Logger) []plan.Family {
	var usable []plan.Family
	for _, family := range plan.Families {
		if err := node.FamilyUsable(family); err != nil {
			log.Info("an IP family is not served", "family", family.String(), "reason", err)
			continue
		}
		usable = append(usable, family)
	}
	return usable
}

// connect makes what tells of objects, and what Events go to.
func (g *generation) connect(ctx context.Context) (err error) {
	if g.cfg.SourceDir != "" {
		source, err := file.New(g.cfg.SourceDir, g.log)
		if err != nil {
			return err
		}
		source.OnProblems = g.observer.noteManifests
		g.source = source
		return nil
	}
	apiserver.LogTo(g.log)
	if g.client, err = apiserver.Client(clientOptions(g.cfg)); err != nil {
		return err
	}
	source := apiserver.New(g.client, g.cfg.NodeName, g.log)
	source.OnRequest = g.observer.metrics.Source
	g.source = source
	g.events = events.New(ctx, events.Options{Client: g.client, NodeName: g.cfg.NodeName, Log: g.log, Counted: g.observer.metrics.Event})
	return nil
}

func clientOptions(cfg *config.Config) apiserver.ClientOptions {
	return apiserver.ClientOptions{
		Kubeconfig: cfg.Kubeconfig, Master: cfg.Master, QPS: cfg.QPS, Burst: cfg.Burst,
		ContentType: cfg.ContentType, AcceptContentTypes: cfg.AcceptContentTypes,
	}
}

// takePlanes makes the mode work in each family.
func (g *generation) takePlanes() error {
	g.proxiers = map[plan.Family]proxier.Proxier{}
	for _, family := range g.choice.Families {
		p, err := g.planes.get(g.choice.Mode, g.cfg.Options(g.choice.Mode, family))
		if err != nil {
			return fmt.Errorf("mode %s, %s: %w", g.choice.Mode.Name(), family, err)
		}
		g.proxiers[family] = p
	}
	return nil
}

// watchFlows makes what removes stale UDP flows, where that can be done.
func (g *generation) watchFlows() {
	var relays []netip.Prefix
	for _, p := range g.proxiers {
		if prefix := p.RelayPrefix(); prefix.IsValid() {
			relays = append(relays, prefix)
		}
	}
	flows, err := conntrack.New(conntrack.Options{Logger: g.log, LocalAddrs: node.Addrs, Relays: relays, Scanned: g.observer.metrics.FlowsScanned})
	if err != nil {
		g.log.Warn("stale UDP flows are not removed", "reason", err)
		g.observer.metrics.ConntrackUnavailable()
		return
	}
	g.flows = flows
}

// affinityPeriod is how often the clients with session affinity are counted.
const affinityPeriod = time.Minute

// watchAffinity counts, until ctx ends, the lists of clients that are full.
func (g *generation) watchAffinity(ctx context.Context) {
	for more := true; more; more = wait.For(ctx, affinityPeriod) {
		full, err := g.choice.Mode.FullAffinityLists()
		if err != nil {
			g.log.Warn("the clients with session affinity cannot be counted; signalbox_affinity_lists_full keeps its value", "error", err)
			continue
		}
		g.observer.metrics.FullAffinityLists(full)
	}
}

// fullSyncPeriod is how often everything is written anew, as kube-proxy does,
// in case other software changed our rules without an error telling us.
const fullSyncPeriod = time.Hour

func (g *generation) loopOptions() syncer.LoopOptions {
	logProblem := syncer.LogProblems(g.log)
	opts := syncer.LoopOptions{
		NodeName: g.cfg.NodeName, Settings: g.cfg.ForMode(g.choice.Mode), MinSyncPeriod: g.cfg.MinSyncPeriod,
		Proxiers: g.proxiers, Logger: g.log, SyncPeriod: fullSyncPeriod, RetryPeriod: g.cfg.SyncPeriod,
		Report: func(p plan.Problem) {
			logProblem(p)
			g.observer.metrics.Problem(p)
			g.events.Problem(p)
		},
		Synced: func(r syncer.SyncReport) {
			g.noteSync(r)
			g.settings.note(r.Family.String(), g.proxiers[r.Family].KernelProblems())
			g.observer.synced(r)
		},
		NodeMissing: func(missing bool, others []string) {
			g.observer.noteNode(g.log, g.cfg.NodeName, missing, others)
		},
		NodeOptional: g.cfg.SourceDir != "",
	}
	if g.flows != nil { // a nil *Cleaner would be a FlowCleaner that is not nil
		opts.Flows = g.flows
	}
	return opts
}

// noteSync says when a family is first served, and tells what waits for that;
// each later sync is logged at debug level.
func (g *generation) noteSync(r syncer.SyncReport) {
	level := slog.LevelDebug
	if g.served.note(r) {
		level = slog.LevelInfo
	}
	g.log.Log(context.Background(), level, "synced", "family", r.Family.String(), "servicePorts", r.Services,
		"took", r.Took, "everything", r.All, "setAside", r.Quarantined, "failed", r.Err != nil)
}

// reportStart writes Events about the start of the process, about a mode that is
// a default, and about a configuration that was rolled back.
func (g *generation) reportStart() {
	g.tellStarted.Do(g.events.Started)
	g.tellModeUnset()
	if g.putBack != nil {
		g.events.ConfigurationRejected(g.putBack)
		g.putBack = nil
	}
}

// flushFor is how long an Event about the end of this process may keep it.
const flushFor = 2 * time.Second

// failHard returns an error when a server cannot listen and that is to end the
// process.
func (g *generation) failHard(ctx context.Context) error {
	select {
	case err := <-g.observer.servers.failed:
		g.events.Flush(flushFor)
		return err
	case <-ctx.Done():
		return nil
	}
}

// tellModeUnset warns that the mode is a default, which kube-proxy changes.
func (g *generation) tellModeUnset() {
	if !g.cfg.ModeUnset {
		return
	}
	note := g.cfg.ModeReason + ". The default of kube-proxy 1.40 is nftables: name a mode, with mode in the file or with --proxy-mode"
	g.log.Warn("no mode is configured", "reason", note)
	g.events.ModeUnset(note)
}
