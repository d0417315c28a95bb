// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

// dice makes objects of the bytes of a fuzzer: few names, addresses and ports,
// so that they meet, and now and then what no API server would let through.
type dice struct{ data []byte }

func (d *dice) roll(n int) int {
	if len(d.data) == 0 {
		return 0
	}
	b := d.data[0]
	d.data = d.data[1:]
	return int(b) % n
}

func pick[T any](d *dice, of ...T) T { return of[d.roll(len(of))] }

func (d *dice) maybe() bool { return d.roll(2) == 1 }

func (d *dice) name() string { return pick(d, "a", "b", "c", "d", "e", "Bad\xff", "") }

func (d *dice) node() string { return pick(d, "node1", "node2", "") }

func (d *dice) zone() string { return pick(d, "", "east", "west") }

func (d *dice) port() int32 { return pick[int32](d, 80, 81, 443, 30001, 30002, 0, 70000, -1) }

func (d *dice) addr() string {
	return pick(d, "10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2", "192.0.2.1", "None", "", "127.0.0.1", "::ffff:10.0.0.1", "x", "fe80::1%x", "010.0.0.1")
}

func (d *dice) protocol() corev1.Protocol {
	return pick(d, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP, "", "ICMP")
}

func list[T any](d *dice, most int, of func() T) []T {
	var out []T
	for range d.roll(most + 1) {
		out = append(out, of())
	}
	return out
}

func optional[T any](d *dice, of func() T) *T {
	if d.maybe() {
		return nil
	}
	v := of()
	return &v
}

func (d *dice) meta() metav1.ObjectMeta {
	m := metav1.ObjectMeta{Namespace: pick(d, "default", "other"), Name: d.name(), Labels: map[string]string{}}
	if n := d.roll(4); n > 0 {
		m.CreationTimestamp = metav1.NewTime(time.Unix(int64(n), 0))
	}
	return m
}

func (d *dice) weights() map[string]string {
	return map[string]string{
		plan.AnnotationWeights:   pick(d, "", "*=2", "a*=0, 10.0.0.1=3", "a=1,b=5,a=7", "=,x=*,*=,**=1,*=70000", "\xff=1", "fd00::1=9, 10.0.0.2=0"),
		plan.AnnotationScheduler: pick(d, "", "wlc", "sh", "no such", "\xff"),
	}
}

func (d *dice) object() runtime.Object {
	switch d.roll(8) {
	case 0, 1, 2:
		return d.service()
	case 3, 4, 5:
		return d.slice()
	case 6:
		return d.nodeObject()
	}
	m := d.meta()
	m.Namespace = ""
	return &networkingv1.ServiceCIDR{ObjectMeta: m, Spec: networkingv1.ServiceCIDRSpec{CIDRs: list(d, 2, d.prefix)}}
}

func (d *dice) prefix() string {
	return pick(d, "10.0.0.0/8", "10.96.0.0/12", "fd00::/64", "0.0.0.0/0", "::/0", "10.0.0.1/32", "x", "::ffff:10.0.0.0/104", "::ffff:0:0/80")
}

func (d *dice) service() *corev1.Service {
	s := &corev1.Service{ObjectMeta: d.meta()}
	s.Annotations = d.weights()
	if d.roll(10) == 9 {
		s.Labels[service.LabelServiceProxyName] = "x"
	}
	s.Spec = corev1.ServiceSpec{
		Type:       pick(d, corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeExternalName),
		ClusterIP:  d.addr(),
		ClusterIPs: list(d, 2, d.addr), IPFamilies: list(d, 2, func() corev1.IPFamily { return pick(d, corev1.IPv4Protocol, corev1.IPv6Protocol, "x") }),
		ExternalIPs:              list(d, 3, d.addr),
		LoadBalancerSourceRanges: list(d, 3, d.prefix),
		HealthCheckNodePort:      d.port(),
		SessionAffinity:          pick(d, corev1.ServiceAffinityNone, corev1.ServiceAffinityClientIP, "x"),
		ExternalTrafficPolicy:    pick(d, corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal, "x"),
		InternalTrafficPolicy:    optional(d, func() corev1.ServiceInternalTrafficPolicy { return corev1.ServiceInternalTrafficPolicyLocal }),
	}
	s.Spec.Ports = list(d, 4, func() corev1.ServicePort {
		return corev1.ServicePort{Name: pick(d, "", "x", "y", "\xff"), Protocol: d.protocol(), Port: d.port(), NodePort: d.port()}
	})
	s.Status.LoadBalancer.Ingress = list(d, 3, func() corev1.LoadBalancerIngress {
		return corev1.LoadBalancerIngress{IP: d.addr(), IPMode: optional(d, func() corev1.LoadBalancerIPMode { return corev1.LoadBalancerIPModeProxy })}
	})
	return s
}

