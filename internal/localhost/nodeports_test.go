// SPDX-License-Identifier: Apache-2.0

package localhost

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"signalbox/internal/netlab"
	"signalbox/proxier/plan"
)

const hangTimeout = 10 * time.Second

// bench is NodePorts on a lab's node1.
type bench struct {
	*testing.T
	*NodePorts
	node *netlab.Host
	plan *plan.Plan
	pod  netip.Addr
}

func eachFamily(t *testing.T, test func(b *bench)) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) {
			lab, err := netlab.New(netlab.Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { lab.Close() })
			b := &bench{T: t, NodePorts: New(f, "test"), node: lab.Host("node1"), pod: lab.Host("pod-a").Addr.V4, plan: &plan.Plan{
				Family: f, Node: plan.Node{LocalhostNodePorts: true}, Services: map[plan.ServicePortName]*plan.ServicePort{},
			}}
			if f == plan.IPv6 {
				b.pod = lab.Host("pod-a").Addr.V6
			}
			t.Cleanup(b.NodePorts.Close)
			test(b)
		})
	}
}

func named(name string, p plan.Protocol) plan.ServicePortName {
	return plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "default", Name: name}, Protocol: p}
}

// put adds a Service port to the plan, or replaces it; number 0 removes it.
func (b *bench) put(name plan.ServicePortName, number uint16, sources ...netip.Prefix) {
	if number == 0 {
		delete(b.plan.Services, name)
		return
	}
	b.plan.Services[name] = &plan.ServicePort{Name: name, Frontends: []plan.Frontend{{
		Kind: plan.NodePort, Port: number, Sources: sources,
		External: &plan.EndpointSet{Endpoints: []plan.Endpoint{{AddrPort: netip.AddrPortFrom(b.pod, 8080)}}},
	}}}
}

func (b *bench) sync(change plan.Change) {
	b.Helper()
	if err := b.node.Do(func() error { b.Sync(b.plan, change); return nil }); err != nil {
		b.Fatal(err)
	}
}

func (b *bench) ask(number uint16) error {
	ctx, cancel := context.WithTimeout(b.Context(), hangTimeout)
	defer cancel()
	_, err := b.node.Ask(ctx, "tcp", netip.AddrPort{}, netip.AddrPortFrom(plan.Localhost(b.family), number))
	return err
}

// serves checks which of three NodePorts answer. All others must refuse.
func (b *bench) serves(when string, numbers ...uint16) {
	b.Helper()
	for number := uint16(30080); number < 30083; number++ {
		err := b.ask(number)
		if want := slices.Contains(numbers, number); want && err != nil || !want && !errors.Is(err, syscall.ECONNREFUSED) {
			b.Errorf("%s: port %d: %v; served %v", when, number, err, numbers)
		}
	}
	if got := b.Stats().Listeners; got != len(numbers) {
		b.Errorf("%s: %d listeners are counted, want %d", when, got, len(numbers))
	}
}

func TestListenersFollowThePlan(t *testing.T) {
	eachFamily(t, func(b *bench) {
		web, api, dns := named("web", plan.TCP), named("api", plan.TCP), named("dns", plan.UDP)
		b.put(web, 30080)
		b.put(api, 30081)
		b.put(dns, 30082)
		b.sync(plan.Change{All: true})
		b.serves("at first", 30080, 30081)

		b.put(web, 30081)
		b.put(api, 30080)
		b.sync(plan.Change{Services: []plan.ServicePortName{web, api}})
		b.serves("ports were exchanged", 30080, 30081)

		b.put(web, 30081, netip.MustParsePrefix("192.0.2.0/24"))
		b.sync(plan.Change{Services: []plan.ServicePortName{web}})
		b.serves("loopback is not a permitted source", 30080)

		b.put(web, 30081, netip.PrefixFrom(plan.Localhost(b.family), 8))
		b.plan.Services[api].Frontends[0].External = nil
		b.sync(plan.Change{Services: []plan.ServicePortName{web, api}})
		b.serves("loopback is a permitted source, api has no endpoints", 30081)

		b.put(web, 0)
		b.sync(plan.Change{Services: []plan.ServicePortName{web}})
		b.serves("web is gone")
	})
}

