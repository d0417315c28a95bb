// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"signalbox/daemon/nodelock"
	"signalbox/internal/nstest"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// A Service in quarantine at the start does not keep the node from being served.
func TestAQuarantinedServiceDoesNotHoldUpTheNode(t *testing.T) {
	complete := 0
	g := &configRun{log: slog.New(slog.DiscardHandler), initialSync: newInitialSync(2, func() { complete++ })}
	g.reportSync(syncer.SyncReport{Family: plan.IPv4, All: true, Current: true})
	g.reportSync(syncer.SyncReport{Family: plan.IPv6, All: true, Err: errors.New("no kernel state")})
	if complete != 0 {
		t.Error("a family that failed counts as served")
	}
	g.reportSync(syncer.SyncReport{Family: plan.IPv6, Current: true, Quarantined: 3, Err: errors.New("the kernel refuses Service default/bad")})
	if complete != 1 {
		t.Error("a quarantined Service keeps the node from being served")
	}
}

// After forget, a sync of changes does not count: everything is to be written
// anew first.
func TestServedAnewWhenEverythingIsWritten(t *testing.T) {
	s := newInitialSync(1, func() {})
	whole := syncer.SyncReport{Family: plan.IPv4, All: true, Current: true}
	change := syncer.SyncReport{Family: plan.IPv4, Current: true}
	for i, step := range []struct {
		forget bool
		sync   syncer.SyncReport
		first  bool
	}{
		{sync: whole, first: true}, {sync: whole}, {sync: change},
		{forget: true, sync: change}, {sync: whole, first: true}, {sync: change},
	} {
		if step.forget {
			s.reset()
		}
		if first := s.synced(step.sync); first != step.first {
			t.Errorf("sync %d: served for the first time is %v, want %v", i, first, step.first)
		}
	}
}

// TestNodeIsReadBeforeFirstSync: the first sync has what it needs of the node, or it would
// remove an earlier process's rules for a moment.
func TestNodeIsReadBeforeFirstSync(t *testing.T) {
	nstest.Enter(t)
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "uplink"}, PeerName: "peer"}
	addr, err := netlink.ParseAddr("192.0.2.7/24")
	if err == nil {
		err = netlink.LinkAdd(link)
	}
	if err == nil {
		err = netlink.AddrAdd(link, addr)
	}
	if err != nil {
		t.Fatal(err)
	}
	g := &configRun{log: slog.New(slog.DiscardHandler), loop: syncer.NewLoop(syncer.LoopOptions{})}
	g.readNode()
	if got := g.loop.LocalAddrs(); !slices.Contains(got, netip.MustParseAddr("192.0.2.7")) {
		t.Errorf("the Loop knows the addresses %v", got)
	}
}

// The log does not say that another process serves if that process has ended.
func TestHandOverToAnEndedProcess(t *testing.T) {
	const own = "SIGNALBOX_TEST_OWN_NAMESPACE" // the node lock belongs to a network namespace
	if os.Getenv(own) == "" {
		test := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.timeout=1m")
		test.Env = append(os.Environ(), own+"=yes")
		test.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if out, err := test.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	var text strings.Builder
	log := slog.New(slog.NewTextHandler(&text, nil))
	holder, other := nodelock.New(log, nil), nodelock.New(slog.New(slog.DiscardHandler), nil)
	if err := holder.Acquire(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = other.Acquire(ctx, "") // ends with ctx
	}()
	next := holder.NextContender(t.Context())
	end()
	<-ended
	handOver(newProxierPool(), holder, next, log)
	if got := text.String(); !strings.Contains(got, "has ended before it could") || strings.Contains(got, "serves this node") {
		t.Errorf("the log says\n%s", got)
	}
}