func (d *dice) slice() *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{ObjectMeta: d.meta(), AddressType: pick(d, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6, discoveryv1.AddressTypeFQDN)}
	s.Labels[discoveryv1.LabelServiceName] = d.name()
	s.Annotations = d.weights()
	s.Ports = list(d, 3, func() discoveryv1.EndpointPort {
		return discoveryv1.EndpointPort{
			Name: optional(d, func() string { return pick(d, "", "x", "y") }), Port: optional(d, d.port), Protocol: optional(d, d.protocol),
		}
	})
	s.Endpoints = list(d, 5, func() discoveryv1.Endpoint {
		e := discoveryv1.Endpoint{Addresses: list(d, 2, d.addr), NodeName: optional(d, d.node)}
		e.Conditions = discoveryv1.EndpointConditions{Ready: optional(d, d.maybe), Serving: optional(d, d.maybe), Terminating: optional(d, d.maybe)}
		e.TargetRef = optional(d, func() corev1.ObjectReference { return corev1.ObjectReference{Name: d.name()} })
		e.Hints = optional(d, func() discoveryv1.EndpointHints {
			return discoveryv1.EndpointHints{
				ForZones: list(d, 2, func() discoveryv1.ForZone { return discoveryv1.ForZone{Name: d.zone()} }),
				ForNodes: list(d, 2, func() discoveryv1.ForNode { return discoveryv1.ForNode{Name: d.node()} }),
			}
		})
		return e
	})
	return s
}

func (d *dice) nodeObject() *corev1.Node {
	n := &corev1.Node{ObjectMeta: d.meta()}
	n.Namespace, n.Name = "", "node1"
	n.Labels[corev1.LabelTopologyZone] = d.zone()
	n.Spec.PodCIDRs = list(d, 2, d.prefix)
	n.Status.Addresses = list(d, 2, func() corev1.NodeAddress {
		return corev1.NodeAddress{Type: pick(d, corev1.NodeInternalIP, corev1.NodeExternalIP, corev1.NodeHostName), Address: d.addr()}
	})
	return n
}

func (d *dice) settings() service.Settings {
	return service.Settings{
		MasqueradeAll: d.maybe(), IgnoreExternalIPs: d.maybe(), LocalhostNodePorts: pick(d, service.NoLocalhost, service.LocalhostCovered, service.LocalhostNamed), HasSchedulers: d.maybe(), KubeProxyIPVSPolicies: d.maybe(),
		DetectLocal:        pick(d, service.DetectLocalClusterCIDR, service.DetectLocalNodeCIDR, service.DetectLocalBridgeInterface),
		PodBridgeInterface: "cni0",
		NodePortAddresses:  service.NodePortSelector{Primary: d.maybe()},
	}
}

// fuzzLoop is a Loop of both families over modes that check its contract.
func fuzzLoop(settings service.Settings) (*Loop, []*fakeProxier) {
	modes := []*fakeProxier{{}, {}}
	l := NewLoop(LoopOptions{
		NodeName: "node1", Settings: settings, Proxiers: map[plan.Family]proxier.Proxier{plan.IPv4: modes[0], plan.IPv6: modes[1]},
		Flows: &recorder{}, Logger: slog.New(slog.DiscardHandler), Report: func(p plan.Problem) { _ = p.String() },
	})
	l.SetLocalAddrs([]netip.Addr{netip.MustParseAddr("192.168.0.1"), netip.MustParseAddr("fd00::9")})
	l.Synced()
	return l, modes
}

func seed(f *testing.F) {
	for i := range 16 {
		data := make([]byte, 600)
		for j := range data {
			data[j] = byte((i*31 + j*(i+7)) >> (i % 3))
		}
		f.Add(data)
	}
}

// FuzzTracker applies hostile objects: nothing panics, and every plan keeps
// what it promises.
func FuzzTracker(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		d := &dice{data}
		loop, modes := fuzzLoop(d.settings())
		for len(d.data) > 0 {
			if obj := d.object(); d.roll(5) == 4 {
				loop.Delete(obj)
			} else {
				loop.Apply(obj)
			}
		}
		mustSyncBoth(t, loop, modes)
	})
}

func mustSyncBoth(t *testing.T, loop *Loop, modes []*fakeProxier) {
	t.Helper()
	if err := loop.SyncNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, family := range plan.Families {
		plan := loop.Plan(family)
		checkPlan(t, plan)
		checkReasons(t, loop, family)
		checkTotals(t, loop.families[i].planner)
		if len(modes[i].broken) > 0 {
			t.Fatal(modes[i].broken)
		}
		for name, sp := range modes[i].kernel {
			if !sp.Equal(plan.Services[name]) {
				t.Fatalf("%s: the kernel has %v of %s, the plan %v", family, sp, name, plan.Services[name])
			}
		}
		if len(modes[i].kernel) != len(plan.Services) {
			t.Fatalf("%s: the kernel has %d Service ports, the plan %d", family, len(modes[i].kernel), len(plan.Services))
		}
	}
}

