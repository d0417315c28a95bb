package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"

	"signalbox/config"
	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
	"signalbox/source/file"
)

// Plans reads the manifests of cfg.SourceDir once and returns what the node
// must do for them in each family, without looking at this machine. local are
// the addresses that the node's interfaces are taken to have.
func Plans(ctx context.Context, cfg *config.Config, mode proxier.Mode, local []netip.Addr) ([]*plan.Plan, error) {
	if _, err := os.Stat(cfg.SourceDir); err != nil {
		return nil, fmt.Errorf("reading manifests: %w", err) // the source would wait for the directory
	}
	source, err := file.New(cfg.SourceDir, slog.Default())
	if err != nil {
		return nil, err
	}
	loop := syncer.NewLoop(syncer.LoopOptions{
		NodeName: cfg.NodeName, Settings: cfg.ForMode(mode),
		Proxiers: map[plan.Family]proxier.Proxier{plan.IPv4: planOnly{}, plan.IPv6: planOnly{}},
	})
	loop.SetLocalAddrs(local)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := source.Run(ctx, untilSynced{loop, cancel}); err != nil {
		return nil, fmt.Errorf("reading %s: %w", cfg.SourceDir, err)
	}
	if err := loop.SyncNow(context.Background()); err != nil {
		return nil, err
	}
	return []*plan.Plan{loop.Plan(plan.IPv4), loop.Plan(plan.IPv6)}, nil
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
