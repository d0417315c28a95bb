// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

func TestARefusedServiceIsQuarantined(t *testing.T) {
	b := filled(t, 'h')
	b.mode.setRefuse(refusing("c", "f"))
	was := b.mode.kernel[plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "default", Name: "c"}, Port: "http", Protocol: plan.TCP}]
	for c := 'a'; c <= 'h'; c++ {
		b.Apply(newSlice(string(c), "10.244.2.2"))
	}
	err := b.syncNow()
	if err == nil || !strings.Contains(err.Error(), "Service default/c:http: refused c") || strings.Contains(err.Error(), "default/d") {
		t.Errorf("SyncNow: %v", err)
	}
	b.wantInKernel("c", "f")
	if b.mode.kernel[was.Name] != was {
		t.Error("what was served at c is not any more")
	}
	if len(b.problems) != 2 || b.problems[0].Object != "default/c" || b.problems[1].Object != "default/f" {
		t.Errorf("reported: %v", b.problems)
	}
	if r := b.reports[len(b.reports)-1]; r.Quarantined != 2 || r.Err == nil || r.ServicePorts != 8 {
		t.Errorf("report: %+v", r)
	}

	// Others go in at the first try, and a retry that fails alike is not news.
	calls := len(b.mode.calls)
	b.Apply(newSlice("a", "10.244.2.3"))
	if worked, err := b.sync(context.Background(), false); !worked || err != nil || len(b.mode.calls) != calls+1 {
		t.Errorf("a change of another Service took %d syncs: %v", len(b.mode.calls)-calls, err)
	}
	if err := b.syncNow(); err == nil || len(b.problems) != 2 {
		t.Errorf("a retry: %v, reported: %v", err, b.problems)
	}

	b.mode.setRefuse(nil)
	b.mustSync()
	b.mustSyncNothing()
}

func TestARefusedServiceIsTriedWhenItChanges(t *testing.T) {
	b := filled(t, 'd')
	b.mode.setRefuse(func(plan *plan.Plan, change plan.Change) error {
		for _, n := range change.Services {
			if plan.Services[n].Usable.Len() > 2 {
				return errors.New("too many")
			}
		}
		return nil
	})
	b.Apply(newSlice("a", "10.244.2.1", "10.244.2.2", "10.244.2.3"))
	b.Apply(newSlice("b", "10.244.2.1", "10.244.2.2"))
	if err := b.syncNow(); err == nil {
		t.Fatal("no error")
	}
	b.wantInKernel("a")
	b.Apply(newSlice("a", "10.244.2.3"))
	if _, err := b.sync(context.Background(), false); err != nil {
		t.Errorf("the changed Service: %v", err)
	}
	b.wantInKernel()
	b.mustSyncNothing()
}

func TestRetriesComeLaterAndLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newRig(t, func(o *LoopOptions) { o.RetryPeriod = time.Second })
		b.mode.setRefuse(refusing("bad"))
		b.Apply(newService("bad", "10.96.0.1"))
		b.Apply(newService("good", "10.96.0.2"))
		b.Synced()
		b.run()
		start := time.Now()
		time.Sleep(4600 * time.Millisecond)
		synctest.Wait()
		var at []time.Duration
		for _, c := range b.mode.calls {
			at = append(at, c.at.Sub(start))
		}
		at = slices.Compact(at) // a search calls more than once
		want := []time.Duration{0, 100, 300, 700, 1500, 2500, 3500, 4500}
		for i := range want {
			want[i] *= time.Millisecond
		}
		if !slices.Equal(at, want) {
			t.Errorf("tries at %v, want %v", at, want)
		}
		b.wantInKernel("bad")
	})
}

func TestOtherChangesDoNotPutARetryOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newRig(t, func(o *LoopOptions) { o.RetryPeriod = 10 * time.Second })
		b.Apply(newService("good", "10.96.0.2"))
		b.Synced()
		b.run()
		synctest.Wait()
		b.mode.setRefuse(refusing("bad"))
		b.Apply(newService("bad", "10.96.0.1"))
		b.Apply(newService("better", "10.96.0.3"))
		time.Sleep(30 * time.Second)
		synctest.Wait()
		b.mode.setRefuse(nil)
		for i := range 20 { // the storm goes on for longer than a retry takes
			b.Apply(newService("good", clusterIP(i+5)))
			time.Sleep(time.Second)
		}
		synctest.Wait()
		b.wantInKernel()
	})
}