// A child process that was just forked holds the sockets of its parent.
func TestPortIsClosedThoughAnotherProcessHoldsTheSocket(t *testing.T) {
	eachFamily(t, func(b *bench) {
		web := named("web", plan.TCP)
		b.put(web, 30080)
		b.sync(plan.Change{All: true})
		held, err := b.ports[web].listener.File()
		if err != nil {
			b.Fatal(err)
		}
		defer held.Close()
		b.put(web, 0)
		b.sync(plan.Change{Services: []plan.ServicePortName{web}})
		b.serves("after the Service is gone")
		if n := b.relay.Counts.AcceptFailures.Load(); n > 0 {
			b.Errorf("%d failures to accept", n)
		}
	})
}

// A port that another program has is reported and is served once it is free.
func TestTakenPort(t *testing.T) {
	eachFamily(t, func(b *bench) {
		web := named("web", plan.TCP)
		other, err := b.node.Listen("tcp", netip.AddrPortFrom(plan.Localhost(b.family), 30080).String())
		if err != nil {
			b.Fatal(err)
		}
		defer other.Close()
		b.put(web, 30080)
		b.sync(plan.Change{All: true})
		problem, ok := b.Problem(web)
		if !ok || problem.Object != "default/web" || !strings.Contains(problem.Reason, "NodePort 30080 is not served on loopback: listen") {
			b.Errorf("problem: %+v, %v", problem, ok)
		}
		if got := b.Stats(); got.Failures != 1 || got.Listeners != 0 {
			b.Errorf("%+v", got)
		}
		other.Close()
		b.retry()
		b.serves("the other program has ended", 30080)
		if problem, ok := b.Problem(web); ok {
			b.Errorf("a problem is left: %+v", problem)
		}
	})
}

// A local process cannot take all connections that the process's descriptors allow. Beyond
// the limit of loopback, connections are reset until others end.
func TestConnectionLimit(t *testing.T) {
	eachFamily(t, func(b *bench) {
		b.put(named("web", plan.TCP), 30080)
		b.sync(plan.Change{All: true})
		limit, open := &b.relay.Limits.Connections, atomic.Int64{}
		for admitted := true; admitted && open.Load() <= mostConnections; {
			admitted = limit.Acquire(&open)
		}
		defer func() {
			for open.Load() > 0 {
				limit.Release(&open)
			}
		}()
		if open.Load() > mostConnections {
			b.Fatal("the limit is that of the process")
		}
		if err := b.ask(30080); err == nil || b.relay.Counts.Refused.Load() != 1 {
			b.Errorf("beyond the limit: %v, %d connections were refused", err, b.relay.Counts.Refused.Load())
		}
		limit.Release(&open)
		if err := b.ask(30080); err != nil {
			b.Errorf("one connection has ended: %v", err)
		}
	})
}

// Open connections outlive what led to them; new ones are refused then.
func TestOpenConnections(t *testing.T) {
	eachFamily(t, func(b *bench) {
		web := named("web", plan.TCP)
		if b.Relays() {
			b.Error("connections are relayed before the first Sync")
		}
		b.put(web, 30080)
		b.sync(plan.Change{All: true})
		open, err := b.node.Open(b.Context(), "tcp", netip.AddrPort{}, netip.AddrPortFrom(plan.Localhost(b.family), 30080))
		if err != nil {
			b.Fatal(err)
		}
		defer open.Close()
		goesOn := func(when string) {
			b.Helper()
			if _, err := open.Ask(b.Context()); err != nil {
				b.Fatalf("%s: the open connection: %v", when, err)
			}
			if !b.Relays() {
				b.Errorf("%s: Relays is false", when)
			}
		}
		goesOn("at first")
		b.Pause()
		b.serves("paused")
		goesOn("paused")
		b.sync(plan.Change{All: true})
		b.serves("serving again", 30080)
		b.plan.Node.LocalhostNodePorts = false
		b.sync(plan.Change{Node: true})
		b.serves("switched off")
		goesOn("switched off")
		open.Close()
		ctx, cancel := context.WithTimeout(b.Context(), hangTimeout)
		defer cancel()
		b.Drain(ctx)
		if ctx.Err() != nil || b.Relays() {
			b.Errorf("after the last connection has ended: %v, Relays is %v", ctx.Err(), b.Relays())
		}
	})
}
