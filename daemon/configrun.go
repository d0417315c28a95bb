// SPDX-License-Identifier: Apache-2.0

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

// configRun is the daemon under one configuration. It ends when another configuration
// takes effect.
type configRun struct {
	*daemonState
	cfg    *config.Config
	choice modes.Choice
	log    *slog.Logger

	source Source
	// client is nil without an API server.
	client kubernetes.Interface
	// servers are those to which client connects.
	servers apiserver.Servers
	// events is nil without an API server.
	events   *events.Recorder
	sysctls  *sysctlProblems
	proxiers map[plan.Family]proxier.Proxier
	// flows removes stale flows.
	flows        *conntrack.Cleaner
	initialSync  *initialSync
	loop         *syncer.Loop
	foreignRules *foreignRules
}

// newConfigRun makes all parts, and starts only the recorder of Events, which ends
// with ctx.
func newConfigRun(ctx context.Context, d *daemonState, cfg *config.Config, log *slog.Logger) (*configRun, error) {
	c := &configRun{daemonState: d, cfg: cfg, log: log, sysctls: newSysctlProblems(log, d.observer.metrics.Sysctl)}
	// What may fail comes first: a warning about something else would hide the error.
	if err := c.connect(ctx); err != nil {
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
	c.choice = choice
	c.pool.begin()
	c.observer.metrics.Serve(choice.Mode, choice.Families)
	if err := c.openProxiers(); err != nil {
		return nil, err
	}
	if err := c.makeFlowCleaner(); err != nil {
		return nil, err
	}
	c.initialSync = newInitialSync(len(choice.Families), func() { c.pool.closeUnused(log) })
	c.loop = syncer.NewLoop(c.loopOptions())
	c.servers.Follow(c.loop.SetAPIServers)
	c.foreignRules = newForeignRules(foreignRulesOptions{
		choice: choice, proxiers: c.proxiers, fullWrite: c.loop.RequestFullWrite, drained: c.pool.waitDrained, present: c.observer.foreignRules, log: log,
	})
	c.observer.follow(c)
	return c, nil
}

// close closes what does not outlive the configuration.
func (c *configRun) close() {
	c.flows.Close()
}

// choose returns the mode that a configuration asks for, and the families that it
// serves here.
func choose(cfg *config.Config, log *slog.Logger) (modes.Choice, error) {
	choice, err := modes.Choose(cfg.Mode, usableFamilies(log))
	if err != nil {
		return modes.Choice{}, err
	}
	for family, err := range choice.Lost {
		log.Warn("the mode does not serve an IP family here", "family", family.String(), "reason", err)
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
			log.Info("this node does not have an IP family", "family", family.String(), "reason", err)
			continue
		}
		usable = append(usable, family)
	}
	return usable
}

// connect makes the source of objects, and the recorder of Events.
func (c *configRun) connect(ctx context.Context) (err error) {
	if c.cfg.SourceDir != "" {
		source, err := file.New(c.cfg.SourceDir, c.log)
		if err != nil {
			return err
		}
		source.OnProblems = c.observer.reportManifests
		c.source = source
		return nil
	}
	if c.client, err = apiserver.Client(clientOptions(c.cfg, &c.servers)); err != nil {
		return err
	}
	source := apiserver.New(c.client, c.cfg.NodeName, c.log)
	source.OnRequest = c.observer.requested
	source.Known = c.known
	source.StateDir, source.OwnsState = c.cfg.StateDir, c.nodeLock.Held
	source.OnStale, source.OnUnsaved = c.observer.reportStale, c.observer.reportUnsaved
	c.source = source
	c.events = events.New(ctx, events.Options{Client: c.client, NodeName: c.cfg.NodeName, Log: c.log, Counted: c.observer.metrics.Event})
	return nil
}

// clientOptions returns the options of a client. servers may be nil.
func clientOptions(cfg *config.Config, servers *apiserver.Servers) apiserver.ClientOptions {
	return apiserver.ClientOptions{
		Kubeconfig: cfg.Kubeconfig, Master: cfg.Master, QPS: cfg.QPS, Burst: cfg.Burst,
		ContentType: cfg.ContentType, AcceptContentTypes: cfg.AcceptContentTypes, Servers: servers,
	}
}

