// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"signalbox/proxier/plan"
)

// text sorts the owners that were asked for and forgets them.
func (r *recorder) text() string {
	var lines []string
	for _, o := range r.owners {
		keys := make([]string, len(o.Frontends))
		for i, k := range o.Frontends {
			keys[i] = k.String()
		}
		slices.Sort(keys)
		line := fmt.Sprintf("%s: %s", strings.Join(keys, " "), o.Usable)
		if len(o.Removed) > 0 {
			line += fmt.Sprintf(" without %s", o.Removed)
		}
		lines = append(lines, line)
	}
	r.owners = nil
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func TestFlowOwners(t *testing.T) {
	dns := newService("dns", "10.96.0.1", overUDP, nodePort(30053))
	for _, test := range []struct {
		what string
		do   func(b *rig)
		want string
	}{
		{"an endpoint less", func(b *rig) { b.Apply(newUDPSlice("dns", "10.244.2.1")) },
			"10.96.0.1:53/udp node:30053/udp: 10.244.2.1:8080"},
		{"none left", func(b *rig) { b.Apply(newUDPSlice("dns")) },
			"10.96.0.1:53/udp node:30053/udp: nobody"},
		{"terminating ones still serve", func(b *rig) {
			s := newUDPSlice("dns", "10.244.2.1", "10.244.2.2")
			s.Endpoints[0].Conditions.Ready, s.Endpoints[0].Conditions.Terminating = new(false), new(true)
			b.Apply(s)
		}, ""},
		{"the Service gone", func(b *rig) { b.Delete(dns) },
			"10.96.0.1:53/udp node:30053/udp: nobody"},
		{"the node port given up", func(b *rig) { b.Apply(newService("dns", "10.96.0.1", overUDP, port53)) },
			"10.96.0.1:53/udp: 10.244.2.1:8080 10.244.2.2:8080\nnode:30053/udp: nobody"},
		{"the cluster IP handed to one that sorts first", func(b *rig) {
			b.Delete(dns)
			b.Apply(newService("a", "10.96.0.1", overUDP, port53))
			b.Apply(newUDPSlice("a", "10.244.3.3"))
		}, "10.96.0.1:53/udp: 10.244.3.3:8080\nnode:30053/udp: nobody"},
		{"the cluster IP handed to one that sorts last", func(b *rig) {
			b.Apply(newService("z", "10.96.0.1", overUDP, port53))
			b.Apply(newUDPSlice("z", "10.244.3.3"))
			b.Delete(dns)
		}, "10.96.0.1:53/udp: 10.244.3.3:8080\nnode:30053/udp: nobody"},
		{"a policy changed", func(b *rig) {
			b.Apply(newService("dns", "10.96.0.1", overUDP, nodePort(30053), port53, func(s *corev1.Service) {
				s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
			}))
		}, ""},
		{"the same endpoints again", func(b *rig) { b.Apply(newUDPSlice("dns", "10.244.2.2", "10.244.2.1")) }, ""},
		{"TCP", func(b *rig) { b.Apply(newSlice("web", "10.244.2.2")) }, ""},
	} {
		t.Run(test.what, func(t *testing.T) {
			b := newRig(t)
			port53(dns)
			b.Apply(dns)
			b.Apply(newUDPSlice("dns", "10.244.2.1", "10.244.2.2"))
			b.Apply(newService("web", "10.96.0.2"))
			b.Synced()
			b.mustSync()
			if got, want := b.flows.text(), "10.96.0.1:53/udp node:30053/udp: 10.244.2.1:8080 10.244.2.2:8080"; got != want {
				t.Errorf("at the start\n%s\nwant\n%s", got, want)
			}
			test.do(b)
			b.mustSync()
			if got := b.flows.text(); got != test.want {
				t.Errorf("got\n%s\nwant\n%s", got, test.want)
			}
		})
	}
}

// TestFlowsToRemovedEndpoints: TCP connections end when an endpoint leaves all slices,
// whatever its conditions were, and not when the Service goes.
func TestFlowsToRemovedEndpoints(t *testing.T) {
	slice := func(n string, addresses ...string) *discoveryv1.EndpointSlice {
		s := newSlice("web", addresses...)
		s.Name += n
		return s
	}
	terminating := slice("a", "10.244.2.1", "10.244.2.2")
	terminating.Endpoints[0].Conditions = discoveryv1.EndpointConditions{Ready: new(false), Serving: new(false), Terminating: new(true)}
	web := newService("web", "10.96.0.1", nodePort(30080))
	const frontends = "10.96.0.1:80/tcp node:30080/tcp: "
	for _, test := range []struct {
		what string
		do   func(b *rig)
		want string
	}{
		{"one is removed", func(b *rig) { b.Apply(slice("a", "10.244.2.2")) }, frontends + "10.244.2.2:8080 without [10.244.2.1:8080]"},
		{"one terminates", func(b *rig) { b.Apply(terminating) }, ""},
		{"one terminates and is removed", func(b *rig) { b.Apply(terminating); b.mustSync(); b.Apply(slice("a", "10.244.2.2")) }, frontends + "10.244.2.2:8080 without [10.244.2.1:8080]"},
		{"another slice has it", func(b *rig) { b.Apply(slice("b", "10.244.2.1")); b.mustSync(); b.Apply(slice("a", "10.244.2.2")) }, ""},
		{"all are removed", func(b *rig) { b.Delete(slice("a")) }, frontends + "nobody without [10.244.2.1:8080 10.244.2.2:8080]"},
		{"the frontend goes with it", func(b *rig) { b.Apply(newService("web", "10.96.0.1")); b.Apply(slice("a", "10.244.2.2")) }, frontends + "10.244.2.2:8080 without [10.244.2.1:8080]"},
		{"the Service is deleted", func(b *rig) { b.Delete(web); b.Delete(slice("a")) }, ""},
	} {
		t.Run(test.what, func(t *testing.T) {
			b := newRig(t, func(o *LoopOptions) { o.Settings.ResetRemovedEndpoints = true })
			b.Apply(web)
			b.Apply(slice("a", "10.244.2.1", "10.244.2.2"))
			b.Synced()
			b.mustSync()
			if !b.Plan(plan.IPv4).Node.ResetStrays {
				t.Error("the modes do not reset")
			}
			test.do(b)
			b.mustSync()
			if got := b.flows.text(); got != test.want {
				t.Errorf("got\n%s\nwant\n%s", got, test.want)
			}
		})
	}
}

func port53(s *corev1.Service) { s.Spec.Ports[0].Port = 53 }

func TestFlowsAreRemovedOnceTheRulesAreWritten(t *testing.T) {
	b := newRig(t)
	for _, name := range []string{"bad", "good"} {
		b.Apply(newService(name, "10.96.0."+fmt.Sprint(len(name)), overUDP))
		b.Apply(newUDPSlice(name, "10.244.2.1", "10.244.2.2"))
	}
	b.Synced()
	b.mustSync()
	b.flows.text()
	b.mode.setRefuse(refusing("bad"))
	b.Apply(newUDPSlice("bad"))
	b.Apply(newUDPSlice("good"))
	if err := b.syncNow(); err == nil {
		t.Fatal("no error")
	}
	if got, want := b.flows.text(), "10.96.0.4:80/udp: nobody"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	b.mode.setRefuse(nil)
	b.mustSync()
	if got, want := b.flows.text(), "10.96.0.3:80/udp: nobody"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
