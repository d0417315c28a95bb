// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// fussy is a mode that has one scheduler.
type fussy struct{ fakeProxier }

func (f *fussy) Problem(name plan.ServicePortName) (plan.Problem, bool) {
	if sp := f.kernel[name]; sp != nil && sp.Scheduler != "" && sp.Scheduler != "rr" {
		return plan.Problem{Kind: "Service", Object: name.ServiceName.String(), Field: plan.AnnotationField(plan.AnnotationScheduler), Reason: "no " + sp.Scheduler}, true
	}
	return plan.Problem{}, false
}

// TestModesProblemsAreToldOnce checks that what modes say of a Service is
// reported once for its ports and families together, until it is something else.
func TestModesProblemsAreToldOnce(t *testing.T) {
	v4, v6 := &fussy{}, &fussy{}
	b := newRig(t, func(o *LoopOptions) {
		o.Settings.HasSchedulers = true
		o.Proxiers = map[plan.Family]proxier.Proxier{plan.IPv4: v4, plan.IPv6: v6}
	})
	apply := func(name string, i int, scheduler string) {
		b.Apply(newService(name, clusterIP(i), annotated(plan.AnnotationScheduler, scheduler), func(s *corev1.Service) {
			s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, fmt.Sprintf("fd00::%x", i+1))
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "https", Protocol: corev1.ProtocolTCP, Port: 443})
		}))
	}
	said := func(step string, want ...string) {
		t.Helper()
		_ = b.SyncNow(t.Context()) // where it fails, the test wants it to
		var got []string
		for _, p := range b.problems {
			got = append(got, p.Object+" "+p.Reason)
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q and not %q was reported", step, got, want)
		}
		b.problems = nil
	}
	apply("web", 0, "mh")
	apply("api", 1, "rr")
	b.Synced()
	said("the first sync", "default/web no mh")
	b.Apply(newSlice("web", "10.244.2.1"))
	said("its endpoints change")
	b.RequestFullWrite()
	said("a full write follows")
	apply("api", 1, "mh")
	said("another Service", "default/api no mh")
	name := plan.ServiceName{Namespace: "default", Name: "api"}
	port := b.Service(plan.IPv4, name).Ports[0].Name
	v4.kernel[port] = &plan.ServicePort{} // as if a listener opened its port later
	if p := b.Service(plan.IPv4, name).States[port].Problem; p != "" {
		t.Errorf("a problem that ended is %q", p)
	}
	apply("web", 0, "sed")
	said("another scheduler", "default/web no sed")
	apply("web", 0, "rr")
	said("what there is")
	apply("web", 0, "sed")
	said("what there is not, again", "default/web no sed")
	b.Delete(newService("web", clusterIP(0)))
	said("gone")
	v6.setRefuse(func(*plan.Plan, plan.Change) error { return errors.New("busy") })
	apply("web", 0, "sed")
	said("back, and one family is busy", "default/web no sed")
	v6.setRefuse(nil)
	b.RequestFullWrite()
	said("it is not busy any more")
}

// TestSolvedProblemsAreNotListed: a mode solves a problem without a sync, as a listener
// that opens its port later does.
func TestSolvedProblemsAreNotListed(t *testing.T) {
	v4, v6 := &fussy{}, &fussy{}
	b := newRig(t, func(o *LoopOptions) {
		o.Settings.HasSchedulers = true
		o.Proxiers = map[plan.Family]proxier.Proxier{plan.IPv4: v4, plan.IPv6: v6}
	})
	b.Apply(newService("web", clusterIP(0), annotated(plan.AnnotationScheduler, "mh"), func(s *corev1.Service) {
		s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, "fd00::1")
	}))
	b.Synced()
	if err := b.SyncNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	listed := func(when string, want int) {
		t.Helper()
		if list, objects := b.ObjectProblems(10); len(list) != want || objects != want {
			t.Errorf("%s: %d problems of %d objects, want %d: %v", when, len(list), objects, want, list)
		}
	}
	listed("in both families", 1)
	clear(v4.kernel)
	listed("solved in one family", 1)
	clear(v6.kernel)
	listed("solved", 0)
}