// FuzzIncremental applies and deletes objects with syncs in between: the plan
// is the one that the objects of the end make by themselves.
func FuzzIncremental(f *testing.F) {
	seed(f)
	f.Fuzz(changeByChange)
}

// TestRandomSequences is FuzzIncremental with long random inputs. `make soak` repeats it
// for 10,000 of them.
func TestRandomSequences(t *testing.T) {
	for range 500 {
		seed := rand.Uint64()
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 0))
			data := make([]byte, 200+random.IntN(2000))
			for i := range data {
				data[i] = byte(random.Uint32())
			}
			changeByChange(t, data)
		})
	}
}

// changeByChange makes the changes of an input one by one, and compares with all at once.
// With every second input it drops outdated events.
func changeByChange(t *testing.T, data []byte) {
	d := &dice{data}
	settings := d.settings()
	loop, modes := fuzzLoop(settings)
	left := map[string]runtime.Object{}
	for len(d.data) > 0 {
		obj := d.object()
		id := identity(obj)
		if d.roll(4) == 3 {
			loop.Delete(obj)
			if _, node := obj.(*corev1.Node); !node { // a node that is gone is remembered
				delete(left, id)
			}
		} else {
			loop.Apply(obj)
			left[id] = obj
		}
		if len(data)%2 == 0 {
			loop.dropOutdated()
		}
		if d.roll(3) == 2 {
			mustSyncBoth(t, loop, modes)
		}
	}
	mustSyncBoth(t, loop, modes)

	fresh, freshModes := fuzzLoop(settings)
	for _, obj := range left { // in any order
		fresh.Apply(obj)
	}
	mustSyncBoth(t, fresh, freshModes)
	for _, family := range plan.Families {
		if got, want := loop.Plan(family).String(), fresh.Plan(family).String(); got != want {
			t.Fatalf("one by one\n%s\nat once\n%s", got, want)
		}
	}
}

func identity(obj runtime.Object) string {
	m := obj.(metav1.Object)
	return fmt.Sprintf("%T %s/%s", obj, m.GetNamespace(), m.GetName())
}

// FuzzRefusals lets the modes refuse Services of some names in every way they
// can, while objects change. The Loop keeps the contract all the time; whoever
// is not refused is served soon; and once nobody is, everybody is.
func FuzzRefusals(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		d := &dice{data}
		loop, modes := fuzzLoop(d.settings())
		var bad []string
		for _, mode := range modes {
			mode.refuse = func(plan *plan.Plan, change plan.Change) error {
				err := refusing(bad...)(plan, change)
				switch {
				case err == nil:
					return nil
				case strings.HasSuffix(err.Error(), "a"):
					panic(err)
				case strings.HasSuffix(err.Error(), "c"):
					return fmt.Errorf("%w: %w", err, proxier.ErrUnknownState)
				}
				return err
			}
		}
		for len(d.data) > 0 {
			if obj := d.object(); d.roll(4) == 3 {
				loop.Delete(obj)
			} else {
				loop.Apply(obj)
			}
			switch d.roll(8) {
			case 0:
				bad = []string{pick(d, "a", "b"), pick(d, "c", "d")}
			case 1, 2:
				_ = loop.SyncNow(t.Context())
			}
		}
		for range 4 * maxFullWriteFailures {
			_ = loop.SyncNow(t.Context())
		}
		for i, family := range plan.Families {
			for name, sp := range loop.Plan(family).Services {
				if !slices.Contains(bad, name.Name) && modes[i].kernel[name] != sp && !touches(loop, family, name, bad) {
					t.Errorf("%s is not served, though only %v are refused", name, bad)
				}
			}
		}
		for _, mode := range modes {
			mode.refuse = nil
		}
		_ = loop.SyncNow(t.Context())
		mustSyncBoth(t, loop, modes)
	})
}

// touches says whether a refused Service still has a frontend in the kernel
// that the named port is to take over, itself or through others that wait.
func touches(l *Loop, family plan.Family, name plan.ServicePortName, bad []string) bool {
	for _, f := range l.families {
		if f.family != family {
			continue
		}
		together := f.withLinked([]plan.ServicePortName{name})
		return slices.ContainsFunc(together, func(n plan.ServicePortName) bool { return slices.Contains(bad, n.Name) })
	}
	return false
}
