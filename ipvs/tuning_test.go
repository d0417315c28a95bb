// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	lvs "github.com/moby/ipvs"

	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"

	"signalbox/ipvs/internal/kernel"

	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// TestTuning checks the options.
func TestTuning(t *testing.T) {
	eachFamily(t, func(t *testing.T, w world) {
		desired := w.example()
		for _, scheduler := range []string{"lc", "wrr", "sh", "mh", "sed", "nq", "rr"} {
			p, _ := start(t, w.family, func(o *proxier.Options) {
				o.IPVS = proxier.IPVSTuning{Scheduler: scheduler, StrictARP: true, TCPTimeout: 5 * time.Minute, UDPTimeout: time.Minute}
			})
			syncAll(t, p, desired)
			all, err := p.ipvs.Servers()
			if err != nil || len(all) == 0 {
				t.Fatal(len(all), err)
			}
			for key, got := range all {
				want := scheduler
				if isOfAffinity(key.Mark) && key.Mark&endpointFlag != 0 {
					want = defaultScheduler // one remembered endpoint
				}
				if got != want {
					t.Errorf("%s has the scheduler %s, not %s", key, got, want)
				}
			}
		}
		h, err := lvs.New("")
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		config, err := h.GetConfig()
		if err != nil || config.TimeoutTCP != 5*time.Minute || config.TimeoutTCPFin != 2*time.Minute || config.TimeoutUDP != time.Minute {
			t.Errorf("the timeouts are %+v (%v); that of a half-closed connection should be the kernel's", config, err)
		}
		o := options(w.family)
		o.IPVS.Scheduler = "nonsense"
		if p, err := New(o); err == nil || !strings.Contains(err.Error(), "modprobe ip_vs_nonsense") {
			t.Errorf("a scheduler that does not exist: %v, %v", p, err)
		}
		want := map[string]string{"net/ipv4/vs/conntrack": "1", "net/ipv4/vs/expire_nodest_conn": "1", "net/ipv4/vs/expire_quiescent_template": "1"}
		if w.family == plan.IPv4 {
			maps.Copy(want, map[string]string{"net/ipv4/conf/all/arp_ignore": "1", "net/ipv4/conf/all/arp_announce": "2"})
		}
		for name, value := range want {
			if got, err := node.Sysctl(name); got != value || err != nil {
				t.Errorf("%s is %s, not %s (%v)", name, got, value, err)
			}
		}
	})
}

// TestSchedulersAndWeights checks that annotations reach the kernel, also after a change. A
// Service that asks for a missing scheduler is served like all others.
func TestSchedulersAndWeights(t *testing.T) {
	eachFamily(t, func(t *testing.T, w world) {
		web := func(scheduler string, weights ...uint16) *plan.ServicePort {
			set := w.pods(1, 2)
			for i, weight := range weights {
				set.Endpoints[i].Weight = weight
			}
			sp := w.service("web", plan.TCP, set, clusterIP(w.vip(1), 80, set))
			sp.Scheduler = scheduler
			return sp
		}
		key := kernel.ServerKey{Addr: w.vip(1), Port: 80, Protocol: plan.TCP}
		plan := w.example()
		p, sent := start(t, w.family, nil)
		syncAll(t, p, plan)
		for _, test := range []struct {
			scheduler string
			weights   []uint16
			has       string
			messages  int
		}{
			{"sh", nil, "sh", 1 + 1}, // and the example's third endpoint goes
			{"sh", []uint16{7, 0}, "sh", 1},
			{"wlc", []uint16{7, 65535}, "wlc", 2},
			{"no_such", []uint16{7, 65535}, "wrr", 1},
			{"", []uint16{7, 65535}, "wrr", 0},
			{"", nil, "rr", 3},
		} {
			sent.take()
			syncOne(t, p, plan, web(test.scheduler, test.weights...))
			if ops := sent.take(); len(ops) != test.messages {
				t.Errorf("%q, %v: sent %v", test.scheduler, test.weights, ops)
			}
			all, err := p.ipvs.Servers()
			if err != nil || all[key] != test.has {
				t.Errorf("%q, %v: the kernel has %s (%v)", test.scheduler, test.weights, all[key], err)
			}
			dests, err := p.ipvs.Destinations(key)
			got := make(map[netip.AddrPort]int)
			for _, d := range dests {
				if d.Weight > 0 {
					got[d.Addr] = d.Weight
				}
			}
			want := make(map[netip.AddrPort]int)
			for _, d := range destinations(web("", test.weights...).Frontends[0].External) {
				want[d.Addr] = d.Weight
			}
			if err != nil || !maps.Equal(got, want) {
				t.Errorf("%q, %v: the weights are %v (%v)", test.scheduler, test.weights, got, err)
			}
			checkKernel(t, p)
		}
	})
}

// TestShares checks that weights spread connections.
func TestShares(t *testing.T) {
	eachFamily(t, func(t *testing.T, w world) {
		own := w.addr("192.0.2.200", "2001:db8::200")
		set := &plan.EndpointSet{}
		for i, weight := range []uint16{3, 1} {
			at := netip.AddrPortFrom(own, uint16(8080+i))
			serve(t, at)
			set.Endpoints = append(set.Endpoints, plan.Endpoint{AddrPort: at, Weight: weight})
		}
		p, _ := start(t, w.family, nil)
		syncAll(t, p, w.plan(w.service("web", plan.TCP, set, clusterIP(w.vip(1), 80, set))))
		for range 8 {
			c, err := dial(t, netip.AddrPortFrom(w.vip(1), 80))
			if err == nil {
				err = echoes(c)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		dests, err := p.ipvs.Destinations(kernel.ServerKey{Addr: w.vip(1), Port: 80, Protocol: plan.TCP})
		if err != nil || len(dests) != 2 {
			t.Fatal(dests, err)
		}
		for _, d := range dests {
			if want := 2 * d.Weight; d.Connections != want {
				t.Errorf("%s with the weight %d has %d of 8 connections, not %d", d.Addr, d.Weight, d.Connections, want)
			}
		}
	})
}