func TestNothingIsWipedToFindWhatFails(t *testing.T) {
	b := filled(t, 'h')
	whole := len(b.mode.kernel)
	b.mode.setRefuse(func(plan *plan.Plan, change plan.Change) error {
		if n := len(b.mode.kernel); n < whole {
			t.Errorf("the kernel holds %d Services of %d", n, whole)
		}
		return refusing("bad")(plan, change)
	})
	b.Apply(newService("bad", "10.96.7.7"))
	for range 6 { // alone, everything anew, and again
		_ = b.syncNow()
	}
	b.wantInKernel("bad")
	b.RequestFullWrite()
	_ = b.syncNow()
	b.wantInKernel("bad")
	if all := countAll(b); all != 3 {
		t.Errorf("everything was written %d times, want 3: at the start, because of bad, and when asked", all)
	}
	b.mode.setRefuse(nil)
	b.mustSync()
}

func countAll(b *rig) (n int) {
	for _, c := range b.mode.calls {
		if c.change.All && c.err == nil {
			n++
		}
	}
	return n
}

func TestARefusedServiceKeepsItsOldFormWhenAllIsWritten(t *testing.T) {
	b := filled(t, 'c')
	name := plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "default", Name: "b"}, Port: "http", Protocol: plan.TCP}
	was := b.mode.kernel[name]
	b.mode.setRefuse(func(plan *plan.Plan, change plan.Change) error {
		if sp := plan.Services[name]; sp != was && (change.All || slices.Contains(change.Services, name)) {
			return errors.New("refused")
		}
		return nil
	})
	b.Apply(newSlice("b", "10.244.2.2"))
	for range 5 {
		_ = b.syncNow()
		b.RequestFullWrite()
	}
	if b.mode.kernel[name] != was {
		t.Errorf("the kernel has %v", b.mode.kernel[name])
	}
}

func TestAFirstSyncThatFailsIsTriedAgainBeforeServicesAreBlamed(t *testing.T) {
	b := newRig(t)
	fails := maxFullWriteFailures - 1
	b.mode.setRefuse(func(_ *plan.Plan, change plan.Change) error {
		if !change.All {
			t.Errorf("wrote parts: %+v", change)
		}
		if fails--; fails >= 0 {
			return errors.New("somebody holds the lock")
		}
		return nil
	})
	b.Apply(newService("web", "10.96.0.1"))
	b.Synced()
	for range maxFullWriteFailures - 1 {
		if err := b.syncNow(); err == nil {
			t.Fatal("no error")
		}
	}
	b.mustSync()
	if len(b.problems) != 0 {
		t.Errorf("blamed: %v", b.problems)
	}
}

func TestABadServiceAtTheStartKeepsNobodyElseOut(t *testing.T) {
	for _, bad := range []int{1, 30, 100} {
		t.Run(fmt.Sprint(bad), func(t *testing.T) {
			b := newRig(t)
			var badNames []string
			for i := range 200 {
				name := fmt.Sprintf("good-%03d", i)
				if i < bad { // they sort first
					name = fmt.Sprintf("bad-%03d", i)
					badNames = append(badNames, name)
				}
				b.Apply(newService(name, clusterIP(i)))
			}
			b.mode.setRefuse(refusing(badNames...))
			b.Synced()
			for range maxFullWriteFailures {
				_ = b.syncNow()
			}
			b.wantInKernel(badNames...)
			if len(b.mode.kernel) != 200-bad {
				t.Errorf("%d Services are served", len(b.mode.kernel))
			}
		})
	}
}

func TestUnknownStateIsWrittenAnew(t *testing.T) {
	b := filled(t, 'd')
	fail := true
	b.mode.setRefuse(func(*plan.Plan, plan.Change) error {
		if fail {
			fail = false
			return fmt.Errorf("torn: %w", proxier.ErrUnknownState)
		}
		return nil
	})
	b.Apply(newSlice("a", "10.244.2.2"))
	b.mustSync()
	if c := b.mode.calls[2].change; !c.All {
		t.Errorf("wrote %+v after it", c)
	}
}

func TestUnknownStateWaitsForItsRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newRig(t)
		b.mode.setRefuse(func(*plan.Plan, plan.Change) error { return proxier.ErrUnknownState })
		b.Synced()
		b.run()
		for i := range 90 {
			b.Apply(newService("web", clusterIP(i)))
			time.Sleep(time.Millisecond)
		}
		synctest.Wait()
		if n := len(b.mode.calls); n != 1 {
			t.Errorf("%d tries within the first wait", n)
		}
		b.mode.setRefuse(nil)
		time.Sleep(time.Second)
		synctest.Wait()
		b.wantInKernel()
	})
}

