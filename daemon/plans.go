// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"

	"signalbox/config"
	"signalbox/conntrack"
	"signalbox/explain"
	"signalbox/kubeproxy"
	"signalbox/modes"
	"signalbox/node"
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

// Explain reads the objects once and answers a question without a daemon. noDaemon says why
// none answered; nil if none was asked. If this machine is the node, the answer also has what
// the kernel tells without a plan: which mode has rules, rules of kube-proxy, tracked
// connections, and the interfaces. The mode auto stands for the one that has rules, or the
// preferred one.
func Explain(ctx context.Context, cfg *config.Config, local []netip.Addr, q explain.Question, noDaemon error) (*explain.Answer, error) {
	mode := modes.All[0]
	if cfg.Mode != modes.Auto {
		var err error
		if mode, err = modes.Named(cfg.Mode); err != nil {
			return nil, err
		}
	}
	env := explain.Environment{Node: cfg.NodeName, NoDaemon: noDaemon, Origin: origin(cfg) + "; no signalbox was asked"}
	if noDaemon != nil {
		env.Origin = origin(cfg) + "; no signalbox answers"
	}
	here := noDaemon != nil || cfg.SourceDir == "" && isThisMachine(cfg.NodeName)
	if here {
		mode = inspectKernel(ctx, &env, mode, cfg.Mode == modes.Auto)
		env.Link = node.LinkTo
		addrs, err := node.Addrs()
		if err != nil {
			env.Problems = append(env.Problems, "this node's addresses cannot be read; those of the Node object are known: "+err.Error())
		}
		local = slices.Concat(local, addrs)
	}
	env.Mode, env.Traits = mode.Name(), mode.Traits()
	loop, err := readOnce(ctx, cfg, mode, local, slog.New(slog.DiscardHandler)) // the answer has the problems
	if err != nil {
		return nil, err
	}
	answer := explain.Explain(loop, env, q)
	if here {
		answer.Track(ctx, conntrack.List, loop.NodeAddrs())
	}
	return answer, nil
}

func isThisMachine(nodeName string) bool {
	name, err := node.Name("")
	return err == nil && name == nodeName
}

// inspectKernel adds to env what the kernel has without a plan to compare it with. It returns
// mode, or with automatic the first mode that has rules.
func inspectKernel(ctx context.Context, env *explain.Environment, mode proxier.Mode, automatic bool) proxier.Mode {
	// The iptables tools do not tell a missing right from missing rules. nf_tables does.
	if _, _, err := modes.All[0].Written(plan.IPv4); errors.Is(err, fs.ErrPermission) {
		env.Problems = append(env.Problems, "the rules in the kernel are not known: "+err.Error())
		return mode
	}
	env.Problems = append(env.Problems, "the rules in the kernel are not compared: only a running signalbox does that")
	if automatic {
		if i := slices.IndexFunc(modes.All, hasRules); i >= 0 {
			mode = modes.All[i]
		}
	}
	env.Doubts = map[plan.Family][]string{}
	for _, family := range plan.Families {
		found, taken, err := mode.Written(family)
		switch {
		case err != nil:
			env.Doubts[family] = []string{fmt.Sprintf("It is not known whether the kernel has rules of the mode %s for %s (%v)", mode.Name(), family, err)}
		case !found:
			env.Doubts[family] = []string{fmt.Sprintf("The kernel has no rules of the mode %s for %s", mode.Name(), family)}
		}
		if slices.ContainsFunc(kubeproxy.Remnants(), func(r proxier.Remnant) bool { return r.Found(ctx, family, taken) }) {
			env.Foreign = append(env.Foreign, family)
		}
	}
	return mode
}

// hasRules says whether the kernel has rules of a mode.
func hasRules(m proxier.Mode) bool {
	return slices.ContainsFunc(plan.Families, func(f plan.Family) bool {
		found, _, err := m.Written(f)
		return err == nil && found
	})
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
