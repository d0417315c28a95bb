// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// TestSchedulerOf checks the scheduler of Service ports on a kernel that lacks some, and how
// often the kernel is asked.
func TestSchedulerOf(t *testing.T) {
	w := world{plan.IPv4}
	kernel := []string{"lc", "wrr", "sh"}
	var asked []string
	ask := func(name string) (bool, error) {
		asked = append(asked, name)
		if name == "mute" {
			return false, errors.New("no answer")
		}
		return slices.Contains(kernel, name), nil
	}
	port := func(scheduler string, weight uint16) *plan.ServicePort {
		set := w.pods(1, 2)
		set.Endpoints[1].Weight = weight
		sp := w.service("web", plan.TCP, set, local(plan.NodePort, w.vip(1), 80, w.pods(1), set))
		sp.Scheduler = scheduler
		return sp
	}
	for _, test := range []struct {
		own, asks string
		weight    uint16
		want      string
	}{
		{"", "", 0, "rr"},
		{"", "", 1, "rr"},
		{"", "", 2, "wrr"},
		{"", "rr", 2, "rr"},
		{"", "sh", 2, "sh"},
		{"", "mh", 0, "rr"},
		{"", "mh", 2, "wrr"},
		{"lc", "", 0, "lc"},
		{"lc", "", 2, "lc"}, // there is no wlc
		{"sh", "", 2, "sh"},
		{"", "mute", 0, "mute"},
	} {
		got, missing := newSchedulerChoice(test.own, ask).of(port(test.asks, test.weight))
		wantMissing := ""
		if test.asks == "mh" {
			wantMissing = "mh"
		}
		if got != test.want || missing != wantMissing {
			t.Errorf("flag %q, annotation %q, weight %d: %s without %q, not %s without %q", test.own, test.asks, test.weight, got, missing, test.want, wantMissing)
		}
	}
	s := newSchedulerChoice("", ask)
	asked = nil
	for range 3 {
		s.of(port("mh", 2))
	}
	if want := []string{"mh", "wrr"}; !slices.Equal(asked, want) {
		t.Errorf("asked for %v, not %v", asked, want)
	}
	kernel = append(kernel, "mh")
	s.kernel.ForgetMissing()
	if got, missing := s.of(port("mh", 2)); got != "mh" || missing != "" {
		t.Errorf("after its module was loaded: %s without %q", got, missing)
	}
	if len(asked) != 3 {
		t.Errorf("asked for %v", asked)
	}
}

// TestMissingSchedulerIsAProblem checks that a Service port has a Problem while the kernel
// lacks its scheduler.
func TestMissingSchedulerIsAProblem(t *testing.T) {
	k := newFakeIPVS(t)
	p := k.proxier(t, time.Now)
	has := map[string]bool{}
	p.schedulers = newSchedulerChoice("lc", func(name string) (bool, error) { return has[name], nil })
	desired := conformance.Fleet(plan.IPv4, 3, 2)
	web := *slices.MinFunc(slices.Collect(maps.Values(desired.Services)), func(a, b *plan.ServicePort) int { return a.Name.Compare(b.Name) })
	problem := func(step, want string) {
		t.Helper()
		for name := range desired.Services {
			found, is := p.Problem(name)
			if is != (name == web.Name && want != "") {
				t.Errorf("%s: %s has the Problem %v", step, name, found)
			}
			if is && (found.Object != web.Name.ServiceName.String() || found.Field != "metadata.annotations[signalbox.dev/scheduler]" || !strings.Contains(found.Reason, want)) {
				t.Errorf("%s: %v does not say %q", step, found, want)
			}
		}
	}
	ask := func(scheduler string) {
		t.Helper()
		port := web
		port.Scheduler = scheduler
		syncOne(t, p, desired, &port)
	}
	problem("before anything is written", "")
	syncAll(t, p, desired)
	problem("nobody asks for any", "")
	ask("mh")
	problem("one asks for what is missing", "no scheduler mh: load the module ip_vs_mh (modprobe ip_vs_mh), or choose another; the Service has the scheduler of --ipvs-scheduler, lc,")
	ask("sed")
	problem("for another", "no scheduler sed")
	ask("")
	problem("for none", "")
	ask("mh")
	has["mh"] = true
	problem("the kernel was not asked again", "no scheduler mh")
	syncAll(t, p, desired)
	problem("it has it now", "")
	has = map[string]bool{}
	delete(desired.Services, web.Name)
	if err := p.Sync(t.Context(), desired, plan.Change{Services: []plan.ServicePortName{web.Name}}); err != nil {
		t.Fatal(err)
	}
	if found, is := p.Problem(web.Name); is {
		t.Errorf("it is gone and has the Problem %v", found)
	}
}
