// Package daemon joins the parts of signalbox into a process: a source of
// objects, the loop that turns them into plans, and one mode that programs
// each IP family.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"signalbox/config"
	"signalbox/conntrack"
	"signalbox/modes"
	"signalbox/node"
	"signalbox/proxier"
	"signalbox/source/apiserver"
	"signalbox/source/file"
)

// Source tells a Sink about objects until its context ends.
type Source interface {
	Run(ctx context.Context, sink proxier.Sink) error
}

func run(ctx context.Context, cfg *config.Config, planes *dataplanes, place *seat, log *slog.Logger) error {
	spareMemory()
	for _, w := range cfg.Warnings {
		log.Warn(w)
	}
	choice, err := modes.Choose(cfg.Mode, usableFamilies(log))
	if err != nil {
		return err
	}
	for _, lost := range choice.Lost {
		log.Warn("an IP family is not served", "reason", lost)
	}
	warnings, err := cfg.CheckFamilies(choice.Families, choice.Mode.Name)
	if err != nil {
		return err
	}
	for _, w := range warnings {
		log.Warn(w)
	}
	watched, err := newObserver(cfg, choice, log)
	if err != nil {
		return err
	}
	source, err := newSource(cfg, watched, log)
	if err != nil {
		return err
	}
	old := newLeftovers(choice, log)
	loop, closeAll, err := newLoop(cfg, choice, planes, watched, old, log)
	if err != nil {
		return err
	}
	defer closeAll()
	old.resync, old.drained, old.present = loop.Resync, planes.waitRetired, watched.metrics.Leftovers
	sink := watched.watch(loop)

	log.Info("starting", "mode", choice.Mode.Name, "families", familyNames(choice.Families), "node", cfg.NodeName)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		watched.settings.note("connection tracking", tune(cfg, log))
		return nil
	})
	group.Go(func() error { return node.Watch(ctx, loop.SetLocalAddrs) })
	group.Go(func() error { return source.Run(ctx, sink) })
	group.Go(func() error { return watched.tell(ctx) })
	group.Go(func() error { return serve(ctx, place, loop, watched.serve, planes, old, log) })
	group.Go(func() error { tellManager(ctx, old, planes.sockets, log); return nil })
	if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	log.Info("stopped; the rules stay in the kernel")
	return nil
}

func newSource(cfg *config.Config, watched *observer, log *slog.Logger) (Source, error) {
	if cfg.SourceDir != "" {
		return file.New(cfg.SourceDir, log)
	}
	apiserver.LogTo(log)
	client, err := apiserver.Client(clientOptions(cfg))
	if err != nil {
		return nil, err
	}
	source := apiserver.New(client, cfg.NodeName, log)
	source.Noted = watched.metrics.Source
	return source, nil
}

func clientOptions(cfg *config.Config) apiserver.ClientOptions {
	return apiserver.ClientOptions{
		Kubeconfig: cfg.Kubeconfig, Master: cfg.Master, QPS: cfg.QPS, Burst: cfg.Burst,
		ContentType: cfg.ContentType, AcceptContentTypes: cfg.AcceptContentTypes,
	}
}

// usableFamilies leaves out a family that the kernel has not got or that is
// switched off.
func usableFamilies(log *slog.Logger) []proxier.Family {
	var usable []proxier.Family
	for _, family := range proxier.Families {
		if err := node.FamilyUsable(family); err != nil {
			log.Info("an IP family is not served", "family", family.String(), "reason", err)
			continue
		}
		usable = append(usable, family)
	}
	return usable
}

// fullSyncPeriod is how often everything is written anew, as kube-proxy does,
// in case other software changed our rules without an error telling us.
const fullSyncPeriod = time.Hour

// newLoop makes the mode work in each family and joins it with what removes
// stale flows. closeAll lets go of all of it but the dataplanes.
func newLoop(cfg *config.Config, choice modes.Choice, planes *dataplanes, watched *observer, old *leftovers, log *slog.Logger) (loop *proxier.Loop, closeAll func(), err error) {
	var closers []func() error
	closeAll = func() {
		for _, c := range closers {
			if err := c(); err != nil {
				log.Warn("closing", "error", err)
			}
		}
	}
	opts := proxier.LoopOptions{
		NodeName: cfg.NodeName, Settings: cfg.ForMode(choice.Mode.Name), MinSyncPeriod: cfg.MinSyncPeriod,
		Proxiers: map[proxier.Family]proxier.Proxier{}, Logger: log,
		SyncPeriod: fullSyncPeriod, RetryPeriod: cfg.SyncPeriod,
	}
	opts.Synced = planes.onceServing(choice.Families, onSync(old, log), log)
	var relays []netip.Prefix
	for _, family := range choice.Families {
		p, err := planes.get(choice.Mode, proxier.Options{Family: family, MasqueradeMark: cfg.MasqueradeMark, IPVS: cfg.IPVS, Sockets: planes.sockets})
		if err != nil {
			closeAll()
			return nil, nil, fmt.Errorf("mode %s, %s: %w", choice.Mode.Name, family, err)
		}
		opts.Proxiers[family] = p
		old.shares(family, p)
		if r, ok := p.(interface{ RelayPrefix() netip.Prefix }); ok {
			relays = append(relays, r.RelayPrefix())
		}
	}
	flows, err := conntrack.New(conntrack.Options{
		Logger:     log,
		LocalAddrs: node.Addrs,
		Relays:     relays,
		Passed:     watched.metrics.FlowsPassed,
	})
	if err != nil {
		log.Warn("stale UDP flows are not removed", "reason", err)
		watched.metrics.FlowsUnseen()
	} else {
		closers = append(closers, flows.Close)
		opts.Flows, old.flows = flows, flows
	}
	watched.hook(&opts)
	return proxier.NewLoop(opts), closeAll, nil
}

// onSync says when a family is first served, and tells what waits for that;
// each later sync is logged at debug level.
func onSync(old *leftovers, log *slog.Logger) func(proxier.SyncReport) {
	return func(r proxier.SyncReport) {
		level := slog.LevelDebug
		if r.Err == nil && r.All && old.serves(r.Family) {
			level = slog.LevelInfo
		}
		log.Log(context.Background(), level, "synced", "family", r.Family.String(), "servicePorts", r.Services,
			"took", r.Took, "everything", r.All, "setAside", r.SetAside, "failed", r.Err != nil)
	}
}

func familyNames(families []proxier.Family) string {
	names := make([]string, len(families))
	for i, f := range families {
		names[i] = f.String()
	}
	return strings.Join(names, ",")
}
