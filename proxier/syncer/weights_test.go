// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"signalbox/proxier/plan"
)

func annotated(key, value string) func(*corev1.Service) {
	return func(s *corev1.Service) { s.Annotations = map[string]string{key: value} }
}

// TestEvenModesSaySoOnce checks that in a mode without schedulers annotations
// change nothing but for the weight 0, and that this is said once for each
// Service.
func TestEvenModesSaySoOnce(t *testing.T) {
	var log bytes.Buffer
	b := newRig(t, func(o *LoopOptions) { o.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	b.Apply(newService("web", "10.96.0.1"))
	b.Apply(newService("api", "10.96.0.2"))
	b.Apply(newSlice("web", "10.244.2.1", "10.244.2.2"))
	b.Synced()
	sync := func(lines int) {
		t.Helper()
		if err := b.SyncNow(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(log.String(), "spread evenly"); n != lines {
			t.Errorf("it was said %d times and not %d:\n%s", n, lines, log.String())
		}
	}
	sync(0)
	desired := b.Plan(plan.IPv4).String()
	b.Apply(newService("web", "10.96.0.1", annotated(plan.AnnotationWeights, "10.244.2.1=3")))
	b.Apply(newService("api", "10.96.0.2", annotated(plan.AnnotationScheduler, "lc")))
	calls := len(b.mode.calls)
	sync(2)
	b.Apply(newService("web", "10.96.0.1", annotated(plan.AnnotationWeights, "10.244.2.1=4")))
	sync(2)
	if got := b.Plan(plan.IPv4).String(); got != desired || len(b.mode.calls) != calls {
		t.Errorf("%d syncs made\n%sof\n%s", len(b.mode.calls)-calls, got, desired)
	}
	b.Apply(newService("web", "10.96.0.1", annotated(plan.AnnotationWeights, "10.244.2.1=0")))
	sync(2)
	if got := b.Plan(plan.IPv4).String(); !strings.Contains(got, "a: 10.244.2.2:8080\n") || !strings.Contains(got, "serving: b") {
		t.Errorf("with the weight 0:\n%s", got)
	}
	b.Apply(newService("web", "10.96.0.1", annotated(plan.AnnotationScheduler, "sh")))
	sync(3)
}

// TestWeightsReachTheMode checks that a change of an annotation alone is a
// change, and of the sets that it does not touch none.
func TestWeightsReachTheMode(t *testing.T) {
	b := newRig(t, func(o *LoopOptions) { o.Settings.HasSchedulers = true })
	slice := newSlice("web", "10.244.2.1", "10.244.2.2")
	b.Apply(newService("web", "10.96.0.1"))
	b.Apply(slice)
	b.Synced()
	for step, change := range []func(){
		func() {},
		func() { b.Apply(newService("web", "10.96.0.1", annotated(plan.AnnotationWeights, "10.244.2.1=3"))) },
		func() { b.Apply(newService("web", "10.96.0.1", annotated(plan.AnnotationScheduler, "lc"))) },
		func() {
			slice.Annotations = map[string]string{plan.AnnotationWeights: "10.244.2.2=2"}
			b.Apply(slice)
		},
		func() { b.Apply(newService("web", "10.96.0.1")) },
	} {
		change()
		if err := b.SyncNow(t.Context()); err != nil {
			t.Fatal(err)
		}
		if len(b.mode.calls) != step+1 {
			t.Errorf("after step %d there were %d syncs", step, len(b.mode.calls))
		}
	}
	if got := b.Plan(plan.IPv4).String(); !strings.Contains(got, "10.244.2.1:8080 10.244.2.2:8080=2") {
		t.Errorf("at the end:\n%s", got)
	}
}
