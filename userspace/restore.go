package userspace

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"signalbox/internal/wait"
	"signalbox/proxier"
)

const (
	// restorePace is the least time between two looks at what another program
	// has removed: one that removes it again and again is not to keep a
	// processor busy.
	restorePace = 200 * time.Millisecond
	// watchPace is the wait before a watch that broke off is begun again.
	watchPace = 5 * time.Second
)

// removals tells of routing rules and routes that are removed.
type removals struct{ socket *nl.NetlinkSocket }

// watchRemovals watches the network namespace of the calling thread.
func watchRemovals(f proxier.Family) (*removals, error) {
	groups := []uint{unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV4_ROUTE}
	if f == proxier.IPv6 {
		groups = []uint{unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_IPV6_ROUTE}
	}
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, groups...)
	if err != nil {
		return nil, fmt.Errorf("watch the routing rules of %s: %w", f, err)
	}
	return &removals{s}, nil
}

func (r *removals) close() { r.socket.Close() }

// wait returns when a rule or route is gone that may be the relay's, or when the
// kernel had to leave some messages out.
func (r *removals) wait() error {
	for {
		messages, _, err := r.socket.Receive()
		switch {
		case errors.Is(err, unix.ENOBUFS):
			return nil
		case err != nil:
			return err
		}
		for _, m := range messages {
			if concernsRelay(m) {
				return nil
			}
		}
	}
}

// concernsRelay looks at the table only, which the fixed part of both kinds of
// message has in the same place. Numbers of tables that do not fit there read as
// RT_TABLE_COMPAT.
func concernsRelay(m syscall.NetlinkMessage) bool {
	const table = 4
	return (m.Header.Type == unix.RTM_DELRULE || m.Header.Type == unix.RTM_DELROUTE) &&
		len(m.Data) > table && (m.Data[table] == unix.RT_TABLE_COMPAT || m.Data[table] == unix.RT_TABLE_LOCAL)
}

// keepRoutes has the relay's rule and routes put back when another program
// removes them, as systemd-networkd removes all rules that it does not know
// whenever it starts. It ends with the relay.
func (r *relay) keepRoutes() {
	for r.ctx.Err() == nil {
		if err := r.restoreOnRemoval(r.ctx); err != nil && r.ctx.Err() == nil {
			slog.Warn("userspace: removed routing rules are not noticed for now; trying again", "family", r.family.String(), "error", err)
			wait.For(r.ctx, watchPace)
		}
	}
}

func (r *relay) restoreOnRemoval(ctx context.Context) error {
	var watch *removals
	var err error
	if e := r.ns.Do(func() { watch, err = watchRemovals(r.family) }); e != nil || err != nil {
		return errors.Join(e, err)
	}
	defer context.AfterFunc(ctx, watch.close)()
	defer watch.close()
	for {
		// First, as something may have gone before the watch began.
		if err := r.routes.restore(); err != nil {
			slog.Warn("userspace: a routing rule or route that another program has removed cannot be put back; connections that bear their clients' addresses hang, or all do, until a full sync succeeds",
				"family", r.family.String(), "error", err)
		}
		if !wait.For(ctx, restorePace) {
			return nil
		}
		if err := watch.wait(); err != nil {
			return err
		}
	}
}

// restore puts back what is missing of what ensure made, unless the relay has
// left the node to another process.
func (r *routes) restore() error {
	r.keep.Lock()
	defer r.keep.Unlock()
	if !r.kept {
		return nil
	}
	own, answers, rule, err := r.entries()
	if err != nil {
		return err
	}
	var failed []error
	put := func(what string, err error) {
		switch {
		case err == nil:
			slog.Warn("userspace: another program has removed what the relay needs of the kernel's routing; it is put back",
				"what", what, "family", r.family.String())
		case !errors.Is(err, unix.EEXIST):
			failed = append(failed, fmt.Errorf("%s: %w", what, err))
		}
	}
	put(fmt.Sprintf("route of %s to this node", own.Dst), r.handle.RouteAdd(own))
	put(fmt.Sprintf("route of table %d", answersTable), r.handle.RouteAdd(answers))
	put(fmt.Sprintf("rule %d for marked packets", answersPriority), r.handle.RuleAdd(rule))
	return errors.Join(failed...)
}

// forsake ends what restore does: what is removed from now on stays away.
func (r *routes) forsake() {
	r.keep.Lock()
	defer r.keep.Unlock()
	r.kept = false
}