func TestAPanicCostsTheServiceThatCausesIt(t *testing.T) {
	b := filled(t, 'h')
	b.mode.setRefuse(func(plan *plan.Plan, change plan.Change) error {
		if refusing("bad")(plan, change) != nil {
			panic("index out of range")
		}
		return nil
	})
	b.Apply(newService("bad", "10.96.7.7"))
	b.Apply(newSlice("a", "10.244.2.2"))
	for range 1 + maxFullWriteFailures {
		if err := b.syncNow(); err == nil {
			t.Fatal("no error")
		}
	}
	b.wantInKernel("bad")
	if b.mode.lost {
		t.Error("the kernel's state was left unknown")
	}
	// From here on it costs nobody else anything.
	b.Apply(newSlice("b", "10.244.2.2"))
	if _, err := b.sync(context.Background(), false); err != nil {
		t.Error(err)
	}
	b.wantInKernel("bad")
}

func TestAHandoverIsNotTornApart(t *testing.T) {
	b := filled(t, 'h')
	b.mode.setRefuse(refusing("h"))
	// b and f swap cluster IPs, and h is bad.
	b.Apply(newService("b", clusterIP(5)))
	b.Apply(newService("f", clusterIP(1)))
	b.Apply(newService("h", clusterIP(7), nodePort(30001)))
	if err := b.syncNow(); err == nil || strings.Contains(err.Error(), "already") {
		t.Errorf("SyncNow: %v", err)
	}
	b.wantInKernel("h")
}

func TestAFailureWhateverTheServicesIsNotTheirs(t *testing.T) {
	b := filled(t, 'z')
	gone := true
	b.mode.setRefuse(func(_ *plan.Plan, change plan.Change) error {
		if gone = gone && !change.All; gone {
			return errors.New("table is gone")
		}
		return nil
	})
	for c := 'a'; c <= 'z'; c++ {
		b.Apply(newSlice(string(c), "10.244.2.2"))
	}
	b.mustSync()
	failed := 0
	for _, c := range b.mode.calls {
		if c.err != nil {
			failed++
		}
	}
	if failed > 4*maxFailedAlone {
		t.Errorf("%d tries failed before the Services were believed", failed)
	}
	if len(b.problems) != 0 {
		t.Errorf("blamed: %v", b.problems)
	}
}

func TestACancelledSyncBlamesNobody(t *testing.T) {
	b := filled(t, 'h')
	ctx, cancel := context.WithCancel(context.Background())
	b.mode.setRefuse(func(*plan.Plan, plan.Change) error {
		cancel()
		return ctx.Err()
	})
	b.Apply(newSlice("a", "10.244.2.2"))
	b.Apply(newSlice("b", "10.244.2.2"))
	if err := b.SyncNow(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("SyncNow: %v", err)
	}
	b.mode.setRefuse(nil)
	b.mustSync()
	if len(b.problems) != 0 {
		t.Errorf("blamed: %v", b.problems)
	}
}

func TestARefusedNewServiceThatIsDeletedIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newRig(t)
		b.Synced()
		b.run()
		synctest.Wait()
		b.mode.setRefuse(refusing("bad"))
		bad := newService("bad", "10.96.0.1")
		b.Apply(bad)
		time.Sleep(time.Minute)
		b.Delete(bad)
		time.Sleep(time.Minute)
		synctest.Wait()
		calls := len(b.mode.calls)
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(b.mode.calls) - calls; n != 0 {
			t.Errorf("%d syncs for a Service that is gone", n)
		}
		b.wantInKernel()
	})
}

func TestWhatWasTakenOnceMayBeRefusedLater(t *testing.T) {
	b := filled(t, 'h')
	b.mode.setRefuse(refusing("c"))
	b.RequestFullWrite()
	for range 2 * maxFullWriteFailures {
		if err := b.syncNow(); err == nil {
			t.Fatal("no error")
		}
	}
	b.wantInKernel("c")
	if len(b.mode.kernel) != 7 || len(b.problems) != 1 || b.problems[0].Object != "default/c" {
		t.Errorf("%d Services are served; reported %v", len(b.mode.kernel), b.problems)
	}
}

func TestSetsAreComparedWithWhatTheKernelHas(t *testing.T) {
	b := filled(t, 'c')
	name := plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "default", Name: "b"}, Port: "http", Protocol: plan.TCP}
	inKernel := b.mode.kernel[name].Usable
	b.mode.setRefuse(refusing("b"))
	b.Apply(newSlice("b", "10.244.2.2"))
	_ = b.syncNow()
	b.Apply(newSlice("b", "10.244.2.1")) // as in the kernel
	b.Apply(newService("b", clusterIP(1), nodePort(30001)))
	_ = b.syncNow()
	if got := b.Plan(plan.IPv4).Services[name].Usable; got != inKernel {
		t.Errorf("the set is another one than the kernel's, though its endpoints are the same")
	}
}
