// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"signalbox/internal/measure"
	"signalbox/proxier/plan"
)

// change moves the Service "moving" to another Pod, again and again, and
// measures from the moment at which the changed manifest appears until the
// first answer of the new Pod has arrived. It connects without a pause, so the
// result is too long by at most one connection.
func (t *trial) change(ctx context.Context, f *familyResult) error {
	l := t.layout()
	at := moving.at(plan.ClusterIP, f.family, netip.Addr{})
	pods := []string{"pod-c", moving.pods[0]}
	for n := range t.cfg.Changes {
		to := pods[n%len(pods)]
		m := l.movingManifest(f.family, to)
		move, err := t.source.Prepare(m.name, m.objects...)
		if err != nil {
			return err
		}
		began := time.Now()
		if err := move(); err != nil {
			return err
		}
		fails, err := t.awaitAnswerOf(ctx, to, at)
		if err != nil {
			return err
		}
		f.changes = append(f.changes, time.Since(began))
		f.changeFails = append(f.changeFails, fails...)
	}
	t.out.changes(f)
	return nil
}

// awaitAnswerOf connects until the named Pod answers. fails names what nobody
// answered meanwhile: a change must not cost a connection.
func (t *trial) awaitAnswerOf(ctx context.Context, pod string, at netip.AddrPort) (fails []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	for {
		a, err := t.ask(ctx, clientPod, "tcp", at, answerTimeout)
		switch {
		case err == nil && a.Server == pod:
			return fails, nil
		case ctx.Err() != nil:
			return fails, fmt.Errorf("expected %s to answer at %s within %v of the changed manifest: %w", pod, at, answerTimeout, t.alive(ctx))
		case err != nil:
			fails = append(fails, fmt.Sprintf("expected every connection to %s to be answered while the endpoint moves to %s: %v", at, pod, err))
		}
		if err := t.alive(ctx); err != nil {
			return fails, err
		}
	}
}

// timeConnects measures from a Pod how long connect(2) takes to the cluster IP
// of a Service with one Pod and to that Pod itself, taking turns, so that both
// meet the same machine.
func (t *trial) timeConnects(ctx context.Context, f *familyResult) error {
	through := single.at(plan.ClusterIP, f.family, netip.Addr{})
	direct := netip.AddrPortFrom(t.lab.Host(single.pods[0]).Addr.Of(f.family), podPort)
	err := t.lab.Host(clientPod).Do(func() error {
		return recovered(func() (err error) {
			f.connects, err = measure.TakeTurns(ctx, measure.Connect, through, direct)
			return err
		})
	})
	if err != nil {
		return err
	}
	t.out.connects(f)
	return nil
}
