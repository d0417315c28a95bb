// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"

	"signalbox/config"
	"signalbox/explain"
	"signalbox/modes"
	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
	"signalbox/source/apiserver"
	"signalbox/source/file"
)

// Plans reads the manifests of cfg.SourceDir once and returns what the node
// must do for them in each family, without looking at this machine. local are
// the addresses that the node's interfaces are taken to have.
func Plans(ctx context.Context, cfg *config.Config, mode proxier.Mode, local []netip.Addr) ([]*plan.Plan, error) {
	loop, err := readOnce(ctx, cfg, mode, local, slog.Default())
	if err != nil {
		return nil, err
	}
	return []*plan.Plan{loop.Plan(plan.IPv4), loop.Plan(plan.IPv6)}, nil
}

// Explain reads the objects once and answers a question, without looking at this
// machine. The mode auto stands for the preferred one.
func Explain(ctx context.Context, cfg *config.Config, local []netip.Addr, q explain.Question) (*explain.Answer, error) {
	mode := modes.All[0]
	if cfg.Mode != modes.Auto {
		var err error
		if mode, err = modes.Named(cfg.Mode); err != nil {
			return nil, err
		}
	}
	loop, err := readOnce(ctx, cfg, mode, local, slog.New(slog.DiscardHandler)) // the answer has the problems
	if err != nil {
		return nil, err
	}
	return explain.Explain(loop, explain.Environment{Node: cfg.NodeName, Mode: mode.Name(), Traits: mode.Traits(), Origin: origin(cfg)}, q), nil
}

// origin says where the objects come from.
func origin(cfg *config.Config) string {
	if cfg.SourceDir != "" {
		return "manifests of " + cfg.SourceDir
	}
	return "API server"
}

// readOnce reads the objects that exist and plans for them.
func readOnce(ctx context.Context, cfg *config.Config, mode proxier.Mode, local []netip.Addr, log *slog.Logger) (*syncer.Loop, error) {
	var servers apiserver.Servers
	source, err := newSource(cfg, &servers, log)
	if err != nil {
		return nil, err
	}
	loop := syncer.NewLoop(syncer.LoopOptions{
		NodeName: cfg.NodeName, Settings: cfg.ForMode(mode), Logger: log, NodeOptional: cfg.SourceDir != "",
		Proxiers: map[plan.Family]proxier.Proxier{plan.IPv4: planOnly{}, plan.IPv6: planOnly{}},
	})
	loop.SetLocalAddrs(local)
	servers.Follow(loop.SetAPIServers)
	read, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := source.Run(read, untilSynced{loop, cancel}); err != nil {
		return nil, fmt.Errorf("reading the objects of the %s: %w", origin(cfg), err)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("the %s gives not all objects: %w", origin(cfg), err)
	}
	return loop, loop.SyncNow(context.Background())
}

// newSource makes a source that need not wait for a directory.
func newSource(cfg *config.Config, servers *apiserver.Servers, log *slog.Logger) (Source, error) {
	if cfg.SourceDir == "" {
		client, err := apiserver.Client(clientOptions(cfg, servers))
		if err != nil {
			return nil, err
		}
		return apiserver.New(client, cfg.NodeName, log), nil
	}
	if _, err := os.Stat(cfg.SourceDir); err != nil {
		return nil, fmt.Errorf("reading manifests: %w", err)
	}
	return file.New(cfg.SourceDir, log)
}

// planOnly stands where a mode would be when only the plan is asked for.
type planOnly struct{ proxier.Defaults }

func (planOnly) Sync(context.Context, *plan.Plan, plan.Change) error { return nil }
func (planOnly) Close() error                                        { return nil }

// untilSynced ends the source once all that exists has been told.
type untilSynced struct {
	*syncer.Loop
	stop context.CancelFunc
}

func (u untilSynced) Synced() {
	u.Loop.Synced()
	u.stop()
}