// openProxiers makes the mode work in each family.
func (c *configRun) openProxiers() error {
	c.proxiers = map[plan.Family]proxier.Proxier{}
	for _, family := range c.choice.Families {
		p, err := c.pool.get(c.choice.Mode, c.cfg.Options(c.choice.Mode, family))
		if err != nil {
			return fmt.Errorf("mode %s, %s: %w", c.choice.Mode.Name(), family, err)
		}
		c.proxiers[family] = p
	}
	return nil
}

// makeFlowCleaner makes what removes stale flows.
func (c *configRun) makeFlowCleaner() (err error) {
	var relays []netip.Prefix
	for _, p := range c.proxiers {
		if prefix := p.RelayPrefix(); prefix.IsValid() {
			relays = append(relays, prefix)
		}
	}
	c.flows, err = conntrack.New(conntrack.Options{
		Logger: c.log, LocalAddrs: node.Addrs, Relays: relays, Opened: c.observer.metrics.ConntrackOpened, Scanned: c.observer.metrics.FlowsScanned,
	})
	return err
}

// affinityPeriod is how often the clients with session affinity are counted.
const affinityPeriod = time.Minute

// watchAffinity counts, until ctx ends, the lists of clients that are full.
func (c *configRun) watchAffinity(ctx context.Context) {
	for more := true; more; more = wait.For(ctx, affinityPeriod) {
		full, err := c.choice.Mode.FullAffinityLists()
		if err != nil {
			c.log.Warn("the clients with session affinity cannot be counted; signalbox_affinity_lists_full keeps its value", "error", err)
			continue
		}
		c.observer.metrics.FullAffinityLists(full)
	}
}

// fullWritePeriod is kube-proxy's. A full write repairs changes of other software that
// nothing has reported.
const fullWritePeriod = time.Hour

func (c *configRun) loopOptions() syncer.LoopOptions {
	logProblem := syncer.LogProblems(c.log)
	return syncer.LoopOptions{
		NodeName: c.cfg.NodeName, Settings: c.cfg.ForMode(c.choice.Mode), MinSyncPeriod: c.cfg.MinSyncPeriod, MaxProcessor: c.cfg.MaxProcessor,
		Proxiers: c.proxiers, Logger: c.log, FullWritePeriod: fullWritePeriod, RetryPeriod: c.cfg.SyncPeriod,
		Report: func(p plan.Problem) {
			logProblem(p)
			c.observer.metrics.Problem(p)
			c.events.Problem(p)
		},
		Synced: func(r syncer.SyncReport) {
			c.reportSync(r)
			c.sysctls.set(r.Family.String(), c.proxiers[r.Family].KernelProblems())
			c.observer.synced(r)
		},
		NodeMissing: func(missing bool, others []string) {
			c.observer.reportNode(c.log, c.cfg.NodeName, missing, others)
		},
		NodeOptional: c.cfg.SourceDir != "",
		Flows:        c.flows,
	}
}

// reportSync logs the first sync that serves a family, and others at debug level.
func (c *configRun) reportSync(r syncer.SyncReport) {
	level := slog.LevelDebug
	if c.initialSync.synced(r) {
		level = slog.LevelInfo
	}
	c.log.Log(context.Background(), level, "synced", "family", r.Family.String(), "servicePorts", r.ServicePorts,
		"took", r.Took, "fullWrite", r.All, "quarantined", r.Quarantined, "failed", r.Err != nil)
}

// reportStart writes Events about the start of the process, about a mode that is
// a default, and about a configuration that was rolled back.
func (c *configRun) reportStart() {
	c.startedEvent.Do(c.events.Started)
	c.reportModeUnset()
	if c.rolledBack != nil {
		c.events.ConfigurationRejected(c.rolledBack)
		c.rolledBack = nil
	}
}

// flushFor bounds the wait for the last Event before the process ends.
const flushFor = 2 * time.Second

// failHard returns an error when a server cannot listen and the configuration ends the
// process then.
func (c *configRun) failHard(ctx context.Context) error {
	select {
	case err := <-c.observer.servers.failed:
		c.events.Flush(flushFor)
		return err
	case <-ctx.Done():
		return nil
	}
}

// reportModeUnset warns that the mode is a default, which kube-proxy changes.
func (c *configRun) reportModeUnset() {
	if !c.cfg.ModeUnset {
		return
	}
	note := c.cfg.ModeReason + ". The default of kube-proxy 1.40 is nftables: name a mode, with mode in the file or with --proxy-mode"
	c.log.Warn("no mode is configured", "reason", note)
	c.events.ModeUnset(note)
}
