// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"signalbox/proxier/plan"
)

// crowd is a set of frontends that share an address, or whose addresses differ
// in few digits.
type crowd []plan.FrontendKey

func portsOf(addr netip.Addr, n int) (c crowd) {
	for i := range n {
		c = append(c, plan.FrontendKey{Addr: addr, Port: uint16(80 + i), Protocol: plan.TCP})
	}
	return c
}

// middles are n addresses that differ in their middle.
func (w *world) middles(n int) (addrs []netip.Addr) {
	for i := range n {
		addrs = append(addrs, w.addr(100+i, 1))
	}
	return addrs
}

func (w *world) crowds() []crowd {
	one := w.addr(96, 1)
	var apart, inSequence crowd
	for _, addr := range w.middles(20) {
		apart = append(apart, portsOf(addr, 1)...)
	}
	for i := range 200 {
		inSequence = append(inSequence, portsOf(w.addr(97, 1+i), 1)...)
	}
	return []crowd{
		portsOf(one, 17), apart, portsOf(one, 1000), inSequence, portsOf(one, 100),
		slices.Concat(apart, inSequence[:12], portsOf(one, 300)),
	}
}

// services are one with the server as its endpoint for each frontend, and one
// without endpoints at the port 10,000 above. Some have source ranges.
func (c crowd) services(server netip.AddrPort) map[plan.ServicePortName]*plan.ServicePort {
	services := map[plan.ServicePortName]*plan.ServicePort{}
	add := func(name string, kind plan.FrontendKind, key plan.FrontendKey, set *plan.EndpointSet) {
		sp := &plan.ServicePort{
			Name: plan.ServicePortName{
				ServiceName: plan.ServiceName{Namespace: "ns", Name: fmt.Sprint(name, "-", key)}, Protocol: plan.TCP,
			},
			Frontends: []plan.Frontend{{
				Kind: kind, Addr: key.Addr, Port: key.Port, Internal: set, External: set, Masquerade: plan.FromOutside,
			}},
		}
		if kind == plan.LoadBalancerIP {
			sp.Frontends[0].Sources = []netip.Prefix{netip.PrefixFrom(server.Addr(), 8)}
		}
		services[sp.Name] = sp
	}
	for i, key := range c {
		kind := []plan.FrontendKind{plan.ClusterIP, plan.ExternalIP, plan.LoadBalancerIP}[i%3]
		add("served", kind, key, &plan.EndpointSet{Endpoints: []plan.Endpoint{{AddrPort: server}}})
		key.Port += 10000
		add("empty", kind, key, &plan.EndpointSet{})
	}
	return services
}

// check makes a connection to the first, the last and a few other frontends.
func (c crowd) check(t *testing.T, server netip.AddrPort) {
	t.Helper()
	for i := 0; i < len(c); i = max(i+1, min(i+len(c)/5, len(c)-1)) {
		if answer, err := ask(c[i].Addr, c[i].Port); err != nil || answer != fmt.Sprint(server.Port()) {
			t.Errorf("%s, number %d of %d, answers %q, %v", c[i], i, len(c), answer, err)
		}
	}
}

// TestKernelTakesCrowds serves one crowd in the place of another by changes,
// and each of them from nothing.
func TestKernelTakesCrowds(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		w, desired := newWorld(p.opts.Family, 1), planOf(p.opts.Family)
		server := netip.AddrPortFrom(loneHost(t, p.opts.Family, 8080), 8080)
		for _, c := range w.crowds() {
			changed := maps.Clone(desired.Services)
			desired.Services = c.services(server)
			maps.Copy(changed, desired.Services)
			mustSync(t, p, desired, plan.Change{Services: slices.Collect(maps.Keys(changed))})
			c.check(t, server)
			// One only, because a host's own connection over IPv6 hears of it after a second.
			last := c[len(c)-1]
			if _, err := ask(last.Addr, 10000+last.Port); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s without endpoints, the last of %d, answers %v", last, len(c), err)
			}
			compareCounts(t, p)
		}
		for _, c := range w.crowds() {
			if _, err := Cleanup(p.opts.Family); err != nil {
				t.Fatal(err)
			}
			desired.Services = c.services(server)
			mustSync(t, newProxier(t, p.opts.Family, p.tools.Backend), desired, plan.Change{All: true})
			c.check(t, server)
		}
	})
}

// TestKernelTakesCrowdsOfEndpoints has endpoints that may be their own clients
// and whose addresses differ in few digits.
func TestKernelTakesCrowdsOfEndpoints(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		w, set := newWorld(p.opts.Family, 1), &plan.EndpointSet{}
		for _, addr := range w.middles(20) {
			set.Endpoints = append(set.Endpoints, plan.Endpoint{AddrPort: netip.AddrPortFrom(addr, 8080), MayHairpin: true})
		}
		mustSync(t, p, planOf(p.opts.Family, &plan.ServicePort{
			Name:      plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "ns", Name: "web"}, Protocol: plan.TCP},
			Frontends: []plan.Frontend{{Addr: w.addr(96, 1), Port: 80, Internal: set, External: set}},
		}), plan.Change{All: true})
		rules := saved(t, p)
		for _, e := range set.Endpoints {
			if rule := source(e.Addr()) + destination(e.Addr()) + " -j " + markMasqChain; !strings.Contains(rules, rule) {
				t.Errorf("no rule%s in\n%s", rule, rules)
			}
		}
	})
}
